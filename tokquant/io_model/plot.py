"""A plot of bytes moved against fast memory: the bounds, known algorithms, and a kernel's launches."""

import os
from collections.abc import Sequence

import numpy as np

from tokquant.evaluation.plot import check
from tokquant.io_model.algorithms import flash_bytes, square_tiling_bytes
from tokquant.io_model.bounds import lower_bounds
from tokquant.io_model.report import Standing
from tokquant.io_model.traffic import Traffic
from tokquant.kernels.compile import Kernel

LINES = {
    "compulsory": ("inputs and outputs once", "0.5", ":"),
    "pebble": ("pebble game, 1 / M", "tab:blue", "-"),
    "small_memory": ("matrix product, 1 / sqrt(M)", "tab:green", "-"),
}


def draw(found: Standing, launches: Sequence[tuple[Kernel, Traffic]], path: str | os.PathLike) -> None:
    """Plot bounds, algorithms and launches to an .svg, .png or .pdf file, for one processor with one fast memory of any size.

    A launch is placed at the bytes that its tiles hold: queries, sums and scores, and a tile of keys and values.

    Raises ValueError for another kind of file, UnsupportedError where matplotlib is not installed.
    """
    check(path)
    from matplotlib.figure import Figure

    of, d = found.problem, found.problem.head_dim
    memory = np.geomspace(d, 64 * 2**20, 400)
    bounds = [lower_bounds(of, float(m)) for m in memory]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color, style) in LINES.items():
        values = np.array([getattr(each, name) for each in bounds])
        axes.plot(memory, np.where(values > 0, values, np.nan), style, color=color, label=f"bound: {label}")
    axes.plot(memory, [flash_bytes(of, m) for m in memory], "--", color="tab:red", label="flash attention, tiles of any size")
    axes.plot(memory, [square_tiling_bytes(of, m) for m in memory], "--", color="tab:orange", label="SquareTiling")
    x, y = zip(*((_held(kernel, found), moved.total) for kernel, moved in launches), strict=True)
    axes.scatter(x, y, s=24, color="black", zorder=3, label=f"launches of {found.kernel.scheme.name}")
    axes.axvline(found.memory, color="0.7", linewidth=1, label=f"a multiprocessor: {found.memory / 1024:.0f} KiB")
    axes.set(xscale="log", yscale="log", xlabel="bytes of fast memory", ylabel="bytes moved")
    axes.set_ylim(bottom=0.3 * bounds[0].compulsory)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _held(kernel: Kernel, found: Standing) -> float:
    """Bytes of what a launch's tiles hold."""
    of, config = found.problem, kernel.config
    queries = config.block_m * (of.head_dim * (of.q + of.sums) + config.block_n * of.sums)
    return queries + config.block_n * of.head_dim * (of.k + of.v)
