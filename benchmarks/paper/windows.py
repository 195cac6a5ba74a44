"""What 16-bit windows of a KV cache save: the first tokens, and the newest, beside four or two bits for the rest.

Decoding of the 16 newest queries. Relative L1 errors against float64, medians of five draws of 2048 tokens, or of the six
layers of the sample, 512 tokens, read causally; bits are those of K and V with the windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median

import keys
import torch
from study import Case, Rows, changed, grouped

import tokquant as tq
from tokquant.activations import Activations, sample
from tokquant.metrics import errors

DRAWS, TOKENS, QUERIES, HEAD_DIM = 5, 2048, 16, 128
SCHEMES = ("kv-int4", "kv-int4-kivi", "kv-int2-kivi")
WINDOWS = ((0, 0), (4, 0), (0, 32), (0, 128), (4, 128))
DATA: dict[str, keys.Draw] = {"normal": keys.normals, "sink and near tokens": keys.sink_and_near}
REAL = "MiniLM"


@dataclass(frozen=True)
class Row:
    """One preset with one pair of windows on one input."""

    data: str
    scheme: str
    sink: int
    recent: int
    bits: float
    weight: float
    """The share of attention that falls on the windows."""
    errors: list[float]


def inputs(small: bool) -> Iterator[tuple[str, list[Case]]]:
    """Names of inputs, and the draws or layers of each: the newest queries alone."""
    for name, draw in DATA.items():
        drawn = [draw(512 if small else TOKENS, HEAD_DIM, seed) for seed in range(1 if small else DRAWS)]
        yield name, [Case(q[:, :, -QUERIES:], k, v, rows=None, causal=True) for q, k, v in drawn]
    layers = list(Activations(sample()).values())[: 1 if small else None]
    yield REAL, [Case(q[:, :, -QUERIES:], k, v, rows=None, causal=True) for q, k, v in layers]


def measure(small: bool) -> Iterator[Row]:
    """Every window of every scheme on every input."""
    for data, cases in inputs(small):
        n = cases[0].k.shape[2]
        for name in SCHEMES:
            for sink, recent in WINDOWS:
                caches = [filled(name, sink, recent, case) for case in cases]
                found = [errors(tq.decode(case.q, cache), case.exact).rel_l1 for case, cache in zip(cases, caches, strict=True)]
                wide = caches[0].windows(0)[0].shape[2]
                bits = (16 * wide + caches[0].bits_per_value * (n - wide)) / n
                weight = mean(weight_of(case, sink, wide - sink) for case in cases)
                yield Row(data, name, sink, recent, round(bits, 3), round(weight, 4), [float(f"{x:.4g}") for x in found])


def filled(name: str, sink: int, recent: int, case: Case) -> tq.KVCache:
    """A cache of the preset with these windows, with all keys and values of the case."""
    windowed = changed(name, "windowed", cache={"sink": sink, "recent": recent})
    _, heads, _, d = case.k.shape
    cache = tq.KVCache(windowed, batch=1, kv_heads=heads, head_dim=d, dtype=case.k.dtype, backend="reference")
    cache.append(case.k, case.v)
    return cache


def weight_of(case: Case, sink: int, recent: int) -> float:
    """The mean share of the queries' attention that falls on the windows."""
    p = torch.cat(list(case.weights()), dim=2)
    return (p[..., :sink].sum(dim=-1) + p[..., p.shape[-1] - recent :].sum(dim=-1)).mean().item()


def table(rows: Rows) -> str:
    """Errors and bits by windows."""
    lines = [
        "",
        "| input | sink, recent | weight in them | " + " | ".join(SCHEMES) + " |",
        "|---|---|---|" + "---|" * len(SCHEMES),
    ]
    for (data, sink, recent), those in grouped(rows, "data", "sink", "recent"):
        cells = [f"{median(row['errors']):.1%} at {row['bits']:.2f} bits".replace("%", " %") for row in those]
        lines.append(f"| {data} | {sink}, {recent} | {100 * those[0]['weight']:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


draw = None
