"""How many levels should P have, and against which maximum? By length, by how peaked rows are, and by what V is.

Scores are exact. V of fp16 leaves P's error alone, P of fp32 V's alone. A query of `hot key` weighs one key by half, and the
others as a flat row does. Where channels of V have means, they are also taken out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from axes import named_line, percents, thousands
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import Case, Rows, grouped, normal, of_heads, real

import tokquant as tq

HEAD_DIM, HEADS, QUERIES = 64, 8, 64
WITH_MEANS = 1024
"""Tokens up to which V is also tried with means."""

EXACT = {"precision": "fp32"}
FP16 = {"precision": "fp16"}
FORMS: list[dict[str, Any]] = [
    *({"precision": precision} for precision in ("int8", "uint8", "fp8_e4m3", "fp8_e5m2", "fp16")),
    *(
        {"precision": precision, "granularity": {"row_block": tile}}
        for precision in ("int8", "uint8")
        for tile in (32, 64, 128, 256)
    ),
]
"""Of P."""


@dataclass(frozen=True)
class Row:
    """One way to code P, beside one of V."""

    rows: str
    tokens: int
    keys: float
    """2^entropy: about how many keys a query looks at; the mean over queries."""
    p: str
    normalizer: str
    v: str
    rel_l1: float
    """Mean over heads, each a draw; then the least and the most."""
    least: float
    most: float


def measure(small: bool) -> Iterator[Row]:
    """Every P beside V in fp16 and in int8, with both normalizers; V's error alone."""
    for n in (256,) if small else (256, 1024, 4096, 16384):
        for rows, case in kinds(n).items():
            yield from found(rows, [case])
    yield from found("real", real()[:1] if small else real())


def kinds(n: int) -> dict[str, Case]:
    """Queries over n keys, by what their rows of P are like."""
    q, k, v = (normal(1, HEADS, tokens, HEAD_DIM, seed=seed) for seed, tokens in enumerate((QUERIES, n, n)))
    means = normal(1, HEADS, 1, HEAD_DIM, seed=4)
    hot_q, hot_k = q.clone(), k.clone()
    # one channel of Q is constant, and K has nothing there but at one key: it weighs what all others, of normal scores, weigh
    hot_q[..., 0], hot_k[..., 0] = 4, 0
    hot_k[:, :, n // 3, 0] = (math.log(n) + 0.5) * HEAD_DIM**0.5 / 4
    found = {
        "flat": Case(q, k, v, rows=None),
        "peaked": Case(q, k, v, rows=None, scale=1.0),
        "hot key": Case(hot_q, hot_k, v, rows=None),
    }
    if n <= WITH_MEANS:
        found["flat, V with means"] = Case(q, k, v + means, rows=None)
        found["hot key, V with means"] = Case(hot_q, hot_k, v + means, rows=None)
    return found


def found(rows: str, cases: list[Case]) -> Iterator[Row]:
    """A row for each way to code P and V."""
    keys, tokens = sum(map(looked_at, cases)) / len(cases), cases[0].k.shape[2]
    schemes = [scheme(p, bytes_beside(p)) for p in (EXACT, *FORMS)]
    schemes += [scheme(p, FP16, normalizer) for p in FORMS for normalizer in ("exact", "quantized")]
    if rows == "real" or "means" in rows:
        schemes += [scheme(p, FP16 | {"smooth": "mean"}) for p in FORMS]
    for each in schemes:
        p, v = f"{each.p.precision} {each.p.granularity}", f"{each.v}"
        v += " less mean" if each.v.smooth == "mean" and not each.v.scaled else ""
        yield Row(rows, tokens, keys, p, each.normalizer, v, **of_heads(cases, each))


def scheme(p: dict[str, Any], v: dict[str, Any], normalizer: Any = "exact") -> tq.QuantScheme:
    """Exact scores."""
    return tq.QuantScheme(q=EXACT, k=EXACT, v=v, p=p, normalizer=normalizer)


def bytes_beside(p: dict[str, Any]) -> dict[str, Any]:
    """V as `int8` has it, in blocks that are whole tiles of P; e4m3 beside floats of 8 bits, as a GPU multiplies."""
    if p["precision"].startswith("fp8"):
        return {"precision": "fp8_e4m3", "granularity": "channel"}
    block = max(128, p.get("granularity", {}).get("row_block", 128))
    return {"precision": "int8", "granularity": {"channel_block": block}, "smooth": "mean"}


def looked_at(case: Case) -> float:
    """2^entropy of the weights, the mean over queries."""
    return torch.cat([torch.special.entr(p).sum(dim=-1).exp() for p in case.weights()], dim=2).mean().item()


def table(rows: Rows) -> str:
    """A table for each kind of rows and length."""
    lines = []
    for (kind, tokens), those in grouped(rows, "rows", "tokens"):
        lines += [f"\n{kind}, {tokens} tokens, of which a query looks at {those[0]['keys']:.0f}\n"]
        lines += ["| P | normalizer | V | relative L1 | over heads |", "|---|---|---|---|---|"]
        for row in those:
            words = " | ".join(row[name] for name in ("p", "normalizer", "v"))
            lines.append(f"| {words} | {row['rel_l1']:.2%} | {row['least']:.2%} to {row['most']:.2%} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """P's error by length, for three kinds of rows."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    titles = {"flat": "flat rows", "hot key": "a hot key and a long tail", "peaked": "peaked rows"}
    alone = [row for row in rows if row["v"] == "fp16"]

    def line(axes: Axes, kind: str, p: str, label: str = "", normalizer: str = "exact", up: float = 0, **style: Any) -> None:
        those = [row for row in alone if (row["rows"], row["p"], row["normalizer"]) == (kind, p, normalizer)]
        named_line(axes, [row["tokens"] for row in those], [row["rel_l1"] for row in those], label, up, **style)
        thousands(axes.xaxis, [row["tokens"] for row in those])

    for axes, kind in zip(figure.subplots(1, 3, sharey=True), titles, strict=True):
        axes.set(xlabel="tokens", xscale="log", yscale="log", ylim=(0.0003, 0.6))
        axes.set_title(titles[kind], fontsize=9)
        for p, up in (
            ("int8 unit", 5), ("uint8 unit", -5), ("int8 row_block 128", 3), ("uint8 row_block 128", -3),
            ("fp8_e4m3 unit", 0), ("fp8_e5m2 unit", 5),
        ):  # fmt: skip
            line(axes, kind, p, p if kind == "peaked" else "", up=up)
        if kind == "hot key":
            line(axes, kind, "int8 unit", normalizer="quantized", ls=":", color="C0")
            axes.text(0.03, 0.97, "int8 unit, normalizer quantized", transform=axes.transAxes, fontsize=7.5, color="C0")
        percents(axes.yaxis, [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    figure.axes[0].set_ylabel("relative L1 error, V in 16 bits")
    return figure
