"""How do presets err on everything that the other studies draw, and on the activations that ship?

Whole schemes: Q, K, V and P coded as they say. Relative L1 errors against float64, means of five draws of 2048 tokens and 128
channels, not causal, and of the six layers of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import keys
from study import Case, Rows, changed, grouped, real, relative_l1

import tokquant as tq

DRAWS, TOKENS, QUERIES, HEAD_DIM = 5, 2048, 128, 128
DATA: dict[str, keys.Draw] = {
    "normal": keys.normals,
    "uniform": keys.uniforms,
    "outlier channels": keys.outlier_channels,
    "RoPE and bias": keys.rope_biased,
    "massive token": keys.massive_token,
    "sink and near tokens": keys.sink_and_near,
}
REAL = "MiniLM"
SCHEMES = (
    tq.preset("int8"),
    changed("int8", "int8-rotated", rotate="hadamard"),
    tq.preset("int8-token"),
    changed("int8-token", "int8-token-rotated", rotate="hadamard", rotate_v="hadamard"),
    *map(tq.preset, ("int8-fast", "int-flash", "int-flash-half", "int8-fp16")),
    changed("int8-fp16", "int8-fp16-k-token", k=tq.preset("int8").k),
    *map(tq.preset, ("int8-fp8", "fp8", "kv-int8", "kv-int4", "kv-int4-kivi")),
)


@dataclass(frozen=True)
class Row:
    """One scheme on one kind of input."""

    data: str
    scheme: str
    errors: list[float]
    """Of each draw or layer."""


def measure(small: bool) -> Iterator[Row]:
    """Every scheme on every input."""
    for data, draw in DATA.items():
        n, rows, draws = (256, 32, 1) if small else (TOKENS, QUERIES, DRAWS)
        cases = [Case(*draw(n, HEAD_DIM, seed), rows=rows) for seed in range(draws)]
        yield from of(data, cases)
    yield from of(REAL, real()[:1] if small else real())


def of(data: str, cases: list[Case]) -> Iterator[Row]:
    """A row for each scheme."""
    for scheme in SCHEMES:
        yield Row(data, scheme.name, relative_l1(cases, scheme))


def table(rows: Rows) -> str:
    """A line a scheme, a column an input."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["", "| scheme | " + " | ".join(data) + " |", "|---|" + "---|" * len(data)]
    for (scheme,), those in grouped(rows, "scheme"):
        lines.append(f"| {scheme} | " + " | ".join(f"{mean(row['errors']):.2%}".replace("%", " %") for row in those) + " |")
    return "\n".join(lines)


draw = None
