"""FP8, half INT8 and full INT8 as in the tables of INT-FlashAttention (arXiv 2409.16997), in several measures.

Its measure, MRE, is mean |o - x| / (|o| + 1e-5). Over all elements those near zero decide it; the released code takes it over
the last four elements of the output, `mre_last_4` here. Relative L1, cosine and RMSE are those of the SageAttention papers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from study import Case, Rows, grouped
from torch import Tensor

import tokquant as tq
from tokquant import reference
from tokquant.calibration.scales import LayerScales
from tokquant.metrics import errors
from tokquant.quantize import quantize_operands

HEAD_DIM, HEADS, QUERIES = 64, 4, 256

E5M2 = {"precision": "fp8_e5m2", "granularity": "tensor", "scale": "static"}
UNSCALED = tq.QuantScheme(name="fp8-e5m2-unscaled", q=E5M2, k=E5M2, v=E5M2, p={"precision": "fp8_e5m2"})
ONE = torch.ones(1, 1, 1)
SCHEMES = {
    "FP8, e5m2 without scales": UNSCALED,
    "FP8, e4m3 scaled": tq.preset("fp8"),
    "half INT8": tq.preset("int-flash-half"),
    "full INT8": tq.preset("int-flash"),
    "tokquant int8": tq.preset("int8"),
}
DATA: dict[str, Callable[..., Tensor]] = {
    "normal": lambda *shape, generator: torch.randn(shape, generator=generator),
    "uniform": lambda *shape, generator: torch.rand(shape, generator=generator) - 0.5,
}


@dataclass(frozen=True)
class Row:
    """One scheme on one input."""

    data: str
    scale: str
    tokens: int
    scheme: str
    mre: float
    mre_last_4: float
    rel_l1: float
    cosine: float
    rmse: float


def measure(small: bool) -> Iterator[Row]:
    """Every scheme on every input."""
    for data, draw in DATA.items():
        for n in [256] if small else [1024, 2048, 4096, 8192, 16384]:
            generator = torch.Generator().manual_seed(n)
            q, k, v = (draw(1, HEADS, n, HEAD_DIM, generator=generator).half() for _ in range(3))
            for scale, factor in (("1", 1.0), ("1/8", HEAD_DIM**-0.5)):
                case = Case(q, k, v, rows=QUERIES, scale=factor)
                for name, scheme in SCHEMES.items():
                    out = unscaled(case) if scheme is UNSCALED else case.attend(scheme)
                    each = (case.exact - out.double()).abs() / (case.exact.abs() + 1e-5)
                    found = errors(out, case.exact)
                    last = each.flatten()[-4:].mean().item()
                    yield Row(data, scale, n, name, each.mean().item(), last, found.rel_l1, found.cosine, found.rmse)


def unscaled(case: Case) -> Tensor:
    """What the paper's FP8 code does: it casts to e5m2 as values are, and its output too."""
    scales = LayerScales("paper", {f"{role}_scale": ONE for role in "qkv"}, UNSCALED)
    codes = quantize_operands(case.q, case.k, case.v, UNSCALED, scales)
    return reference.attention(*codes, UNSCALED, case.features, only=case.only)[0].to(torch.float8_e5m2)


def table(rows: Rows) -> str:
    """A table for each kind of data and scale."""
    lines = []
    for (data, scale), those in grouped(rows, "data", "scale"):
        lines += [f"\n{data} activations, scores times {scale}\n"]
        lines += ["| tokens | scheme | relative L1 | MRE, all | MRE, last 4 | cosine | RMSE |", "|---|---|---|---|---|---|---|"]
        for row in those:
            figures = (
                f"{row['rel_l1']:.2%} | {row['mre']:.1%} | {row['mre_last_4']:.2%} | {row['cosine']:.6f} | {row['rmse']:.2e}"
            )
            lines.append(f"| {row['tokens']} | {row['scheme']} | {figures} |")
    return "\n".join(lines)


draw = None
