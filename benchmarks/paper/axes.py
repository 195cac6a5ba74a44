"""Axes that people read: shares as percents, numbers of tokens in thousands, lines with their names at their ends."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis


def in_percent(axes: Axes, *ticks: float) -> None:
    """Mark these percentages on the y axis, with a grid; where x is marked already."""
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def percents(axis: Axis, shares: Sequence[float]) -> None:
    """Ticks at these shares of one, and no others."""
    axis.set_ticks(list(shares), [f"{100 * share:g} %" for share in shares])
    axis.set_ticks([], minor=True)


def thousands(axis: Axis, tokens: Sequence[int]) -> None:
    """Ticks at these numbers of tokens, and no others."""
    axis.set_ticks(list(tokens), list(map(short, tokens)))
    axis.set_ticks([], minor=True)


def short(tokens: int) -> str:
    """4096 -> '4k'."""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def named_line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, up: float = 0, **style: Any) -> None:
    """A line whose name stands to the right of its end, in its colour, `up` points above it."""
    [line] = axes.plot(x, y, **style)
    at = {"xytext": (5, up), "textcoords": "offset points", "va": "center", "fontsize": 7.5, "annotation_clip": False}
    axes.annotate(name, (x[-1], y[-1]), color=line.get_color(), **at)  # type: ignore[arg-type]
