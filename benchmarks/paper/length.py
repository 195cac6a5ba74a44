"""How does the error grow with the length of a sequence, from 1k to 256k keys, and where in a sequence is it?

The last 64 queries of a head of 64 channels attend causally to all keys before them. `normal` is normal Q, K and V. `hot keys`
adds, for each query, four keys that hold half of its weight at every length. `sink and local` is made as attention of language
models looks: RoPE and a mean of Q and K, so that weight falls with distance; the first token, of next to no value, which takes
a third of the weight; four others, to which all queries look; and a mean of V. `position` is one normal sequence, seen from
several places in it. Beside what is measured stands what rounding P in steps of a row's or a block's largest should do.
"""

import math
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from axes import in_percent, short
from matplotlib.figure import Figure
from study import Case, Rows, changed, grouped, normal
from torch import Tensor

import tokquant as tq

HEAD_DIM, QUERIES, HOT, SEEDS = 64, 64, 4, 3
PRESETS = ("int-flash", "int8", "int8-fast", "int8-fp16", "int8-fp8", "fp8", "kv-int8", "kv-int4")
BLOCK = {"granularity": {"row_block": 128}}
CHANGED = {
    "int-flash-exact-sum": ("int-flash", {"normalizer": "exact"}),
    "int-flash-row-block": ("int-flash", {"p": {"precision": "int8", **BLOCK}}),
    "int8-fp8-row-block": ("int8-fp8", {"p": {"precision": "fp8_e4m3", **BLOCK}}),
}
"""Presets with one change: the normalizer as in the paper's code, or P scaled to the maximum of each 128 keys."""
SCHEMES = {name: tq.preset(name) for name in PRESETS} | {
    name: changed(preset, name, **fields) for name, (preset, fields) in CHANGED.items()
}
DRAWN = ("int8-fp16", "int8", "int-flash", "fp8", "kv-int4", "int8-fp8", "int-flash-row-block")
Operands = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One scheme at one length, medians over seeds."""

    data: str
    tokens: int
    """Keys that the last query sees."""
    scheme: str
    seeds: int
    rel_l1: float
    least: float
    most: float
    row_steps: float
    """Predicted relative error if P is rounded to steps of 1/127 of the row's largest, for independent values."""
    block_steps: float
    """The same for steps of 1/255 of the largest P of each 128 keys."""
    lost: float
    """Share of a row's weight that such steps round to zero: in values below half of 1/127 of the largest."""
    largest: float
    """Share of a row's weight on the key that has the most."""
    first: float
    """Share of a row's weight on the first key."""
    keys: float
    """2^entropy of a row's weights: the effective number of keys that a query attends to."""
    peak_gb: float
    """Peak memory of the process so far."""


def draw_normal(n: int, seed: int) -> Operands:
    """Logits are normal, of variance 1."""
    return normal(1, 1, QUERIES, HEAD_DIM, seed=3 * seed), *(normal(1, 1, n, HEAD_DIM, seed=3 * seed + i) for i in (1, 2))


def draw_hot(n: int, seed: int) -> Operands:
    """Half of each query's weight is on four keys of its own."""
    q, k, v = draw_normal(n, seed)
    rows, k = q[0, 0].float(), k.float()
    chosen = torch.randperm(n - QUERIES, generator=torch.Generator().manual_seed(seed))[: HOT * QUERIES].view(QUERIES, HOT)
    rest = (rows @ k[0, 0].T / HEAD_DIM**0.5).logsumexp(dim=1)
    # a key in the direction of its query, scaled to give the wanted logit
    keys = rows / rows.square().sum(dim=1, keepdim=True) * (rest - math.log(HOT))[:, None] * HEAD_DIM**0.5
    k[0, 0, chosen] = keys[:, None]
    return q, k.half(), v


