"""Options that mean the same in every command."""

from pathlib import Path
from typing import Annotated

import typer

from tokquant.activations import Activations, sample

SCHEME = typer.Option("--scheme", "-s", help="A preset (see `tokquant schemes`) or the path of a YAML file.")
Scheme = Annotated[str, SCHEME]
Input = Annotated[
    Path | None,
    typer.Option(
        "--input", "-i", help="Safetensors with <layer>.q, .k, .v, each [B, H, N, D]. The sample that ships if left out."
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option("--scales", help="Calibrated scales of a static scheme, from `tokquant calibrate`; they bring it."),
]
Backend = Annotated[str, typer.Option("--backend", help="auto, triton or reference.")]
Causal = Annotated[bool, typer.Option("--causal", help="Each query sees the keys up to its own place, counted from the end.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs; medians are shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def activations(path: Path | None) -> Activations:
    """The activation file, or the sample."""
    return Activations(sample() if path is None else path)
