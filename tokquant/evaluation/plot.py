"""A plot of the Pareto front of a search."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokquant.errors import UnsupportedError, quote
from tokquant.evaluation.search import Found

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"bits": "bits a value of Q, K and V", "kv_bits": "bits a value of K and V", "ms": "ms"}
FORMATS = (".svg", ".png", ".pdf")


def check(path: str | os.PathLike) -> None:
    """Raise what `draw` would raise, before the work that gives it something to draw."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"plot: {quote(Path(path).name)} is not one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("plot: needs matplotlib; install tokquant[plot]")


def draw(found: Found, path: str | os.PathLike) -> None:
    """Write the front, the single schemes and what was chosen: error against cost, to an .svg, .png or .pdf file.

    Raises ValueError for another kind of file, UnsupportedError where matplotlib is not installed.
    """
    check(path)
    figure(found).savefig(path)


def figure(found: Found) -> "Figure":
    """The picture that `draw` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    costs, errors = zip(*found.front, strict=True)
    axes.step(costs, errors, where="post", label="maps", zorder=1)
    # empty where no scheme fits every layer
    x, y = np.array(list(found.singles.values())).reshape(-1, 2).T
    axes.scatter(x, y, s=16, color="0.5", label="one scheme for all layers", zorder=2)
    for name, point in found.singles.items():
        if any(cost <= point[0] and error < point[1] for cost, error in found.singles.values()):
            continue  # names off the front would overlap
        axes.annotate(name, point, textcoords="offset points", xytext=(3, 3), fontsize=6, color="0.5")
    axes.scatter([found.cost], [found.error], s=70, marker="*", color="tab:red", label=found.map.name, zorder=3)
    axes.set(xlabel=UNITS[found.unit], ylabel=found.metric if found.metric != "cosine" else "1 - cosine", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
