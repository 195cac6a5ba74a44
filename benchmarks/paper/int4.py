"""Where four bits hold: in which of Q, K and V, by which codes, and what the next bit buys.

Each operand is coded alone while the others and P stay in 16 bits, then all three are. Relative L1 errors against float64,
medians of five draws of 2048 tokens, or of the six layers of the sample; bits count scales and zeros.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import keys
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import Case, Rows, relative_l1

import tokquant as tq
from tokquant.activations import Activations, sample
from tokquant.evaluation import front
from tokquant.schemes.granularity import parse

DRAWS, TOKENS, QUERIES = 5, 2048, 128
DATA: dict[str, keys.Draw] = {
    "normal": keys.normals,
    "outlier channels": keys.outlier_channels,
    "RoPE and bias": keys.rope_biased,
}
REAL = "MiniLM"

GRANULARITIES: list[Any] = ["token", *({"group": n} for n in (64, 32, 16)), *({"channel_block": n} for n in (128, 64, 32))]
FP8 = ", fp8 scales"
TOGETHER = ("int8 token", "int4 token", "int4 group 32", "fp4_e2m1 group 16" + FP8)
SHOWN = (
    "int8 channel_block 128 asymmetric", "int8 token", "fp8_e4m3 token", "int4 token", "int4 token asymmetric",
    "int4 group 32 asymmetric", "int4 group 16 asymmetric", "int4 channel_block 128 asymmetric",
    "int4 channel_block 64 asymmetric", "int4 channel_block 32 asymmetric", "int4 channel_block 32 asymmetric" + FP8,
    "int4 channel_block 32", "fp4_e2m1 token", "fp4_e2m1 group 16" + FP8, "int2 group 32 asymmetric",
    "int2 channel_block 32 asymmetric",
)  # fmt: skip
OF_KEYS = (("k", "normal", 128), ("k", "outlier channels", 128), ("k", "RoPE and bias", 128), ("k", REAL, 32))
OF_VALUES = (("v", "normal", 128), ("v", "outlier channels", 128), ("v", REAL, 32))
BUDGETS = (0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Row:
    """One operand, or `qkv`, in one kind of codes on one kind of input."""

    data: str
    head_dim: int
    operand: str
    codes: str
    bits: float
    """A value at this head_dim; of `qkv`, the mean."""
    errors: list[float]
    """Of each draw or layer."""


def codes() -> Iterator[dict[str, Any]]:
    """What an operand is coded by."""
    yield coded("int8")
    yield coded("int8", {"channel_block": 128}, symmetric=False)
    yield coded("fp8_e4m3")
    for granularity in GRANULARITIES:
        for symmetric in (True, False):
            for scale_dtype in ("fp16", "fp8_e4m3"):
                yield coded("int4", granularity, symmetric, scale_dtype)
    yield coded("fp4_e2m1")
    for n in (32, 16):
        yield coded("fp4_e2m1", {"group": n}, scale_dtype="fp8_e4m3")
    for granularity in ("token", {"group": 32}, {"channel_block": 32}):
        yield coded("int2", granularity, symmetric=False)


def coded(precision: str, granularity: Any = "token", symmetric: bool = True, scale_dtype: str = "fp16") -> dict[str, Any]:
    return {"precision": precision, "granularity": granularity, "symmetric": symmetric, "scale_dtype": scale_dtype}


def name_of(codes: dict[str, Any]) -> str:
    words = f"{codes['precision']} {parse(codes['granularity'])}{'' if codes['symmetric'] else ' asymmetric'}"
    return words if codes["scale_dtype"] == "fp16" else words + FP8


def fits(operand: str, codes: dict[str, Any], head_dim: int) -> bool:
    """Whether the operand is measured in these codes: Q has no zeros, and blocks of its tokens serve nobody."""
    granularity = parse(codes["granularity"])
    if granularity.kind == "group" and head_dim % granularity.size:
        return False
    if operand == "qkv":
        return name_of(codes) in TOGETHER
    return operand != "q" or (codes["symmetric"] and granularity.kind != "channel_block")


def inputs(small: bool) -> Iterator[tuple[str, list[Case]]]:
    """Names of inputs, and the draws or layers of each."""
    n, rows, draws = (256, 32, 1) if small else (TOKENS, QUERIES, DRAWS)
    for d in (128,) if small else (64, 128):
        for name, draw in DATA.items():
            yield name, [Case(*draw(n, d, seed), rows=rows) for seed in range(draws)]
    layers = list(Activations(sample()).values())
    yield REAL, [Case(*layer) for layer in (layers[:1] if small else layers)]


def measure(small: bool) -> Iterator[Row]:
    """Every kind of codes for every operand on every input that differs for it."""
    plain = {"precision": "fp16"}
    for data, cases in inputs(small):
        d = cases[0].q.shape[3]
        for operand in ("q", "k", "qkv") if data == "RoPE and bias" else ("q", "k", "v", "qkv"):
            for how in codes():
                if fits(operand, how, d):
                    scheme = tq.QuantScheme(**{role: how if role in operand else plain for role in "qkv"}, p=plain)
                    bits = [each for role, each in scheme.bits_per_value(d).items() if role in operand]
                    yield Row(data, d, operand, name_of(how), sum(bits) / len(bits), relative_l1(cases, scheme))


def table(rows: Rows) -> str:
    """Errors by codes, the least bits for an error, and what Q, K and V err together."""
    found = {(row["operand"], row["data"], row["head_dim"], row["codes"]): median(row["errors"]) for row in rows}
    bits = {row["codes"]: row["bits"] for row in rows if (row["operand"], row["head_dim"]) == ("k", 128)}
    inputs = (*OF_KEYS, *OF_VALUES)
    lines = ["", "| codes of K or V | bits | " + " | ".join(f"{o.upper()}, {data}" for o, data, _ in inputs) + " |"]
    lines += ["|---|---|" + "---|" * len(inputs)]
    for name in SHOWN:
        lines.append(f"| {name} | {bits[name]:.4g} | " + " | ".join(f"{found[*each, name]:.1%}" for each in inputs) + " |")

    lines += ["", "| least bits for an error of at most | 10 % | 3 % | 1 % |", "|---|---|---|---|"]
    for each in (("q", "normal", 128), *inputs):
        those = [row for row in rows if (row["operand"], row["data"], row["head_dim"]) == each]
        cells = " | ".join(least_bits(those, budget) for budget in BUDGETS)
        lines.append(f"| {each[0].upper()}, {each[1]} | {cells} |")

    lines += ["", "| Q, K and V | " + " | ".join(data for _, data, _ in OF_KEYS) + " |", "|---|" + "---|" * len(OF_KEYS)]
    for name in TOGETHER:
        cells = " | ".join(f"{found['qkv', data, d, name]:.1%} ({alone(found, data, d, name):.1%})" for _, data, d in OF_KEYS)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def alone(found: dict[tuple[str, str, int, str], float], data: str, head_dim: int, codes: str) -> float:
    """The root of the sum of squares of what Q, K and V err alone; RoPE leaves V as normal ones are."""
    values = found.get(("v", data, head_dim, codes), found["v", "normal", 128, codes])
    return math.hypot(found["q", data, head_dim, codes], found["k", data, head_dim, codes], values)


def least_bits(rows: Rows, budget: float) -> str:
    """The fewest bits whose error is within the budget, and their codes."""
    bits, errors = (np.array(x) for x in zip(*((row["bits"], median(row["errors"])) for row in rows), strict=True))
    options = front.of_options(bits, errors)
    at = options.cheapest(budget)
    return "none" if at is None else f"{options.cost[at]:.4g}: {rows[options.choice[at, 0]]['codes']}"


LINES = (
    ("int4 per token and group, with zeros", "o-", "C0", True, lambda name: name.startswith(("int4 token", "int4 group"))),
    ("int4 per channel_block, with zeros", "o-", "C1", True, lambda name: name.startswith("int4 channel")),
    ("int2, with zeros", "s", "C3", True, lambda name: name.startswith("int2")),
    ("int4 per token and group", "o--", "C0", False, lambda name: name.startswith(("int4 token", "int4 group"))),
    ("int4 per channel_block", "o--", "C1", False, lambda name: name.startswith("int4 channel")),
    ("fp4", "s", "C2", False, lambda name: name.startswith("fp4")),
)
"""A label, style and colour for codes with zeros or without, and which they are."""


def draw(rows: Rows) -> Figure:
    """Error against bits; of int4 what has fp16 scales."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for place, (operand, data, d) in zip(axes.flat, (*OF_KEYS[1:], OF_VALUES[-1]), strict=True):
        those = [row for row in rows if (row["operand"], row["data"], row["head_dim"]) == (operand, data, d)]
        curves(place, those)
        place.set_title(f"{operand.upper()}, {data}", fontsize=9)
        place.set_xlabel("bits a value, scales included")
        place.set_ylabel("relative L1 error")
        place.label_outer()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def curves(axes: Axes, rows: Rows) -> None:
    """Kinds of codes as lines, int8 per token as a level."""
    for label, style, colour, zeros, belongs in LINES:
        those = [row for row in rows if belongs(row["codes"]) and ("asymmetric" in row["codes"]) == zeros]
        kept = sorted(
            (row["bits"], median(row["errors"])) for row in those if "int4" not in row["codes"] or FP8 not in row["codes"]
        )
        axes.plot(*zip(*kept, strict=True), style, ms=4, lw=1, color=colour, mfc=colour if zeros else "none", label=label)
    [eight] = [median(row["errors"]) for row in rows if row["codes"] == "int8 token"]
    axes.axhline(eight, color="#808080", lw=1)
    axes.text(6.1, eight * 1.1, "int8 token, 8 bits", ha="right", va="bottom", fontsize=7)
    for budget in BUDGETS:
        axes.axhline(budget, color="#808080", lw=0.6, ls=":")
    axes.set(yscale="log", xlim=(2, 6.2), ylim=(0.0012, 3))
    axes.set_yticks([0.003, 0.01, 0.03, 0.1, 0.3, 1], ["0.3 %", "1 %", "3 %", "10 %", "30 %", "100 %"])
    axes.minorticks_off()
