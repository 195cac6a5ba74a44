"""The calibration statistics of one layer: for each tensor of its scales, the statistics that it is computed from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokquant.calibration.balance import Maxima
from tokquant.calibration.histogram import MOST
from tokquant.calibration.observers import Observer
from tokquant.calibration.statistics import Mean
from tokquant.quantize import frames
from tokquant.schemes import QuantScheme
from tokquant.transforms import Frame

Operands = tuple[Tensor, Tensor, Tensor]
Shapes = dict[str, tuple[int, int]]
"""Heads and channels of q, k and v."""


@dataclass
class Layer:
    """The statistics of one layer."""

    scheme: QuantScheme
    shapes: Shapes
    dtype: torch.dtype
    parts: dict[str, Any]
    """Statistics by the name of the tensor in `LayerScales` that they are for; a zero shares those of its scale."""
    tokens: dict[str, int]
    """Tokens of q, k and v observed, over all batches."""

    @classmethod
    def empty(cls, scheme: QuantScheme, observer: Observer, shapes: Shapes, dtype: torch.dtype) -> "Layer":
        """A layer without observations."""
        parts: dict[str, Any] = {}
        for operand in (scheme.q, scheme.k, scheme.v):
            if operand.smooth == "static":
                parts[f"{operand.role}_offset"] = Mean(*shapes[operand.role])
            if operand.role == "k" and scheme.balance != "none" and scheme.balance.scale == "static":
                parts["k_balance"] = Maxima(scheme.balance, operand.smooth == "static", *shapes["k"])
            if operand.scale == "static":
                parts[f"{operand.role}_scale"] = observer.statistics(*shapes[operand.role])
        return cls(scheme, shapes, dtype, parts, dict.fromkeys("qkv", 0))

    def observe(self, operands: Operands) -> None:
        """Add a batch. Ranges are observed in the frame that is quantized, as far as it is known before calibration ends.

        Raises ValueError, and nothing of the batch counts, where a transform makes a value that is not finite.
        """
        tokens = {role: x.shape[0] * x.shape[2] for role, x in zip("qkv", operands, strict=True)}
        self._check_room(tokens)
        tensors = dict(zip("qkv", operands, strict=True))
        framed = dict(zip("qkv", frames(*operands, without_static_parts(self.scheme)), strict=True))
        observed: dict[str, Any] = {}
        for name in self.parts:
            role, _, kind = name.partition("_")
            # calibrated offsets and factors are known only at the end; they are linear, so statistics can be corrected then
            observed[name] = framed[role].apply(tensors[role]) if kind == "scale" else tensors[role]
            if kind == "balance":
                observed[name] = tensors["q"], Frame(offset=framed["k"].offset).apply(tensors["k"])
            if kind == "scale" and framed[role].changes and not bool(observed[name].isfinite().all()):
                raise ValueError(f"{role}: holds a value that is not finite once it is balanced or rotated")
        for name, part in self.parts.items():
            part.observe(observed[name])
        self._count(tokens)

    def check_mergeable(self, other: "Layer", name: str) -> None:
        """Raise ValueError if the other has other heads or channels, or more tokens than can be added."""
        for role, shape in self.shapes.items():
            if other.shapes[role] != shape:
                raise ValueError(f"merge: {name}.{role}: heads and channels {list(other.shapes[role])} are not {list(shape)}")
        self._check_room(other.tokens)

    def merge(self, other: "Layer") -> None:
        """Add another's statistics, which `check_mergeable` has accepted."""
        for name, part in self.parts.items():
            part.merge(other.parts[name])
        self._count(other.tokens)

    def mean(self, role: str) -> Tensor:
        """Mean over all tokens of the operand, `[H, D]` float32."""
        return (self.parts[f"{role}_offset"].sum / self.tokens[role]).float()

    def _check_room(self, tokens: dict[str, int]) -> None:
        for role, more in tokens.items():
            if self.tokens[role] + more > MOST:
                raise ValueError(f"{role}: {self.tokens[role]} tokens and {more} more; a calibration counts up to {MOST}")

    def _count(self, tokens: dict[str, int]) -> None:
        for role, more in tokens.items():
            self.tokens[role] += more


def without_static_parts(scheme: QuantScheme) -> QuantScheme:
    """The scheme without static offsets and factors of balance, which are not known during calibration."""
    changed: dict[str, object] = {
        role: getattr(scheme, role).model_copy(update={"smooth": "none"})
        for role in "kv"
        if getattr(scheme, role).smooth == "static"
    }
    if scheme.balance != "none" and scheme.balance.scale == "static":
        changed["balance"] = "none"
    return scheme.model_copy(update=changed)
