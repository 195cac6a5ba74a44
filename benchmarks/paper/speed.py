"""Batch 4, 32 heads of 64 channels, 1k to 16k tokens, as in INT-FlashAttention's table of speed.

The paper finds its kernel to take 31, 52, 66, 72 and 73 % less time than FlashAttention in FP16 at 1k, 2k, 4k, 8k and 16k
tokens on an RTX 4090. Here each scheme is timed beside every way in which torch can be asked for the same, in turn in one
process, and compared with the fastest of those. On a CPU, 8k and 16k tokens are those of one sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from axes import short
from matplotlib.figure import Figure
from study import Rows, grouped

from tokquant.attention import choose_backend
from tokquant.evaluation import bench

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = choose_backend("auto", DEVICE)
SCHEMES = ["int-flash-half", "int-flash", "int8", "fp8"]


@dataclass(frozen=True)
class Row:
    """One provider at one length."""

    tokens: int
    batch: int
    heads: int
    provider: str
    ms: float
    less: float
    """Time saved, as a share of the time of torch's fastest."""
    peer: str


def measure(small: bool) -> Iterator[Row]:
    """Medians of interleaved repeats, on codes and with quantization."""
    for n in [128] if small else [1024, 2048, 4096, 8192, 16384]:
        batch, heads = (1, 2) if small else (1 if n > 4096 and DEVICE.type == "cpu" else 4, 32)
        shape = bench.Shape(batch, heads, heads, n, n, 64, causal=False)
        found = bench.attention(shape, SCHEMES, device=DEVICE, repeats=3 if n > 4096 else 7)
        for row in found.rows:
            if row.ratio is not None:
                yield Row(n, batch, heads, row.provider, row.ms, 1 - 1 / row.ratio, found.peer)


def table(rows: Rows) -> str:
    """Providers by length: how much less time than the fastest of torch's."""
    lengths = [length for (length,), _ in grouped(rows, "tokens")]
    lines = ["| provider | " + " | ".join(f"{n} tokens" for n in lengths) + " |", "|---" * (1 + len(lengths)) + "|"]
    for (provider,), those in grouped(rows, "provider"):
        cells = {row["tokens"]: f"{row['ms']:.1f} ms, {row['less']:+.0%}" for row in those}
        lines.append(f"| {provider} | " + " | ".join(cells.get(n, "") for n in lengths) + " |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """Less time than the fastest of torch's, by length."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(SCHEMES):
        for suffix, style in (("", "-"), (", with quantization", ":")):
            those = [row for row in rows if row["provider"] == name + suffix]
            x, y = [row["tokens"] for row in those], [100 * row["less"] for row in those]
            axes.plot(x, y, f"o{style}", ms=3, color=f"C{number}", label=name if not suffix else None)
    axes.plot([], [], ":", color="#808080", label="with quantization")
    lengths = [length for (length,), _ in grouped(rows, "tokens")]
    axes.set(xscale="log", xlabel="tokens", ylabel="less time than the fastest of torch's, %", ylim=(0, 100))
    axes.set_xticks(lengths, map(short, lengths))
    axes.minorticks_off()
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    return figure
