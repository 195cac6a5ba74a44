"""How finely should V be scaled? Every granularity by what V is like, in int8, e4m3 and int4, with P as each suits.

Scores are exact (`q` is fp32) except in whole schemes, so that what is lost is V's and P's; P exact leaves V's alone. Normal Q
and K, scores times D^-1/2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from axes import named_line, percents, thousands
from matplotlib.figure import Figure
from study import Case, Rows, grouped, normal, of_heads, outliers, real, token_scaled, uniform
from torch import Tensor

import tokquant as tq

HEAD_DIM, HEADS, QUERIES = 64, 8, 128
TOKENS = 4096

Granularity = str | dict[str, int]
GRANULARITIES: list[Granularity] = [
    "tensor", "head", {"block": 128}, "channel", {"channel_block": 128}, {"channel_block": 64}, {"channel_block": 32},
    "token", {"group": 32},
]  # fmt: skip
INT8 = {"precision": "int8"}
UNIT = {"precision": "int8"}
EXACT = {"precision": "fp32"}
TOKEN_SCALED = "token-scaled"


@dataclass(frozen=True)
class Row:
    """One way to code V and P on one kind of V."""

    data: str
    sigma: float
    """Standard deviation of the logarithm of the factors that V's tokens are multiplied by."""
    tokens: int
    at_heaviest: float
    """Largest |V| of the token that a query weighs most, over the mean of that over its head: mean over queries."""
    first: float
    """Share of the queries for which that token is the first."""
    scheme: str
    q: str
    v: str
    p: str
    rel_l1: float
    """Mean over heads, each a draw; then the least and the most."""
    least: float
    most: float


def measure(small: bool) -> Iterator[Row]:
    """Every way on every kind of V; some over what tokens are multiplied by; whole schemes over lengths."""
    tokens, heads = (256, 2) if small else (TOKENS, HEADS)
    shape = (1, heads, tokens, HEAD_DIM)
    means = normal(1, heads, 1, HEAD_DIM, seed=4)
    kinds = {"normal": normal, "uniform": uniform, "outlier channels": outliers}
    for data, draw in kinds.items():
        yield from found([of_values(draw(*shape, seed=3))], [*every(), *whole()], data)
    for data, cases in (
        ("normal with means", [of_values(normal(*shape, seed=3) + means)]),
        ("real", real()[:1] if small else real()),
    ):
        yield from found(cases, [*every(), *every(smooth="mean"), *whole()], data)
    for sigma in (0, 1, 2) if small else (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2):
        schemes = every() if sigma == 1 else [scheme(v, p_of(v)) for v in GRANULARITIES]
        yield from found([of_values(token_scaled(*shape, seed=3, sigma=sigma))], schemes, TOKEN_SCALED, sigma)
    for n in (256,) if small else (1024, 2048, 4096, 8192, 16384):
        v = token_scaled(1, heads, n, HEAD_DIM, seed=3)
        yield from found([of_values(v)], whole(), TOKEN_SCALED, 1)


def of_values(v: Tensor) -> Case:
    """Some queries that attend to V `[1, H, N, D]` by normal Q and K."""
    _, heads, n, d = v.shape
    return Case(normal(1, heads, QUERIES, d, seed=1), normal(1, heads, n, d, seed=2), v, rows=None)


def every(**more: str) -> list[tq.QuantScheme]:
    """All ways to code V and P; `more` is of V."""
    return [
        *(scheme(v, p, **more) for v in GRANULARITIES for p in (EXACT, p_of(v), UNIT)),
        *(scheme("token", p, rotate_v="hadamard", **more) for p in (EXACT, p_of("token"), UNIT)),
        *(scheme(v, {"precision": "fp8_e4m3"}, precision="fp8_e4m3", **more) for v in GRANULARITIES),
        *(scheme(v, p_of(v), precision="int4", **more) for v in GRANULARITIES),
    ]


def whole() -> list[tq.QuantScheme]:
    """Scores in int8 too: presets, and V of `int8` scaled in other ways."""
    finer: list[Granularity] = ["head", "channel", {"channel_block": 64}, {"channel_block": 32}, "token"]
    k = INT8 | {"smooth": "mean"}
    cached = tq.preset("kv-int8")
    return [
        *map(tq.preset, ("int-flash", "int-flash-half", "kv-int8", "int8")),
        cached.model_copy(update={"name": "kv-int8, uint8 P", "p": tq.preset("int8").p}),
        *(scheme(v, p_of(v), q=INT8, k=k, smooth="none" if v == "token" else "mean") for v in finer),
        scheme("token", p_of("token"), q=INT8, k=k, rotate_v="hadamard"),
    ]


