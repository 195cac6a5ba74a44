"""Calibrated scales: the static scales, zeros, offsets and factors that a scheme needs for each layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokquant.errors import ScalesError, SchemeError, nearest, quote
from tokquant.schemes import LayerScheme, Operand, QuantScheme, SchemeMap, of_layer, read, resolve
from tokquant.schemes.scheme import SCALE_TYPES


def needed(scheme: QuantScheme) -> list[str]:
    """The tensors a layer needs for `scheme`: some of `q_scale k_balance k_scale k_zero k_offset v_scale v_zero v_offset`."""
    names = ["k_balance"] if scheme.balance != "none" and scheme.balance.scale == "static" else []
    for operand in (scheme.q, scheme.k, scheme.v):
        if operand.scale == "static":
            names += [f"{operand.role}_scale"] + ([] if operand.symmetric else [f"{operand.role}_zero"])
        if operand.smooth == "static":
            names.append(f"{operand.role}_offset")
    return names


def static(scheme: LayerScheme | SchemeMap, layer: str) -> QuantScheme | None:
    """The scheme of a layer where it needs scales; None where it needs none. Raises SchemeError as `of_layer`."""
    found = of_layer(scheme, layer)
    if isinstance(found, QuantScheme):
        return found if needed(found) else None
    if fixed := [part.name for _, part in found.parts if needed(part)]:
        raise SchemeError(f"{layer}: {fixed[0]!r} is static, which a scheme for a range of heads cannot be; make it dynamic")
    return None


@dataclass(frozen=True, eq=False)
class LayerScales:
    """The static scales, zeros, offsets and factors of one layer, by name (`k_scale`, `k_zero`, `k_offset`, `k_balance` ...).

    Shapes are those of the granularity without the batch: tensor `[1, 1, 1]`, head `[H, 1, 1]`, channel `[H, 1, D]`; offsets
    and K's factors of balance `[H, 1, D]`.
    """

    layer: str
    tensors: Mapping[str, Tensor]
    scheme: QuantScheme | None = None
    """The scheme that the tensors are checked against at construction; a preset's name, a path and a map are accepted too."""
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cached copies on other devices, as each copy waits for a GPU."""

    def __post_init__(self):
        if not isinstance(self.tensors, Mapping):
            raise TypeError(f"tensors: {quote(self.tensors)}; give a mapping of names to tensors, such as {{'k_scale': ...}}")
        object.__setattr__(self, "tensors", dict(self.tensors))  # a copy: the checked tensors cannot be exchanged later
        if self.scheme is not None:
            object.__setattr__(self, "scheme", resolve(self.scheme, self.layer))
            self.check(self.scheme)

    @classmethod
    def checked_before(
        cls, layer: str, names: Sequence[str], tensors: Sequence[Tensor], scheme: QuantScheme | None
    ) -> "LayerScales":
        """Scales whose values were checked before and are not read again, as that would wait for a GPU.

        Raises ScalesError for other names or shapes than `scheme` needs.
        """
        made = cls(layer, dict(zip(names, tensors, strict=True)))
        if scheme is not None:
            made.check_form(scheme)
            object.__setattr__(made, "scheme", scheme)
        return made

    def check(self, scheme: QuantScheme | SchemeMap | str) -> None:
        """Raise ScalesError unless these are just what `scheme` needs: finite, and scales and factors above zero."""
        scheme = resolve(scheme, self.layer)
        self.check_form(scheme)
        for name, value in self.tensors.items():
            if name.endswith(("_scale", "_zero")):
                spec: Operand = getattr(scheme, name[0])
                value = value.to(SCALE_TYPES[spec.scale_dtype])  # as it will be used
            if not bool(value.float().isfinite().all()):
                raise ScalesError(f"{self.layer}.{name}: holds a value that is not finite")
            if name.endswith("_scale") and not bool((value.float() > 0).all()):
                raise ScalesError(f"{self.layer}.{name}: holds a scale that is not above zero")
            if name.endswith("_balance") and not bool(((value.float() > 0) & (1 / value.float()).isfinite()).all()):
                raise ScalesError(f"{self.layer}.{name}: holds a factor that is not above zero")

    def check_form(self, scheme: QuantScheme) -> None:
        """Raise ScalesError unless names, types and shapes are those that `scheme` needs."""
        wanted = needed(scheme)
        for name in self.tensors:
            if name not in wanted:
                raise ScalesError(f"{self.layer}.{name}: scheme {scheme.name!r} has no use for it{nearest(name, wanted)}")
        for name in wanted:
            if name not in self.tensors:
                raise ScalesError(f"{self.layer}.{name}: missing; scheme {scheme.name!r} needs {', '.join(wanted)}")
            value = self.tensors[name]
            spec: Operand = getattr(scheme, name[0])
            if not isinstance(value, Tensor):
                raise ScalesError(f"{self.layer}.{name}: a {type(value).__name__} is no tensor")
            if not value.dtype.is_floating_point:
                raise ScalesError(f"{self.layer}.{name}: {value.dtype} is no type for it; use a floating-point type")
            if value.ndim != 3 or any(size != 1 for size, free in zip(value.shape, _free(name, spec), strict=True) if not free):
                of = f" of {spec.granularity}" if name.endswith(("_scale", "_zero")) else ""
                raise ScalesError(f"{self.layer}.{name}: shape {list(value.shape)} is not {_shape(name, spec)}{of}")

    def scale(self, spec: Operand, x: Tensor) -> Tensor:
        """The scale of an operand `x` `[B, H, N, D]`, with a batch dimension and on the operand's device."""
        value = self._fitted(f"{spec.role}_scale", spec.granularity.scale_shape(tuple(x.shape)), x)
        return value.to(SCALE_TYPES[spec.scale_dtype])

    def zero(self, spec: Operand, x: Tensor) -> Tensor | None:
        """The zero of an operand, as `scale`; None where it is symmetric."""
        if spec.symmetric:
            return None
        value = self._fitted(f"{spec.role}_zero", spec.granularity.scale_shape(tuple(x.shape)), x)
        return value.to(SCALE_TYPES[spec.scale_dtype])

    def offset(self, spec: Operand, x: Tensor) -> Tensor:
        """The offset `[B, H, 1, D]` of an operand `[B, H, N, D]`."""
        b, h, _, d = x.shape
        return self._fitted(f"{spec.role}_offset", (b, h, 1, d), x)

    def balance(self, k: Tensor) -> Tensor:
        """The factors `[B, H, 1, D]` of K `[B, H, N, D]`, divided out of Q; float32."""
        b, h, _, d = k.shape
        return self._fitted("k_balance", (b, h, 1, d), k).float()

    def _fitted(self, name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
        value = self.tensors[name]
        if tuple(value.shape) != shape[1:]:
            raise ScalesError(
                f"{self.layer}.{name}: shape {list(value.shape)} does not fit {name[0]} {list(x.shape)}; "
                f"it takes {list(shape[1:])}"
            )
        if value.device != x.device:
            place = name, x.device
            if place not in self._copies:
                self._copies[place] = value.to(x.device)
            value = self._copies[place]
        return value.expand(shape)


def _free(name: str, spec: Operand) -> tuple[bool, bool, bool]:
    """Which of the three dimensions may be other than 1."""
    if name.endswith(("_offset", "_balance")):
        return (True, False, True)
    return (spec.granularity.kind != "tensor", False, spec.granularity.kind == "channel")


def _shape(name: str, spec: Operand) -> str:
    return "[" + ", ".join(size if free else "1" for size, free in zip(("H", "1", "D"), _free(name, spec), strict=True)) + "]"


class Scales(Mapping[str, LayerScales]):
    """The scales of every layer, by the layer's name, with the scheme they were calibrated for.

    `scales["layers.0"]` is what `attention(scales=...)` takes.

    Args:
        scheme: a QuantScheme, a SchemeMap, a preset's name or a path.
        layers: each layer's tensors by name, or LayerScales; `{**some, **others}` joins the layers of two Scales.

    Raises ScalesError as `LayerScales.check` does; SchemeError for a layer that a map has no scheme for.
    """

    def __init__(
        self, scheme: QuantScheme | SchemeMap | str, layers: "Mapping[str, Mapping[str, Tensor]] | Mapping[str, LayerScales]"
    ):
        self.scheme = read(scheme)
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers: {quote(layers)}; give a mapping of layers' names to their tensors")
        self._layers = {
            name: LayerScales(name, given.tensors if isinstance(given, LayerScales) else given, resolve(self.scheme, name))
            for name, given in layers.items()
        }
        if not self._layers:
            raise ScalesError("there are no layers; observe at least one")

    def __getitem__(self, name: str) -> LayerScales:
        if name not in self._layers:
            known = ", ".join(list(self._layers)[:8])
            raise ScalesError(f"scales: no layer {name!r}; there are {known}{nearest(name, self._layers)}")
        return self._layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def get(self, name: str, default=None):
        """The layer of that name, or `default`."""
        return self._layers.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all layers, by full name: `model.layers.0.self_attn.k_scale`."""
        return {f"{layer}.{name}": value for layer, part in self.items() for name, value in part.tensors.items()}

    def __repr__(self) -> str:
        return f"Scales({self.scheme.name!r}, {len(self)} layers)"
