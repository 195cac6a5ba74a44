"""Calibrator: observes activations, and computes the static scales, offsets and factors of a scheme from them."""

import numbers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokquant.calibration import observers, state
from tokquant.calibration.layers import Layer
from tokquant.calibration.scales import Scales, needed, static
from tokquant.calibration.statistics import Change
from tokquant.calibration.watching import Watcher
from tokquant.errors import ScalesError, SchemeError, quote
from tokquant.inputs import check_tensors
from tokquant.quantize import asymmetric_scale, symmetric_scale
from tokquant.schemes import Operand, QuantScheme, SchemeMap, read
from tokquant.schemes.placement import place
from tokquant.transforms import Frame, sixteen_bit


class Calibrator:
    """Collects statistics of Q, K and V layer by layer and turns them into scales.

    Args:
        scheme: with at least one static part; a QuantScheme, a SchemeMap, a preset's name or a path. Layers of a map that
            need no scales are skipped.
        observer: `"amax"`; `"percentile:99.9"` to clip the rest; `"mse"` to clip where codes lose least; `"ema:0.99"`, the
            moving average of each batch's extremes.

    Raises SchemeError where there is nothing to calibrate, ValueError for an observer that is none.
    """

    def __init__(self, scheme: QuantScheme | SchemeMap | str, observer: str | observers.Observer = "amax"):
        self.scheme = read(scheme)
        self.observer = observers.parse(observer)
        if not any(map(needed, self.scheme.schemes())):
            raise SchemeError(
                f"scheme {self.scheme.name!r} has no static part to calibrate; "
                "give an operand or a balance scale: static (an operand's per tensor, head or channel), or k smooth: static"
            )
        for each in self.scheme.schemes():
            _check_balance(each)
        self.layers: dict[str, Layer] = {}
        self.sources: dict[str, str] = {}
        """Sources of the data, names by digest: callers may record them here, so that `merge` can refuse to count one twice."""

    def observe(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add a batch of layer `name`: q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`, any lengths.

        Raises ValueError if a value is not finite, or the heads or channels are not those of earlier batches; nothing of the
        batch then counts.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: {quote(name)} is no name of a layer")
        with torch.no_grad():
            check_tensors(q, k, v)
            operands = (q.detach(), k.detach(), v.detach())
            for role, x in zip("qkv", operands, strict=True):
                if not bool(x.isfinite().all()):
                    raise ValueError(f"{name}.{role}: holds a value that is not finite")
            scheme = static(self.scheme, name)
            if scheme is None:
                return
            shapes = {role: (x.shape[1], x.shape[3]) for role, x in zip("qkv", operands, strict=True)}
            layer = self.layers.get(name) or Layer.empty(scheme, self.observer, shapes, k.dtype)
            for role, shape in shapes.items():
                if shape != layer.shapes[role]:
                    earlier = list(layer.shapes[role])
                    raise ValueError(
                        f"{name}.{role}: heads and channels {list(shape)} are not {earlier}, as in earlier batches"
                    )
            layer.observe(operands)
        self.layers[name] = layer

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Observe every `torch.nn.functional.scaled_dot_product_attention` that modules of `model` call in this block.

        A layer is named after the module that makes the call, such as `model.layers.0.self_attn`; further calls in one
        forward of a module end in `:2`, `:3` ... K and V are taken as they are passed: with their own heads under
        `enable_gqa=True`, and with repeated heads from a model that repeats them for the queries.

        Raises ValueError if no attention was seen by the end, and as `observe` does, naming the layer. What was seen before
        an error counts.
        """
        with Watcher(model, self.observe).watching():
            yield

    def merge(self, other: "Calibrator") -> None:
        """Add the statistics of another calibrator of the same scheme and observer, as if its batches had come after these.

        Raises ValueError, and nothing changes, if scheme, observer or shapes differ, or both have seen the same source.
        """
        if not isinstance(other, Calibrator):
            raise TypeError(f"merge: {quote(other)}; give another Calibrator")
        if other is self:
            raise ValueError("merge: this is the calibrator itself, and all it has seen would count twice")
        if (self.scheme, self.observer) != (other.scheme, other.observer):
            raise ValueError("merge: the other calibrator has another scheme or observer")
        if both := self.sources.keys() & other.sources.keys():
            raise ValueError(f"merge: both have seen {quote(self.sources[min(both)])}, which would count twice")
        for name, theirs in other.layers.items():
            if name in self.layers:
                self.layers[name].check_mergeable(theirs, name)
        for name, theirs in other.layers.items():
            if name not in self.layers:
                self.layers[name] = Layer.empty(theirs.scheme, self.observer, dict(theirs.shapes), theirs.dtype)
            self.layers[name].merge(theirs)
        self.sources |= other.sources

    def save(self, path: str | os.PathLike) -> None:
        """Write all statistics, atomically, so that `load` can continue from here."""
        state.write(path, state.State(self.scheme, self.observer, self.layers, self.sources))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Calibrator":
        """Read a saved calibrator. Raises ScalesError naming the file and what is wrong with it."""
        read = state.read(path)
        calibrator = cls(read.scheme, read.observer)
        calibrator.layers, calibrator.sources = read.layers, read.sources
        return calibrator

    def scales(self, margin: float = 1.0) -> Scales:
        """The scales of every layer observed, for ranges `margin` times as wide as the observer's.

        Later values may exceed those observed; a margin leaves room for them. Raises ScalesError if there is no layer, or
        for a scale that its type does not hold, naming the layer; ValueError for a margin that is not above zero.
        """
        if isinstance(margin, bool) or not isinstance(margin, numbers.Real) or not 0 < margin <= sys.float_info.max:
            raise ValueError(f"margin: {quote(margin)} is not a number above zero; 1.25 leaves a quarter of room")
        found = {}
        for name, layer in self.layers.items():
            try:
                found[name] = self._layer(layer, float(margin))
            except ValueError as error:
                raise ScalesError(f"{name}.{error}") from None
        return Scales(self.scheme, found)

    def __repr__(self) -> str:
        return f"Calibrator({self.scheme.name!r}, '{self.observer}', {len(self.layers)} layers)"

    def _layer(self, layer: Layer, margin: float) -> dict[str, Tensor]:
        """The tensors of one layer's scales; K before Q, whose range may depend on K's scale and factors."""
        tensors: dict[str, Tensor] = {}
        for operand in (layer.scheme.k, layer.scheme.q, layer.scheme.v):
            role = operand.role
            if operand.smooth == "static":
                tensors[f"{role}_offset"] = layer.mean(role)[:, None].to(sixteen_bit(layer.dtype)).contiguous()
            if f"{role}_balance" in layer.parts:
                tensors[f"{role}_balance"] = layer.parts[f"{role}_balance"].factors(tensors.get(f"{role}_offset"))
            if operand.scale == "static":
                seen = layer.parts[f"{role}_scale"]
                low, high = self.observer.range(seen, operand, self._change(operand, layer, tensors))
                tensors |= _scale(operand, low, high, margin)
        return tensors

    def _change(self, operand: Operand, layer: Layer, found: dict[str, Tensor]) -> Change:
        """How offsets, static factors of balance, and K's scale where it goes into Q, change the operand's observed values."""
        role, shape = operand.role, layer.shapes[operand.role]
        shift, factor = (torch.full(shape, value, dtype=torch.float32, device="cpu") for value in (0, 1))
        if operand.smooth == "static":
            offset = found[f"{role}_offset"][None]
            rotated = (layer.scheme.rotate_v if role == "v" else layer.scheme.rotate) == "hadamard"
            shift = Frame(offset=offset, rotated=rotated).apply(torch.zeros_like(offset))[0, :, 0]
        if role in "qk" and "k_balance" in found:
            balance = _of_heads(found["k_balance"], shape[0])
            factor = factor * balance if role == "k" else factor / balance
        if role == "q" and place(layer.scheme.k) == "q" and layer.scheme.k.scale == "static":
            factor = factor * _of_heads(found["k_scale"], shape[0])
        return Change(shift, factor)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """`[H_kv, 1, D] -> [heads, D]` float32: a head of K's values, repeated for every head that shares it."""
    return x.float().squeeze(1).repeat_interleave(heads // x.shape[0], dim=0)


def _check_balance(scheme: QuantScheme) -> None:
    """Refuse static scales of Q or K whose observed ranges could not be corrected once offsets and factors are known.

    A channel's range can be multiplied by its factor afterwards; that of a sum of channels, as a rotation makes, cannot.
    """
    fixed = [role for role in "qk" if getattr(scheme, role).scale == "static"]
    if not fixed or scheme.balance == "none":
        return
    if scheme.balance.scale == "dynamic":
        if scheme.k.smooth == "static":
            text = "its scale cannot be static beside a static offset of K under a balance, which depends on that offset"
            raise SchemeError([(fixed[0], f"{text}; use balance {{{scheme.balance.kind}: {{scale: static}}}}")])
    elif scheme.rotate != "none":
        text = "its scale cannot be static where a static balance is rotated: what the rotation adds up is known only after it"
        raise SchemeError([(fixed[0], f"{text}; use scale: dynamic, or rotate: none")])


def _scale(operand: Operand, low: Tensor, high: Tensor, margin: float) -> dict[str, Tensor]:
    if operand.symmetric:
        return {f"{operand.role}_scale": symmetric_scale(torch.maximum(low.abs(), high.abs()) * margin, operand)}
    room = high * ((margin - 1) / 2) - low * ((margin - 1) / 2)
    scale, zero = asymmetric_scale(low - room, high + room, operand)
    return {f"{operand.role}_scale": scale, f"{operand.role}_zero": zero}
