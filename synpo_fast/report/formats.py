"""Formats numbers for the report. An unknown number is a dash."""

from __future__ import annotations

NO_NUMBER = "–"


def short(value: float | None, unit: str = "", digits: int = 4) -> str:
    """A number with so many significant digits, in scientific notation if very large or very small."""
    if value is None:
        return NO_NUMBER
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.{min(digits, 3) - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}{unit}"
    if float(value).is_integer() or size >= 1e3:
        return f"{value:,.0f}{unit}"
    return f"{value:.{digits}g}{unit}"


def whole_number(number: int) -> str:
    """All digits of a count or a step, with thousands separators."""
    return f"{number:,}"


def large(value: float | None) -> str:
    """A count; from a million on in M (millions) or G (billions)."""
    if value is None or abs(value) < 1e6:
        return short(value)
    return f"{value / 1e6:,.3g} M" if value < 1e9 else f"{value / 1e9:,.4g} G"


def percent(value: float) -> str:
    return f"{value:.1f} %"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NO_NUMBER
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def memory(size: float | None) -> str:
    """Bytes as MiB or GiB."""
    if size is None or size < 2**30:
        return short(None if size is None else size / 2**20, " MiB", 3)
    return short(size / 2**30, " GiB", 3)
