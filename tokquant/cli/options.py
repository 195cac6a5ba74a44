"""Options that several commands share."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tokquant.activations import Activations, sample
from tokquant.calibration.scales import Scales, static
from tokquant.cli import output
from tokquant.errors import nearest, quote
from tokquant.export import load_scales
from tokquant.kernels.products import FLOAT_NAMES
from tokquant.kernels.targets import TARGETS

SCHEME = typer.Option("--scheme", "-s", help="A preset (see `tokquant schemes`), or the YAML file of a scheme or scheme map.")
Scheme = Annotated[str, SCHEME]
Input = Annotated[
    Path | None,
    typer.Option(
        "--input", "-i", help="Safetensors with <layer>.q, .k, .v, each [B, H, N, D]; the sample that ships, if left out."
    ),
]
ScaleFile = Annotated[
    Path | None,
    typer.Option(
        "--scales", help="Calibrated scales of a static scheme, from `tokquant calibrate`; the file contains the scheme."
    ),
]
ScaleFiles = Annotated[
    list[Path] | None, typer.Option("--scales", help="Calibrated scales; adds the scheme they were made for; repeat for more.")
]
# annotated as Any, since functions annotate these with types of their own; `parser`, since older versions of typer need it then
Backend = Annotated[Any, typer.Option("--backend", parser=str, metavar="<str>", help="auto, triton, cpu or reference.")]
Causal = Annotated[
    bool, typer.Option("--causal", help="Each query sees the keys up to its own; the last query is at the last key.")
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs; medians are shown.")]
Layer = Annotated[str | None, typer.Option("--layer", help="The layer to take from a scheme map.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences.")]
Heads = Annotated[int, typer.Option("--heads", min=1, help="Heads of Q.")]
KvHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="Heads of K and V; as many as Q's, if left out.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=1, help="Channels of a head.")]
DTYPES = {name: dtype for dtype, name in FLOAT_NAMES.items()}
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the tensors: fp16, bf16 or fp32.")]
Target = Annotated[str, typer.Option("--target", help=f"One of {', '.join(TARGETS)}.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[
    str | None, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1 ...; a GPU if there is one, if left out.")
]


def device_of(name: str | None) -> torch.device:
    """The device that --device names, or the first GPU, or the CPU. Raises ValueError where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # "meta" tensors hold no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {quote(name)} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def dtype_of(name: str) -> torch.dtype:
    """The type that --dtype names. Raises ValueError."""
    if name not in DTYPES:
        raise ValueError(f"--dtype: {quote(name)} is not valid; use {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    return DTYPES[name]


def kv_heads_of(heads: int, kv_heads: int | None) -> int:
    """The heads of K and V; those of Q if None. Raises ValueError if they do not divide the heads of Q."""
    if heads % (kv_heads or heads):
        raise ValueError(f"--kv-heads: {kv_heads} does not divide the {heads} heads of Q")
    return kv_heads or heads


def check_writable(option: str, path: Path | None, *others: Path | None) -> None:
    """Raise ValueError if a file cannot be written or is another file of the command. Call it before any work is done."""
    if path is None:
        return
    if path.resolve() in (other.resolve() for other in others if other is not None):
        raise ValueError(f"{option}: {path} is another file of this command, which would be lost; name a new one")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: nothing can be written in folder {path.parent}")


class Layers(Mapping[str, tuple[Tensor, Tensor, Tensor]]):
    """The layers of an activation file, or of the sample, on a device. Errors name the file and the layer."""

    def __init__(self, path: Path | None, device: str | None = None):
        self.file = Activations(sample() if path is None else path)
        self.name = self.file.path.name
        self.device = device_of(device)

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        with self.naming(layer):
            q, k, v = (x.to(self.device) for x in self.file[layer])
        return q, k, v

    def __contains__(self, layer: object) -> bool:
        return layer in self.file

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)

    @property
    def head_dims(self) -> str:
        """The head_dims of all layers, as text."""
        return " and ".join(map(str, sorted(self.file.head_dims())))

    def each(self, what: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
        """Name and Q, K, V of each layer, with a progress bar."""
        for name in output.progress(self.file, what, len(self.file)):
            yield name, self[name]

    @contextmanager
    def naming(self, layer: str) -> Iterator[None]:
        """Prefix the message of an error that is raised inside with the file and the layer."""
        try:
            yield
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{self.name}, {layer}: {error}") from None

    def scales(self, path: Path) -> Scales:
        """Load scales from a file. Raises ValueError if a layer with a static scheme is missing."""
        scales = load_scales(path)
        if missing := [name for name in self.file if static(scales.scheme, name) and name not in scales]:
            raise ValueError(
                f"{path}: has no layer {', '.join(missing[:4])} of {self.name}; it has {', '.join(list(scales)[:4])}"
            )
        return scales
