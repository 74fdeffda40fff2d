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
    speed = results["pairs_per_s"]
    rows.append(("pairs/s (median)", "", f"{speed['synpo']:.1f}", f"{speed['dpo']:.1f}"))
    table = "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)
    example = results["examples"][0]
    return "\n".join(
        [
            "",
            table,
            "",
            f"SynPO trained {speed['synpo'] / speed['dpo']:.2f} times as many pairs a second as DPO here, both with the prefix "
            "shared and each timed by itself.",
            f"The trainings and their evaluation took {sum(results['seconds'].values()):.0f} s.",
            "",
            f"{example['video']}",
            *(f"  {name:<7} {example[name]}" for name in ("truth", "before", "after")),
        ]
    )
