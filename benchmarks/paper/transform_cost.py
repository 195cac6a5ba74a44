"""What transforms cost: the time to quantize Q, K and V with each over the time with none, and the bits that stay what they were.

The scheme is `int8` without its smoothing, 8 heads of 4096 tokens and 128 channels in float16; medians of runs in turn on one
machine, beside attention itself on the codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transforms
from study import Rows, normal

import tokquant as tq
from tokquant.evaluation.trials import scales_for
from tokquant.timing import interleaved_medians

HEADS, TOKENS, HEAD_DIM, RUNS = 8, 4096, 128, 21
CODES = {
    "q": {"precision": "int8"},
    "k": {"precision": "int8"},
    "v": {"precision": "int8", "granularity": {"channel_block": 128}},
    "p": {"precision": "uint8", "granularity": {"row_block": 128}},
}


@dataclass(frozen=True)
class Row:
    """One transform, or `attention` on the codes."""

    what: str
    ms: float
    ratio: float
    """To quantization with no transform."""
    bits: float
    """A value of Q, K and V, with all that is kept beside their codes."""


def measure(small: bool) -> Iterator[Row]:
    """Quantization with every transform in turn."""
    shape = (1, 2, 256, HEAD_DIM) if small else (1, HEADS, TOKENS, HEAD_DIM)
    q, k, v = (normal(*shape, seed=seed) for seed in range(3))
    known = (
        dict.fromkeys(["none", "mean of K"])
        if small
        else {name: None for each in transforms.TRANSFORMS.values() for name in each}
    )
    schemes = {name: scheme(name) for name in known}
    scales = {name: scales_for(each, q, k, v) for name, each in schemes.items()}
    codes = {name: tq.quantize(q, k, v, each, scales=scales[name]) for name, each in schemes.items()}

    def quantize(name: str):
        return lambda: tq.quantize(q, k, v, schemes[name], scales=scales[name])

    runs = [quantize(name) for name in schemes] + [lambda: tq.attention(*codes["none"], schemes["none"])]
    found = interleaved_medians(runs, 3 if small else RUNS, torch.device("cpu"))
    for name, ms in zip([*schemes, "attention"], found, strict=True):
        kept = codes[name if name in codes else "none"]
        bits = 8 * sum(x.nbytes for x in kept) / sum(x.shape.numel() for x in kept)
        yield Row(name, round(ms, 3), round(ms / found[0], 3), round(bits, 3))


def scheme(transform: str) -> tq.QuantScheme:
    """The codes with what the transform changes."""
    [changes] = [each[transform] for each in transforms.TRANSFORMS.values() if transform in each][:1]
    return tq.QuantScheme(**changes | {role: codes | changes.get(role, {}) for role, codes in CODES.items()})


def table(rows: Rows) -> str:
    """Times, ratios and bits."""
    lines = ["", "| | ms | to none | bits a value |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['bits']:.2f} |" for row in rows]
    return "\n".join(lines)


draw = None
