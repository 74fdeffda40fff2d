"""Colours, captions and axes shared by the pictures of all benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS_COLOUR, PEER_COLOUR, QUIET = "#c8501e", "#7f97b2", "#777777"


def prepare_folder(folder: Path) -> None:
    """Makes the folder and sets matplotlib to draw into files. Raises ImportError with a hint if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)


def machine_line(environment: dict[str, Any]) -> str:
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name))
    if "gpu" in environment:
        driver = environment["gpu"].get("driver_version", "unknown")
        return f"{environment['gpu']['name']}, driver {driver}, {versions}"
    return f"{environment['cpu']}, {environment['threads']} threads, {versions}"


def clean_axes(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9.5)


def spread_labels(places: list[float], gap: float) -> list[float]:
    """Moves sorted places until neighbours are about `gap` apart. No place moves below the first."""
    moved = list(places)
    for _ in range(300):
        for i in range(1, len(moved)):
            push = (gap - (moved[i] - moved[i - 1])) / 2
            if push > 0:
                moved[i - 1] -= push
                moved[i] += push
        below = places[0] - moved[0]
        if below > 0:
            moved[0] += below
    return moved