def draw_sink(n: int, seed: int) -> Operands:
    """About 0.3 of the weight is on the first token, 0.05 on each of four others, and the rest falls with distance."""
    q, k, v = draw_normal(n, seed)
    mean = torch.tensor([1.5, 0.0]).repeat_interleave(HEAD_DIM // 2)
    q, k = rope(q.float() + mean, n - QUERIES), rope(k.float() + mean, 0)
    towards = q.mean(dim=2)[0, 0]
    rest = (q[0, 0] @ k[0, 0].T / HEAD_DIM**0.5).logsumexp(dim=1).median()
    hot = torch.randperm(n - QUERIES - 1, generator=torch.Generator().manual_seed(seed))[:HOT] + 1
    for place, share in ((torch.tensor([0]), 0.3), (hot, 0.05)):
        logit = rest + math.log(share / 0.5)
        k[0, 0, place] = towards / towards.square().sum() * logit * HEAD_DIM**0.5
    v = v + normal(1, 1, 1, HEAD_DIM, seed=3 * seed) / 2
    v[0, 0, 0] *= 0.02
    return q.half(), k.half(), v


def rope(x: Tensor, first: int, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of `[B, H, N, D]`, tokens counted from `first`."""
    half = x.shape[3] // 2
    angle = torch.arange(first, first + x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


DATA: dict[str, Callable[[int, int], Operands]] = {"normal": draw_normal, "hot keys": draw_hot, "sink and local": draw_sink}


def measure(small: bool) -> Iterator[Row]:
    """Every scheme at every length, and at places of one sequence."""
    lengths = [512, 4096] if small else [1024, 4096, 16384, 65536, 262144]
    seeds = 1 if small else SEEDS
    for data, draw in DATA.items():
        for n in lengths:
            cases = [Case(*draw(n, seed), rows=None, causal=True) for seed in range(seeds)]
            yield from rows_of(data, n, cases)
    longest = lengths[-1 if small else -2]
    whole = [[normal(1, 1, longest, HEAD_DIM, seed=3 * seed + i) for i in range(3)] for seed in range(seeds)]
    for n in [256, 1024, 4096, 16384, 65536]:
        if n <= longest:
            yield from rows_of("position", n, [Case(*each, [slice(n - QUERIES, n)], causal=True) for each in whole])


def rows_of(data: str, n: int, cases: list[Case]) -> Iterator[Row]:
    """Medians over the cases."""
    facts = [weight_facts(case) for case in cases]
    known = {name: statistics.median(each[name] for each in facts) for name in facts[0]}
    for name, scheme in SCHEMES.items():
        found = [case.errors(scheme).rel_l1 for case in cases]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield Row(data, n, name, len(found), statistics.median(found), min(found), max(found), **known, peak_gb=peak)


def weight_facts(case: Case) -> dict[str, float]:
    """The fields of a Row that follow from the exact weights."""
    n_k, per_row = case.k.shape[2], []
    for weights in case.weights():
        p = weights[0, 0]
        largest = p.amax(dim=1, keepdim=True)
        blocks = torch.nn.functional.pad(p, (0, -n_k % 128)).unflatten(1, (-1, 128))
        facts = (
            rounded(p, largest / 127),
            rounded(blocks, blocks.amax(dim=2, keepdim=True) / 255),
            torch.where(p < largest / 254, p, 0.0).sum(dim=1),
            largest[:, 0],
            p[:, 0],
            torch.special.entr(p).sum(dim=1).exp(),
        )
        per_row.append(torch.stack(facts))
    means = torch.cat(per_row, dim=1).mean(dim=1).tolist()
    return dict(zip(("row_steps", "block_steps", "lost", "largest", "first", "keys"), means, strict=True))


def rounded(p: Tensor, step: Tensor) -> Tensor:
    """sqrt(sum min(p^2, step^2 / 12) / sum p^2) of each row: rounding errs by step^2 / 12, and never more than by all of p."""
    lost = torch.minimum(p.square(), step.square() / 12)
    return (lost.flatten(1).sum(dim=1) / p.square().flatten(1).sum(dim=1)).sqrt()


def table(rows: Rows) -> str:
    """A table for each kind of data: a line a length, a column a scheme."""
    lines = []
    for (data,), those in grouped(rows, "data"):
        lines += [f"\n{data}\n", f"| keys | {' | '.join(SCHEMES)} | lost | by row steps | by block steps |"]
        lines.append("|---" * (len(SCHEMES) + 4) + "|")
        for (n,), of_n in grouped(those, "tokens"):
            found = [f"{row['rel_l1']:.2%}" for row in of_n]
            facts = (f"{of_n[0][name]:.2%}" for name in ("lost", "row_steps", "block_steps"))
            lines.append(f"| {short(n)} | {' | '.join((*found, *facts))} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """Error against length, a panel for each kind of data."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(DATA), sharey=True)
    for axes, data in zip(panels, DATA, strict=True):
        those = [row for row in rows if row["data"] == data]
        for name in DRAWN:
            own = [row for row in those if row["scheme"] == name]
            tokens = [row["tokens"] for row in own]
            axes.loglog(tokens, [100 * row["rel_l1"] for row in own], label=name)
        if data == "normal":
            steps = [100 * row["row_steps"] for row in own]
            axes.loglog(tokens, steps, ":", color="#808080", label="steps of P alone, largest / 127")
        axes.set_xticks(tokens, map(short, tokens), fontsize=8)
        in_percent(axes, 0.5, 1, 2, 5, 10, 20, 50, 100)
        axes.set(title=data, xlabel="keys")
    panels[0].set_ylabel("relative L1 error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
