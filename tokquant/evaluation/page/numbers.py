"""Figures as a page writes them."""

import math


def percent(fraction: float) -> str:
    """0.01234 -> '1.23 %': three digits, no fewer than a hundredth."""
    if not math.isfinite(fraction):
        return special(fraction)
    value = 100 * fraction
    if value >= 1e4:
        return f"{value:.1e} %"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 or value == 0 else 3}f} %"


def cell(fraction: float) -> str:
    """A percentage in the few characters of a cell: '0.45', '1.2', '12'."""
    if not math.isfinite(fraction):
        return special(fraction)
    value = 100 * fraction
    if value == 0:
        return "0"
    if value < 0.01:
        return "<.01"
    if value > 999:
        return ">999"
    return f"{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f}"


def plain(value: float) -> str:
    """Three digits: '0.512', '3.21', '1240'."""
    if not math.isfinite(value):
        return special(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def thousandths(value: float) -> str:
    """As short as it is exact, to a thousandth: '8.25', '4'."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def special(value: float) -> str:
    """What is no number."""
    return "NaN" if math.isnan(value) else "\u221e" if value > 0 else "\u2212\u221e"
