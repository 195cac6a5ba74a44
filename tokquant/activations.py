"""Activation files: safetensors with `<layer>.q`, `<layer>.k` and `<layer>.v`, each `[B, H, N, D]`."""

import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

import safetensors.torch
from torch import Tensor

from tokquant.errors import nearest, quote
from tokquant.files import write_atomically
from tokquant.tensor_files import open_tensors


def sample() -> Path:
    """The activations that ship with the package: six layers of all-MiniLM-L6-v2 on 512 tokens, two heads each."""
    return Path(str(resources.files("tokquant") / "data" / "sample.safetensors"))


class Activations(Mapping[str, tuple[Tensor, Tensor, Tensor]]):
    """The layers of an activation file in natural order, each read when it is asked for.

    Raises ValueError naming the file and what is wrong: not safetensors, truncated, a layer without q, k or v.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open_tensors(self.path, ValueError)
        found: dict[str, set[str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - not a mapping
            layer, _, role = key.rpartition(".")
            if role in ("q", "k", "v") and layer:
                found.setdefault(layer, set()).add(role)
        for layer, roles in found.items():
            if missing := {"q", "k", "v"} - roles:
                raise ValueError(f"{self.path}: layer {quote(layer)} has no {', '.join(sorted(missing))}")
        if not found:
            raise ValueError(f"{self.path}: holds no activations; they are named <layer>.q, <layer>.k and <layer>.v")
        self._layers = sorted(found, key=natural)

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self._layers:
            raise ValueError(f"{self.path}: no layer {quote(layer)}{nearest(layer, self._layers)}")
        q, k, v = (self._file.get_tensor(f"{layer}.{role}") for role in "qkv")
        return q, k, v

    def head_dims(self) -> set[int]:
        """How many channels heads have, over all layers. No activations are read."""
        shapes = (self._file.get_slice(f"{layer}.q").get_shape() for layer in self._layers)
        return {shape[-1] for shape in shapes if shape}

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def get(self, layer: str, default=None):
        """Q, K and V of the layer, or `default`."""
        return self[layer] if layer in self._layers else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def save(path: str | os.PathLike, layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Write Q, K and V of layers `[B, H, N, D]` as an activation file, atomically."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for layer, operands in layers.items():
        for role, x in zip("qkv", operands, strict=True):
            x = x.contiguous()
            memory = x.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, as those of one projection may
            tensors[f"{layer}.{role}"] = x.clone() if memory in seen else x
            seen.add(memory)
    write_atomically(path, safetensors.torch.save(tensors))


def natural(name: str) -> list[tuple[int, str]]:
    """What names are sorted by, so that layers come in the order of their numbers."""
    # layers.2 before layers.10
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
