"""The demo's results as a table for people."""

from __future__ import annotations

from typing import Any

TRAININGS = ("warm_up", "synpo", "dpo")


def summary(results: dict[str, Any]) -> str:
    """A table for people."""
    names = ("warm-up", "SynPO", "DPO")
    rows: list[tuple[str, ...]] = [("unseen videos", *names)]
    rows.append(("exact attributes, %", *(f"{100 * results['accuracy'][name]:.1f}" for name in TRAININGS)))
    for attribute in results["per_attribute"]["synpo"]:
        rows.append((f"  {attribute}", *(f"{100 * results['per_attribute'][n][attribute]:.1f}" for n in TRAININGS)))
    rows.append(("NLL of the truth", *(f"{results['nll'][name]:.3f}" for name in TRAININGS)))
    table = "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)
    example = results["examples"][0]
    return "\n".join(
        [
            "",
            table,
            "",
            *_speed(results["step"]),
            "",
            f"The trainings and their evaluation took {sum(results['seconds'].values()):.0f} s.",
            "",
            f"{example['video']}",
            *(f"  {name:<7} {example[name]}" for name in ("truth", "before", "after")),
        ]
    )


def _speed(steps: dict[str, Any]) -> list[str]:
    """DPO both ways: with all that SynPO has too, and without the prompt shared."""
    synpo = steps["synpo"]["seconds"]["median"]
    lines = [f"A step of SynPO took {1e3 * synpo:.0f} ms. On the same pairs in turn with it, DPO's took"]
    for name, how in (
        ("dpo-adapter-off", "reference computed in the step, prompt shared and rows packed as SynPO's"),
        ("dpo-precomputed", "reference computed beforehand, the rest as SynPO's"),
        ("dpo-adapter-off-unshared", "reference computed in the step, prompt run for each caption"),
    ):
        step = steps[name]
        if step["skipped"] is None:
            seconds = step["seconds"]["median"]
            lines.append(f"  {1e3 * seconds:5.0f} ms, {seconds / synpo:.2f} times as long: {how}")
    return lines
