"""Formats the demo's results for the terminal."""

from __future__ import annotations

from typing import Any

TRAININGS = ("warm_up", "synpo", "dpo")


def summary(results: dict[str, Any]) -> str:
    """The results as text: accuracy and NLL of each model, step times, and an example."""
    names = ("warm-up", "SynPO", "DPO")
    rows: list[tuple[str, ...]] = [("unseen videos", *names)]
    rows.append(("exact attributes, %", *(f"{100 * results['accuracy'][name]:.1f}" for name in TRAININGS)))
    for attribute in results["per_attribute"]["synpo"]:
        rows.append((f"  {attribute}", *(f"{100 * results['per_attribute'][n][attribute]:.1f}" for n in TRAININGS)))
    rows.append(("NLL, true captions", *(f"{results['nll'][name]:.3f}" for name in TRAININGS)))
    table = "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)
    example = results["examples"][0]
    return "\n".join(
        [
            "",
            table,
            "",
            *_speed(results["step"]),
            "",
            f"All steps of the demo took {sum(results['seconds'].values()):.0f} s.",
            "",
            f"{example['video']}",
            *(f"  {name:<7} {example[name]}" for name in ("truth", "before", "after")),
        ]
    )


def _speed(steps: dict[str, Any]) -> list[str]:
    """Lines that compare DPO's step times with SynPO's: with the same optimisations, and without sharing the prompt."""
    synpo = steps["synpo"]["seconds"]["median"]
    lines = [f"A step of SynPO took {1e3 * synpo:.0f} ms. On the same pairs, a step of DPO took"]
    for name, how in (
        ("dpo-adapter-off", "reference computed in the step; prompt shared and rows packed as in SynPO"),
        ("dpo-precomputed", "reference computed beforehand; the rest as in SynPO"),
        ("dpo-adapter-off-unshared", "reference computed in the step; prompt run once per caption"),
    ):
        step = steps[name]
        if step["skipped"] is None:
            seconds = step["seconds"]["median"]
            lines.append(f"  {1e3 * seconds:5.0f} ms, {seconds / synpo:.2f} times as long: {how}")
    return lines
