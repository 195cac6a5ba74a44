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
    """The path of the activations that ship with the package: six layers of all-MiniLM-L6-v2, 512 tokens, two heads each."""
    return Path(str(resources.files("tokquant") / "data" / "sample.safetensors"))


class Activations(Mapping[str, tuple[Tensor, Tensor, Tensor]]):
    """The layers of an activation file as a mapping in natural order. A layer is read when it is accessed.

    Raises ValueError that names the file and the problem: not safetensors, truncated, a layer without q, k or v.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open_tensors(self.path, ValueError)
        roles_of: dict[str, set[str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - not a mapping
            layer, _, role = key.rpartition(".")
            if role in ("q", "k", "v") and layer:
                roles_of.setdefault(layer, set()).add(role)
        for layer, roles in roles_of.items():
            if missing := {"q", "k", "v"} - roles:
                raise ValueError(f"{self.path}: layer {quote(layer)} has no {', '.join(sorted(missing))}")
        if not roles_of:
            raise ValueError(f"{self.path}: holds no activations; they are named <layer>.q, <layer>.k and <layer>.v")
        self._layers = sorted(roles_of, key=natural)

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self._layers:
            raise ValueError(f"{self.path}: no layer {quote(layer)}{nearest(layer, self._layers)}")
        q, k, v = (self._file.get_tensor(f"{layer}.{role}") for role in "qkv")
        return q, k, v

    def head_dims(self) -> set[int]:
        """The head_dims of all layers, from the file's header alone."""
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
    storages: set[int] = set()
    for layer, operands in layers.items():
        for role, x in zip("qkv", operands, strict=True):
            x = x.contiguous()
            storage = x.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, as views of one projection's output do
            tensors[f"{layer}.{role}"] = x.clone() if storage in storages else x
            storages.add(storage)
    write_atomically(path, safetensors.torch.save(tensors))


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key for layer names, by which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
