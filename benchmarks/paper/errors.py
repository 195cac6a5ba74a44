"""INT-FlashAttention's error tables (arXiv 2409.16997), by its arithmetic and by tokquant's, in several measures.

    python benchmarks/paper/errors.py                      # the paper's sizes; minutes on two cores
    python benchmarks/paper/errors.py --tokens 256 --rows 64 --output errors.json

Its measure, MRE, is mean |o - x| / (|o| + 1e-5). Over all elements those near zero decide it; the released code takes it over
the last four elements of the output, `mre_last_4` here. Relative L1, cosine and RMSE are those of the SageAttention papers.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import tokquant as tq
from tokquant import reference
from tokquant.calibration.scales import LayerScales
from tokquant.evaluation.sampling import runs
from tokquant.inputs import features_of
from tokquant.metrics import errors
from tokquant.quantize import quantize_operands

HEAD_DIM, HEADS = 64, 4

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


def measure(tokens: list[int], rows: int) -> Iterator[Row]:
    """Every scheme on every input of one sequence, `rows` queries of each head looked at."""
    for data, draw in DATA.items():
        for n in tokens:
            generator = torch.Generator().manual_seed(n)
            q, k, v = (draw(1, HEADS, n, HEAD_DIM, generator=generator).half() for _ in range(3))
            for scale, factor in (("1", 1.0), ("1/8", HEAD_DIM**-0.5)):
                features, only = features_of(q, k, scale=factor), runs(n, rows)
                exact, _ = reference.oracle(q, k, v, features, only)
                for name, scheme in SCHEMES.items():
                    out = attend(q, k, v, scheme, features, only)
                    each = (exact - out.double()).abs() / (exact.abs() + 1e-5)
                    found = errors(out, exact)
                    last = each.flatten()[-4:].mean().item()
                    yield Row(data, scale, n, name, each.mean().item(), last, found.rel_l1, found.cosine, found.rmse)


def attend(q: Tensor, k: Tensor, v: Tensor, scheme: tq.QuantScheme, features: reference.Features, only: list[slice]) -> Tensor:
    """Attention by the emulation, for some queries. The paper's FP8 code casts to e5m2 as values are, and its output too."""
    bare = scheme is UNSCALED
    scales = LayerScales("paper", {f"{role}_scale": ONE for role in "qkv"}, scheme) if bare else None
    out, _ = reference.attention(*quantize_operands(q, k, v, scheme, scales), scheme, features, only=only)
    return out.to(torch.float8_e5m2) if bare else out


def markdown(rows: list[Row]) -> str:
    """A table for each kind of data and scale."""
    lines = []
    for data, scale in dict.fromkeys((row.data, row.scale) for row in rows):
        lines += [f"\n{data} activations, scores times {scale}\n"]
        lines += ["| tokens | scheme | relative L1 | MRE, all | MRE, last 4 | cosine | RMSE |", "|---|---|---|---|---|---|---|"]
        for row in rows:
            if (row.data, row.scale) == (data, scale):
                figures = f"{row.rel_l1:.2%} | {row.mre:.1%} | {row.mre_last_4:.2%} | {row.cosine:.6f} | {row.rmse:.2e}"
                lines.append(f"| {row.tokens} | {row.scheme} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rows", type=int, default=256, help="queries of each head that are looked at")
    parser.add_argument("--output", help="write the figures as JSON")
    asked = parser.parse_args()
    rows = list(measure(asked.tokens, asked.rows))
    print(markdown(rows))
    if asked.output:
        setting = {
            "head_dim": HEAD_DIM,
            "heads": HEADS,
            "rows": asked.rows,
            "torch": torch.__version__,
        }
        with open(asked.output, "w") as file:
            json.dump({"setting": setting, "rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
