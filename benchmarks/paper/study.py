"""What all studies share: inputs, attention and its errors, and files of results and figures.

A study is a module whose docstring states its question. `measure(small)` yields rows (dataclasses of numbers and words), of
sizes that a test can run where `small`; `table(rows)` is their Markdown, and `draw(rows)` their picture, or None where a table
says it all. These two take rows as they are read from JSON, so that a picture can be drawn again without a run. One that times
something says on which `BACKEND`, and on which `DEVICE` where that may be a GPU.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import matplotlib.style
import torch
from torch import Tensor

import tokquant as tq
from tokquant import reference
from tokquant.activations import Activations, sample
from tokquant.evaluation.costs import scales_for
from tokquant.evaluation.machine import machine
from tokquant.evaluation.sampling import runs
from tokquant.features import Features
from tokquant.inputs import features_of
from tokquant.metrics import Errors, errors, head_errors
from tokquant.quantize import quantize_operands

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "evidence"
STYLE = ROOT / "docs" / "tokquant.mplstyle"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Q, K and V `[B, H, N, D]`, and the exact output of some of the queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: int | list[slice] | None = 256
    """The queries of each head that are measured: so many, in runs spread over all; or these runs; or all, where None."""
    causal: bool = False
    scale: float | None = None
    calibration: tuple[Tensor, Tensor, Tensor] | None = None
    """What static scales are calibrated on; these tensors themselves where None."""

    @cached_property
    def features(self) -> Features:
        return features_of(self.q, self.k, causal=self.causal, scale=self.scale)

    @cached_property
    def only(self) -> list[slice]:
        return self.rows if isinstance(self.rows, list) else runs(self.q.shape[2], self.rows)

    @cached_property
    def exact(self) -> Tensor:
        """The output in float64."""
        return reference.oracle(self.q, self.k, self.v, self.features, self.only)[0]

    def weights(self, only: Sequence[slice] | None = None) -> Iterator[Tensor]:
        """The exact P of the measured queries, or of `only`: float64 `[B, H, rows, N_k]`, some rows at a time."""
        (_, heads, n_q), n_k, k = self.q.shape[:3], self.k.shape[2], self.k.double()
        for rows in reference.row_chunks(n_q, heads * n_k, only or self.only):
            yield reference.weights(self.q, k, self.features, rows)[0]

    def attend(self, scheme: tq.QuantScheme) -> Tensor:
        """Quantized attention, emulated as a kernel computes it."""
        operands = self.q, self.k, self.v
        codes = quantize_operands(*operands, scheme, scales_for(scheme, *(self.calibration or operands)))
        return reference.attention(*codes, scheme, self.features, only=self.only)[0]

    def errors(self, scheme: tq.QuantScheme) -> Errors:
        return errors(self.attend(scheme), self.exact)


def relative_l1(cases: Sequence[Case], scheme: tq.QuantScheme) -> list[float]:
    """The relative L1 error of each case, rounded to four digits."""
    return [float(f"{case.errors(scheme).rel_l1:.4g}") for case in cases]


def changed(preset: str, name: str, **fields: Any) -> tq.QuantScheme:
    """A preset with these fields changed."""
    return tq.QuantScheme(**tq.preset(preset).model_dump() | {"name": name} | fields)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Uniform from -1/2 to 1/2, float16."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5).half()


def outliers(*shape: int, seed: int = 0, channels: int = 2, times: float = 16.0) -> Tensor:
    """Normal, the first channels of each head many times as large: what keys of language models look like."""
    x = normal(*shape, seed=seed).float()
    x[..., :channels] *= times
    return x.half()


def token_scaled(*shape: int, seed: int = 0, sigma: float = 1.0) -> Tensor:
    """Normal, with each token multiplied by its own log-normal factor of this sigma."""
    factors = torch.randn(*shape[:-1], 1, generator=torch.Generator().manual_seed(seed + 1)).mul(sigma).exp()
    return (normal(*shape, seed=seed).float() * factors).half()


def real() -> list[Case]:
    """The package's sample activations: a case for each layer, with all queries of its two heads."""
    return [Case(*operands, rows=None) for operands in Activations(sample()).values()]


def of_heads(cases: list[Case], scheme: tq.QuantScheme) -> dict[str, float]:
    """Relative L1 error: mean, least and most over all heads, each of which is a draw of its own."""
    found = [each.rel_l1 for case in cases for each in head_errors(case.attend(scheme), case.exact)]
    return {"rel_l1": sum(found) / len(found), "least": min(found), "most": max(found)}


def run(study: ModuleType, small: bool, results: Path, figures: Path) -> str:
    """Measure; keep the rows as JSON and the picture as SVG. Returns the table in Markdown."""
    rows: Rows = [asdict(row) for row in study.measure(small)]
    device, backend = getattr(study, "DEVICE", torch.device("cpu")), getattr(study, "BACKEND", "reference")
    setting = {"small": small, **machine(device, backend)}
    lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
    kept(study, results).write_text(f'{{"setting": {json.dumps(setting)}, "rows": [\n{lines}\n]}}\n')
    picture(study, rows, figures)
    return study.table(rows)


def kept(study: ModuleType, results: Path = RESULTS) -> Path:
    """The file of a study's rows."""
    return results / f"paper-{study.__name__}.json"


def read(study: ModuleType, results: Path = RESULTS) -> Rows:
    """The rows of a study's last run."""
    return json.loads(kept(study, results).read_text())["rows"]


def picture(study: ModuleType, rows: Rows, figures: Path) -> None:
    """Draw the rows as `<study>.svg`, byte for byte the same every time."""
    draw: Callable[[Rows], Any] | None = study.draw
    if draw is None:
        return
    with matplotlib.style.context(STYLE):
        draw(rows).savefig(figures / f"{study.__name__}.svg", metadata={"Date": None})


def grouped(rows: Rows, *names: str) -> Iterator[tuple[tuple[Any, ...], Rows]]:
    """Groups of rows with equal values of these fields, in order of first occurrence."""
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        yield key, [row for row in rows if tuple(row[name] for name in names) == key]
