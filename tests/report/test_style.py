"""Colours of the report, computed from its style as WCAG does: text is read at 4.5 to 1, the lines of charts at 3 to 1."""

import colorsys
import re

import pytest

from synpo_fast.report.colours import series_colour
from synpo_fast.report.style import STYLE
from tests.report.test_browser import contrast

TEXT, LINES = 4.5, 3.0


def declared(theme):
    """Custom properties of a theme: what :root says, and for the dark one what its media query says after it."""
    light, dark = re.findall(r":root\{(.*?)\}", STYLE, re.S)[:2]
    pairs = re.findall(r"--([\w-]+):([^;}]+)", light) + (
        re.findall(r"--([\w-]+):([^;}]+)", dark) if theme == "dark" else []
    )
    return {name: value.strip() for name, value in pairs}


def rule(selector, name):
    """The value that the last rule for just this selector gives a property, outside media queries."""
    plain = STYLE[: STYLE.index("@media(max-width")]
    rules = [body for names, body in re.findall(r"([^{}]+)\{([^{}]*)\}", plain) if selector in names.strip().split(",")]
    values = [m[1].strip() for body in rules if (m := re.search(rf"(?:^|;){name}:([^;]+)", body))]
    return values[-1] if values else None


def rgb(value, colours):
    value = re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], value)
    if match := re.fullmatch(r"hsl\((\d+) (\d+)% (\d+)%\)", value):
        hue, saturation, lightness = (int(part) for part in match.groups())
        return tuple(255 * c for c in colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100))
    digits = re.fullmatch(r"#([0-9a-f]{3}|[0-9a-f]{6})", value)[1]
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return tuple(int(digits[place : place + 2], 16) for place in (0, 2, 4))


def text_of(colour):
    return "rgb({}, {}, {})".format(*(round(part) for part in colour))


def seen(ink, paper, opacity=1.0):
    """Contrast of an ink that lies on paper with this opacity."""
    mixed = tuple(opacity * a + (1 - opacity) * b for a, b in zip(ink, paper, strict=True))
    return contrast(text_of(mixed), text_of(paper))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_text_can_be_told_from_their_background(theme):
    colours = declared(theme)
    card, page = (rgb(colours[name], colours) for name in ("card", "page"))
    for name in ("ink", "soft"):
        assert min(seen(rgb(colours[name], colours), paper) for paper in (card, page)) >= TEXT, name
    assert seen(rgb(colours["warn"], colours), rgb(colours["warn-bg"], colours)) >= TEXT
    opacity = rule(".raw", "opacity") or "1"
    opacity = float(colours[opacity[6:-1]] if opacity.startswith("var(--") else opacity)
    for name in (*(series_colour(number) for number in range(40)), "var(--chosen)", "var(--rejected)"):
        ink = rgb(name, colours)
        assert seen(ink, card) >= TEXT, name  # the names in a chart's readout are written in it
        assert seen(ink, card, opacity) >= LINES, (name, opacity)
        assert opacity < 0.8 and seen(ink, card, opacity) < 0.75 * seen(ink, card), (
            name
        )  # and still fainter than the trend
    for selector in ("svg .grid", ".axis", ".rule", ".lost"):
        ink = rgb(rule(selector, "stroke"), colours)
        assert seen(ink, card, float(rule(selector, "opacity") or 1)) >= LINES, selector


def test_nothing_makes_the_lines_of_several_runs_fainter():
    assert len(re.findall(r"\.raw\b[^{]*\{[^}]*opacity", STYLE)) == 1
