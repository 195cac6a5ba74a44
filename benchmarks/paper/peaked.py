"""From how peaked an attention on few bits of K fail: logits of normal Q and K times a factor, and heads of a model.

A query's entropy H says how many keys it looks at, 2^H, and how far H is below log2 of all keys how peaked attention is. K or V
is coded alone. Relative L1 errors against float64, medians of five draws.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import keys
import torch
from matplotlib.figure import Figure
from study import Case, Rows, grouped, relative_l1

import tokquant as tq
from tokquant.activations import Activations, sample

DRAWS, QUERIES, HEAD_DIM = 5, 128, 128
LENGTHS = {512: ":", 2048: "-", 8192: "--"}
"""Keys, and how their lines are drawn."""
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 16.0)

PLAIN = {"precision": "fp16"}
TOKEN = {"precision": "int4", "symmetric": False, "scale_dtype": "fp16"}
CHANNELS = TOKEN | {"granularity": {"channel_block": 32}}
GROUPS = TOKEN | {"granularity": {"group": 32}}
CODES = {
    "K int8 token": ("k", {"precision": "int8"}),
    "K int4 token": ("k", TOKEN),
    "K int4 channel_block 32": ("k", CHANNELS),
    "K int2 channel_block 32": ("k", CHANNELS | {"precision": "int2"}),
    "V int4 group 32": ("v", GROUPS),
}
SCHEMES = {
    name: tq.QuantScheme(**({role: PLAIN for role in "qkvp"} | {operand: codes})) for name, (operand, codes) in CODES.items()
}


@dataclass(frozen=True)
class Row:
    """One operand in one kind of codes at one peakedness."""

    data: str
    """normal, or a layer and head."""
    tokens: int
    factor: float
    """The factor that multiplies logits, besides head_dim^-1/2."""
    entropy: float
    """Entropy of the weights in bits: the mean over queries."""
    codes: str
    errors: list[float]


def measure(small: bool) -> Iterator[Row]:
    """Every factor at every length, then every head of the sample."""
    for tokens in (256,) if small else LENGTHS:
        for factor in FACTORS[2:8:2] if small else FACTORS:
            scale = factor * HEAD_DIM**-0.5
            drawn = [keys.normals(tokens, HEAD_DIM, seed) for seed in range(1 if small else DRAWS)]
            yield from of("normal", factor, [Case(*each, rows=QUERIES, scale=scale) for each in drawn])
    for layer, operands in list(Activations(sample()).items())[: 1 if small else None]:
        for head in range(operands[1].shape[1]):
            yield from of(f"{layer}, head {head}", 1.0, [Case(*(x[:, head : head + 1] for x in operands), rows=None)])


def of(data: str, factor: float, cases: list[Case]) -> Iterator[Row]:
    """A row for each kind of codes, all on the same case."""
    entropy = round(sum(map(entropy_of, cases)) / len(cases), 3)
    for name, scheme in SCHEMES.items():
        yield Row(data, cases[0].k.shape[2], factor, entropy, name, relative_l1(cases, scheme))


def entropy_of(case: Case) -> float:
    """Entropy of the weights in bits: the mean over the case's queries."""
    return torch.cat([torch.special.entr(p).sum(dim=-1) for p in case.weights()], dim=2).mean().item() / math.log(2)


def table(rows: Rows) -> str:
    """Errors by factor at 2048 keys, then those of the model's heads."""
    lines = []
    for title, those in (
        ("factor of the logits", [row for row in rows if (row["data"], row["tokens"]) == ("normal", 2048)]),
        ("layer, head", [row for row in rows if row["data"] != "normal"]),
    ):
        lines += ["", f"| {title} | keys looked at | " + " | ".join(SCHEMES) + " |", "|---|---|" + "---|" * len(SCHEMES)]
        for (data, factor, entropy), each in grouped(those, "data", "factor", "entropy"):
            place = f"{factor:g}" if data == "normal" else data.replace("layers.", "").replace("head ", "")
            cells = " | ".join(f"{median(row['errors']):.1%}".replace("%", " %") for row in each)
            lines.append(f"| {place} | {2**entropy:.0f} of {each[0]['tokens']} | {cells} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """Error against how peaked attention is: lines for normal tensors at each length, dots for heads of the model."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [name for name in SCHEMES if name != "V int4 group 32"]
    for place, name in enumerate(shown):
        of = [row for row in rows if row["codes"] == name]
        drawn = list(grouped([row for row in of if row["data"] == "normal"], "tokens"))
        for (tokens,), those in drawn:
            axes.plot(*curve(those), LENGTHS.get(tokens, "-"), color=f"C{place}", lw=1)
        axes.plot(*curve([row for row in of if row["data"] != "normal"]), "o", ms=3, color=f"C{place}")
        x, y = curve(drawn[-1][1])
        axes.annotate(name, (x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8, color=f"C{place}")
    for tokens, style in LENGTHS.items():
        axes.plot([], [], style, color="#808080", lw=1, label=f"normal, {tokens} keys")
    axes.plot([], [], "o", ms=3, color="#808080", label="heads of MiniLM, 512 keys")
    axes.legend(loc="upper left", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(0.03, 90), ylim=(0.0005, 6))
    axes.set_xticks([0.05, 0.2, 1, 2, 4, 8], ["1/20", "1/5", "1", "2", "4", "8"])
    axes.set_yticks([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1], ["0.1 %", "0.3 %", "1 %", "3 %", "10 %", "30 %", "100 %"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("how peaked attention is: bits of entropy below that of equal weights")
    axes.set_ylabel("relative L1 error")
    return figure


def curve(rows: Rows) -> tuple[list[float], list[float]]:
    """How peaked attention is, and the error."""
    return [math.log2(row["tokens"]) - row["entropy"] for row in rows], [median(row["errors"]) for row in rows]
