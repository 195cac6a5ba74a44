"""What smoothing, balance and rotation buy, and where they hurt: the error with each over the error without.

Q and K are coded while V and P stay in 16 bits, or V alone. Static offsets are calibrated on other tokens than they serve.
Ratios of relative L1 errors, medians of five draws of 2048 tokens and 128 channels, or of the six layers of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import keys
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from study import Case, Rows, grouped, relative_l1

import tokquant as tq
from tokquant.activations import Activations, sample

DRAWS, TOKENS, QUERIES, HEAD_DIM = 5, 2048, 64, 128

DATA: dict[str, keys.Draw] = {
    "normal": keys.normals,
    "uniform": keys.uniforms,
    "outlier channels": keys.outlier_channels,
    "means": keys.means,
    "one mean": keys.one_mean,
    "RoPE and bias": keys.rope_biased,
    "massive token": keys.massive_token,
}
REAL = "MiniLM"

CODES: dict[str, dict[str, Any]] = {
    "int8 token": {"precision": "int8"},
    "int8 block 128": {"precision": "int8", "granularity": {"block": 128}},
    "int8 tensor": {"precision": "int8", "granularity": "tensor"},
    "int4 token": {"precision": "int4"},
    "fp8 head": {"precision": "fp8_e4m3", "granularity": "head"},
}
MEAN, STATIC, BLOCKS = {"smooth": "mean"}, {"smooth": "static"}, {"smooth": "block_mean"}
TRANSFORMS: dict[str, dict[str, dict[str, Any]]] = {
    "qk": {
        "none": {},
        "mean of K": {"k": MEAN},
        "static offset of K": {"k": STATIC},
        "block means of Q": {"q": BLOCKS},
        "both means": {"q": BLOCKS, "k": MEAN},
        "Hadamard": {"rotate": "hadamard"},
        "mean of K, Hadamard": {"k": MEAN, "rotate": "hadamard"},
        "balance channel": {"balance": "channel"},
        "balance rope_pairs": {"balance": "rope_pairs"},
    },
    "v": {
        "none": {},
        "mean of V": {"v": MEAN},
        "static offset of V": {"v": STATIC},
        "Hadamard of V": {"rotate_v": "hadamard"},
        "mean of V, Hadamard of V": {"v": MEAN, "rotate_v": "hadamard"},
    },
}
"""For each operand that is coded, what a scheme has beside its codes."""


@dataclass(frozen=True)
class Row:
    """One transform before one kind of codes on one kind of input."""

    data: str
    operand: str
    codes: str
    transform: str
    errors: list[float]


def scheme(operand: str, codes: dict[str, Any], changes: dict[str, Any]) -> tq.QuantScheme:
    """These operands in codes, with what a transform changes."""
    plain = {"precision": "fp16"}
    parts = {role: (codes if role in operand else plain) | changes.get(role, {}) for role in "qkvp"}
    return tq.QuantScheme(**changes | parts)


def inputs(small: bool) -> Iterator[tuple[str, list[Case]]]:
    """Names of inputs, and the draws or layers of each."""
    n, rows, draws = (256, 32, 1) if small else (TOKENS, QUERIES, DRAWS)
    for name, draw in DATA.items():
        drawn = [draw(n, HEAD_DIM, seed) for seed in range(2 * draws)]
        yield name, [Case(*each, rows=rows, calibration=other) for each, other in zip(drawn, drawn[draws:], strict=False)]
    layers = list(Activations(sample()).values())[: 1 if small else None]
    yield REAL, [Case(*layer, calibration=tuple(x[:, :, :256] for x in layer)) for layer in layers]


def measure(small: bool) -> Iterator[Row]:
    """Every transform before every kind of codes on every input that differs for it."""
    for data, cases in inputs(small):
        for operand in ("qk",) if data == "RoPE and bias" else TRANSFORMS:
            for codes in ("int4 token",) if small else CODES:
                for transform, changes in TRANSFORMS[operand].items():
                    made = scheme(operand, CODES[codes], changes)
                    yield Row(data, operand, codes, transform, relative_l1(cases, made))


def ratios(rows: Rows) -> dict[tuple[str, str, str, str], float]:
    """By operand, codes, transform and input: the error over that of `none`."""
    errors = {tuple(row[name] for name in ("operand", "codes", "transform", "data")): row["errors"] for row in rows}
    return {
        (operand, codes, transform, data): median(
            x / y for x, y in zip(each, errors[operand, codes, "none", data], strict=True)
        )
        for (operand, codes, transform, data), each in errors.items()
    }


def table(rows: Rows) -> str:
    """For each operand and kind of codes the error with nothing done, and ratios to it."""
    found, lines = ratios(rows), []
    for (operand, codes), those in grouped(rows, "operand", "codes"):
        data = list(dict.fromkeys(row["data"] for row in those))
        lines += ["", f"| {' and '.join(operand.upper())} {codes} | " + " | ".join(data) + " |", "|---|" + "---|" * len(data)]
        for (transform,), each in grouped(those, "transform"):
            if transform == "none":
                cells = [f"{median(row['errors']):.2%}".replace("%", " %") for row in each]
            else:
                cells = [f"{found[operand, codes, transform, row['data']]:.2f}" for row in each]
            lines.append(f"| {transform} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


STEPS = ListedColormap(["#2ea36f", "#7fcaa6", "#c5e8d6", "#f7dfc6", "#f0b07a", "#e0823d"])
EDGES = (0.0, 0.4, 0.6, 0.9, 1.1, 1.5, 2.2, 9.0)


def draw(rows: Rows) -> Figure:
    """Ratios to nothing done, green where a transform helps and orange where it hurts; empty from 0.9 to 1.1."""
    found = ratios(rows)
    shown = [codes for codes in ("int4 token", "fp8 head") if any(row["codes"] == codes for row in rows)]
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    heights = [len(each) - 1 for each in TRANSFORMS.values()]
    grid = figure.subplots(2, len(shown), squeeze=False, height_ratios=heights)
    for line, (operand, transforms) in zip(grid, TRANSFORMS.items(), strict=True):
        names = [name for name in transforms if name != "none"]
        for axes, codes in zip(line, shown, strict=True):
            cells = np.array([[found.get((operand, codes, name, data), 1.0) for data in (*DATA, REAL)] for name in names])
            heat(axes, cells)
            axes.set_title(f"{' and '.join(operand.upper())}, {codes}", fontsize=9)
            axes.set_yticks(range(len(names)), names if axes is line[0] else [], fontsize=8)
            last = operand == "v"
            axes.set_xticks(range(len(DATA) + 1), (*DATA, REAL) if last else [], rotation=90, fontsize=8)
    return figure


def heat(axes: Axes, cells: np.ndarray) -> None:
    """A colour and a figure for each ratio that is not about 1."""
    step = np.digitize(cells, EDGES[1:-1])
    colour = np.where(step == 3, np.nan, np.where(step > 3, step - 1, step))
    axes.imshow(colour, cmap=STEPS, vmin=-0.5, vmax=5.5, aspect="auto", interpolation="none")
    for (row, column), x in np.ndenumerate(cells):
        if step[row, column] != 3:
            axes.text(column, row, f"{x:.1f}", ha="center", va="center", fontsize=7, color="#202020")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
