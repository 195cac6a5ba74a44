"""What does each way to scale V and P cost, and what does it buy on real activations?

Q and K are those of `int8`. Instructions a score are those of the loop over whole key tiles in the first launch that tuning
tries, counted in machine code for sm_90 at head_dim 128: a count, not a time. Times are of the C++ kernel on codes, one thread,
float32, 2 heads of 1024 tokens of 128 channels, over those of V per tensor: medians of 30 runs in turn, of processor time,
which does not count what others run meanwhile. What is there twice says what noise is left.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from axes import percents
from matplotlib.figure import Figure
from study import Rows, of_heads, real
from values import INT8, Granularity, p_of, scheme

import tokquant as tq
from tokquant.kernels.cpu import launch
from tokquant.quantize import quantize_operands

BACKEND = "cpu"
HEAD_DIM, TOKENS = 128, 1024
RUNS = 30

UNIT = {"precision": "int8"}
K = INT8 | {"smooth": "mean"}


@dataclass(frozen=True)
class Row:
    """One way to code V and P."""

    v: str
    p: str
    bits: float
    """Bits per value of V, scales included."""
    tile: str
    """Queries x keys of a block, and its warps."""
    instructions: float
    """Instructions per score."""
    spilled: int
    """Bytes of a thread's stack, which spilled registers take."""
    time: float
    """Relative to V per tensor."""
    rel_l1: float
    """On the package's sample activations: the mean over heads; `least` and `most` are over heads too."""
    least: float
    most: float


def schemes() -> list[tq.QuantScheme]:
    """V per tensor, which times are relative to, twice, so that the second shows the noise; then all others."""
    whole = {"q": INT8, "k": K}
    granularities: list[Granularity] = [
        "head", {"block": 128}, "channel", {"channel_block": 128}, {"channel_block": 64}, {"channel_block": 32}, "token",
        {"group": 32},
    ]  # fmt: skip
    tiles = [{"precision": kind, "granularity": {"row_block": n}} for n in (32, 64, 128, 256) for kind in ("int8", "uint8")]
    fp8 = {"precision": "fp8_e4m3"}
    return [
        *(scheme("tensor", p_of("tensor"), **whole) for _ in range(2)),
        *(scheme(v, p_of(v), **whole) for v in granularities),
        scheme({"channel_block": 128}, p_of("channel"), smooth="mean", **whole),
        scheme("token", p_of("token"), rotate_v="hadamard", **whole),
        *(scheme(v, UNIT, **whole) for v in ("head", "channel", "token")),
        scheme("channel", {"precision": "uint8"}, **whole),
        *(scheme("channel", p, **whole) for p in tiles if p != p_of("channel")),
        *(scheme(v, p_of(v), precision="int4", **whole) for v in ("channel", {"channel_block": 128}, "token")),
        *(scheme(v, fp8, precision="fp8_e4m3", **whole) for v in ("head", "channel", {"channel_block": 128}, "token")),
        scheme("channel", {"precision": "fp8_e5m2"}, precision="fp8_e4m3", **whole),
        tq.preset("int8-fp16").model_copy(update={"k": tq.preset("int8").k}),
    ]


def measure(small: bool) -> Iterator[Row]:
    """Counts, times and errors of each."""
    every = schemes()[:2] if small else schemes()
    times = seconds(every, 256 if small else TOKENS)
    cases = real()[:1] if small else real()
    for each, taken in zip(every, times, strict=True):
        kernel = tq.compile(each, head_dim=HEAD_DIM, target="sm_90")
        found, config = kernel.resources, kernel.config
        yield Row(
            v=f"{each.v}{' rotated' if each.rotate_v != 'none' else ''}",
            p=f"{each.p.precision} {each.p.granularity}",
            bits=each.v.bits_per_value(HEAD_DIM),
            tile=f"{config.block_m} x {config.block_n}, {config.num_warps} warps",
            instructions=found.instructions_per_score,
            spilled=found.spill_bytes,
            time=taken / times[0],
            **of_heads(cases, each),
        )


def seconds(every: list[tq.QuantScheme], tokens: int) -> list[float]:
    """Median processor time of attention by each scheme."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, 2, tokens, HEAD_DIM, generator=generator) for _ in "qkv"]
    calls = []
    for each in every:
        codes = launch.packed(quantize_operands(*operands, each), each)
        calls.append(partial(tq.attention, *codes, each, backend="cpu"))
    rounds = [[processor_time(call) for call in calls] for _ in range(RUNS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def processor_time(call: Callable[[], Any]) -> float:
    """Processor time in seconds; runs follow one another directly, so that the codes are in the caches."""
    call()
    start = time.process_time()
    call()
    return time.process_time() - start


def table(rows: Rows) -> str:
    """One row for each."""
    names = ["V", "P", "bits of V", "instructions a score", "tile", "spilled", "time on a CPU", "real activations"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        error = f"{row['rel_l1']:.2%} ({row['least']:.2%} to {row['most']:.2%})"
        words = f"{row['v']} | {row['p']} | {row['bits']:.3f} | {row['instructions']:.1f} | {row['tile']} | {row['spilled']}"
        lines.append(f"| {words} | {row['time']:.2f} | {error} |")
    return "\n".join(lines)


NAMES = {
    ("int8 head", "int8 unit"): "head, int8 unit (INT-FlashAttention)",
    ("int8 channel", "uint8 unit"): "channel, uint8 unit",
    ("int8 channel", "int8 row_block 128"): "channel, int8 128",
    ("int8 channel", "int8 row_block 256"): "channel, int8 256",
    ("int8 channel", "uint8 row_block 256"): "channel, uint8 256",
    ("int8 channel", "uint8 row_block 128"): "channel, uint8 128",
    ("int8 channel_block 128 less mean", "uint8 row_block 128"): "the preset int8",
    ("int8 channel_block 64", "uint8 row_block 64"): "channel_block 64, uint8 64",
    ("int8 channel_block 32", "uint8 row_block 32"): "channel_block 32, uint8 32",
    ("int8 token", "uint8 row_block 128"): "token, uint8 128",
    ("int8 token", "int8 unit"): "token, int8 unit",
    ("fp8_e4m3 channel", "fp8_e4m3 unit"): "e4m3",
    ("fp16", "fp16 unit"): "V and P in 16 bits",
    ("int4 token", "uint8 row_block 128"): "int4 token, uint8 128",
    ("int4 channel_block 128", "uint8 row_block 128"): "int4 channel_block 128, uint8 128",
}
"""What is drawn, by V and P."""
LEFT = ("channel, int8 128", "channel_block 32, uint8 32", "e4m3")
"""Names that stand to the left of their points."""


def draw(rows: Rows) -> Figure:
    """Errors against instructions."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if name := NAMES.get((row["v"], row["p"])):
            at, colour = (row["instructions"], row["rel_l1"]), {"int8": "C0", "int4": "C2"}.get(row["v"][:4], "C1")
            side: dict[str, Any] = {"xytext": (-5, 0), "ha": "right"} if name in LEFT else {"xytext": (5, 0)}
            axes.plot(*at, "o", ms=4, color=colour)
            axes.annotate(name, at, textcoords="offset points", va="center", fontsize=7.5, color=colour, **side)
    axes.set(xlabel="instructions a score, sm_90", xlim=(7, 32), yscale="log", ylabel="relative L1 error on real activations")
    percents(axes.yaxis, [0.005, 0.01, 0.02, 0.05])
    return figure
