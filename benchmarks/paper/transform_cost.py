"""What transforms cost: the time to quantize Q, K and V with each over the time with none, and bits.

The scheme is `int8` without its smoothing, 8 heads of 1024 tokens and 128 channels in float16. Medians of
the process's own time on processors, taken in turn, beside attention itself on the codes.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import transforms
from study import Rows, normal

import tokquant as tq
from tokquant.attention import choose_backend
from tokquant.evaluation.costs import scales_for
from tokquant.tensor import Coded

Codes = tuple[Coded, Coded, Coded]

BACKEND = choose_backend("auto", torch.device("cpu"))
HEADS, TOKENS, HEAD_DIM, RUNS = 8, 1024, 128, 101
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
    """Time relative to quantization without a transform."""
    bits: float
    """Bits per value of Q, K and V, with scales and all else that is stored besides codes."""


def measure(small: bool) -> Iterator[Row]:
    """Quantization with every transform, and attention."""
    shape = (1, 2, 256, HEAD_DIM) if small else (1, HEADS, TOKENS, HEAD_DIM)
    q, k, v = (normal(*shape, seed=seed) for seed in range(3))
    names = list(dict.fromkeys(name for each in transforms.TRANSFORMS.values() for name in each))[: 2 if small else None]

    def quantize(name: str) -> Callable[[], Codes]:
        made = scheme(name)
        return partial(tq.quantize, q, k, v, made, scales=scales_for(made, q, k, v))

    functions = {name: quantize(name) for name in names}
    codes = {name: function() for name, function in functions.items()}
    attend = partial(tq.attention, *codes["none"], scheme("none"))
    times = medians([*functions.values(), attend], 3 if small else RUNS)
    for name, ms in zip([*names, "attention"], times, strict=True):
        kept = codes.get(name, codes["none"])
        bits = 8 * sum(x.nbytes for x in kept) / sum(x.shape.numel() for x in kept)
        yield Row(name, round(ms, 3), round(ms / times[0], 3), round(bits, 3))


def medians(functions: list[Callable[[], object]], runs: int) -> list[float]:
    """Milliseconds of each; all in each run, in another order."""
    times: list[list[float]] = [[] for _ in functions]
    order = random.Random(0)
    for _ in range(runs):
        for place in order.sample(range(len(functions)), len(functions)):
            start = time.process_time()
            functions[place]()
            times[place].append(1e3 * (time.process_time() - start))
    return [median(each) for each in times]


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
