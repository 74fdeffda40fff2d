"""The report's colours in a light and a dark theme: for runs and stages, a pair's two responses, text and background.

A page refers to them as CSS variables, which take the theme's value.
"""

from __future__ import annotations

# Runs and stages take these in order. Each has enough contrast with the background for text, and differs from the others.
LIGHT = ("#0b63bd", "#a94a08", "#16724a", "#8e44ad", "#7d5c00", "#b82c64", "#0b6c74", "#5c6672")
DARK = ("#5eb0ff", "#ff9a4d", "#5fd39a", "#cf9bea", "#e5c04b", "#ff86b3", "#4fd0d8", "#aab3bf")

RESPONSE_COLOURS = {"chosen": "var(--chosen)", "rejected": "var(--rejected)"}  # on a page about one run
QUIET = "var(--faint)"


def series_colour(number: int) -> str:
    """The CSS colour of a run or a stage: the listed ones first, then as many hues as needed, with the theme's lightness."""
    return f"var(--c{number})" if number < len(LIGHT) else f"hsl({number * 137 % 360} 60% var(--more))"


THEMES = f"""
:root{{color-scheme:light dark;--ink:#1c2128;--soft:#5b6470;--faint:#e3e7ec;--page:#f6f7f9;--card:#fff;--warn:#b42318;
--warn-bg:#fdeceb;--grid:#8d949c;--thin:.74;--more:27%;--chosen:{LIGHT[0]};--rejected:{LIGHT[1]};--c0:{LIGHT[0]};--c1:{LIGHT[1]};--c2:{LIGHT[2]};
--c3:{LIGHT[3]};--c4:{LIGHT[4]};--c5:{LIGHT[5]};--c6:{LIGHT[6]};--c7:{LIGHT[7]}}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e6e9ee;--soft:#9aa4b1;--faint:#2c333d;--page:#12161b;--card:#1a2027;
--warn:#ff9a8f;--warn-bg:#3a1d1b;--grid:#69727e;--thin:.62;--more:72%;--chosen:{DARK[0]};--rejected:{DARK[1]};--c0:{DARK[0]};--c1:{DARK[1]};
--c2:{DARK[2]};--c3:{DARK[3]};--c4:{DARK[4]};--c5:{DARK[5]};--c6:{DARK[6]};--c7:{DARK[7]}}}}}"""