def scheme(
    v: Granularity,
    p: dict[str, Any],
    *,
    q: dict[str, Any] = EXACT,
    k: dict[str, Any] = EXACT,
    precision: str = "int8",
    smooth: str = "none",
    rotate_v: Any = "none",
) -> tq.QuantScheme:
    """V at this granularity, everything else as it is given."""
    of_v = {"precision": precision, "granularity": v, "smooth": smooth}
    return tq.QuantScheme(q=q, k=k, v=of_v, p=p, rotate_v=rotate_v)


def p_of(v: Granularity) -> dict[str, Any]:
    """P as `int8` has it, in tiles no longer than V's blocks; signed where V is decoded, which is what kernels multiply."""
    grouped = isinstance(v, dict) and "group" in v
    tile = min(128, v.get("channel_block", 128)) if isinstance(v, dict) else 128
    return {"precision": "int8" if grouped else "uint8", "granularity": {"row_block": tile}}


def found(cases: list[Case], schemes: list[tq.QuantScheme], data: str, sigma: float = 0) -> Iterator[Row]:
    """A row for each scheme."""
    heaviest, first = map(mean, zip(*(each for case in cases for each in at_heaviest(case)), strict=True))
    tokens = cases[0].k.shape[2]
    for each in schemes:
        v = f"{each.v}{' rotated' if each.rotate_v != 'none' else ''}"
        words = {"scheme": each.name, "q": str(each.q), "v": v, "p": f"{each.p.precision} {each.p.granularity}"}
        yield Row(data, sigma, tokens, heaviest, first, **words, **of_heads(cases, each))


def at_heaviest(case: Case) -> Iterator[tuple[float, float]]:
    """Of each head, as a Row has them."""
    heaviest = torch.cat([p.argmax(dim=-1) for p in case.weights()], dim=2)
    largest = case.v.double().abs().amax(dim=-1)  # [B, H, N]
    relative = (largest / largest.mean(dim=-1, keepdim=True)).gather(2, heaviest)
    first = (heaviest == 0).double()
    yield from zip(*(x.mean(dim=(0, 2)).tolist() for x in (relative, first)), strict=True)


def table(rows: Rows) -> str:
    """A table for each kind of V."""
    lines = []
    for (data, sigma, tokens), those in grouped(rows, "data", "sigma", "tokens"):
        title = f"{data}{f', sigma {sigma:g}' if data == TOKEN_SCALED else ''}, {tokens} tokens"
        lines += [f"\n{title}: V at the heaviest key {those[0]['at_heaviest']:.2f} of the mean\n"]
        lines += ["| scheme | q | V | P | relative L1 | over heads |", "|---|---|---|---|---|---|"]
        for row in those:
            words = " | ".join(row[name] for name in ("scheme", "q", "v", "p"))
            lines.append(f"| {words} | {row['rel_l1']:.2%} | {row['least']:.2%} to {row['most']:.2%} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """Errors by how far tokens differ in size, and of whole schemes by length."""
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    by_sigma, by_length = figure.subplots(1, 2, sharey=True)
    scaled = [row for row in rows if row["data"] == TOKEN_SCALED]
    for granularity, up in (
        ("head", 0), ("block 128", 0), ("channel", 0), ("channel_block 128", 0), ("channel_block 32", -4), ("token", 5)
    ):  # fmt: skip
        those = [row for row in scaled if row["q"] == "fp32" and row["v"] == f"int8 {granularity}" and "uint8" in row["p"]]
        named_line(by_sigma, [row["sigma"] for row in those], [row["rel_l1"] for row in those], granularity, up)
    by_sigma.set(xlabel="how far tokens of V differ in size (sigma)", ylabel="relative L1 error", yscale="log")
    by_sigma.set_title("int8 V by its scales, scores exact", fontsize=9)
    percents(by_sigma.yaxis, [0.01, 0.02, 0.05, 0.1, 0.2])
    for scheme, v, label in (
        ("int-flash", "int8 head", "int-flash"),
        ("int8", "int8 channel_block 128 less mean", "int8"),
        ("custom", "int8 token", "int8, V per token"),
        ("int-flash-half", "fp16", "V and P in 16 bits"),
    ):
        those = [row for row in scaled if row["q"] != "fp32" and (row["scheme"], row["v"]) == (scheme, v)]
        named_line(by_length, [row["tokens"] for row in those], [row["rel_l1"] for row in those], label)
    by_length.set(xlabel="tokens", xscale="log")
    by_length.set_title("whole schemes, sigma 1", fontsize=9)
    thousands(by_length.xaxis, [row["tokens"] for row in those])
    return figure
