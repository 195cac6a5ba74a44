"""Error and cost of every candidate scheme in every layer: the table that a search reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant import reference
from tokquant.attention import attention, check_heads, quantizing_backend, ranges
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import LayerScales, needed
from tokquant.errors import SchemeError, quote
from tokquant.evaluation.front import Floats
from tokquant.evaluation.sampling import runs
from tokquant.features import Features
from tokquant.inputs import check_tensors, features_of
from tokquant.io_model.workload import seen
from tokquant.kernels import targets
from tokquant.kernels.compile import kernel_of
from tokquant.kernels.wanted import Wanted
from tokquant.metrics import errors
from tokquant.quantize import quantize_operands
from tokquant.schemes import HeadSchemes, LayerScheme, QuantScheme, SchemeMap, of_layer
from tokquant.schemes.heads import parts_of
from tokquant.timing import interleaved_medians

Activations = Mapping[str, tuple[Tensor, Tensor, Tensor]]
Progress = Callable[[Iterator[str], int], Iterator[str]]


@dataclass(frozen=True)
class Table:
    """Errors and costs of schemes, layer by layer; infinite where a scheme does not fit.

    A unit is what takes one scheme: a layer, or one of its heads of K and V. A layer's error and cost are sums over its units.
    """

    layers: list[str]
    kv_heads: list[int]
    schemes: list[QuantScheme | SchemeMap]
    error: list[Floats]
    """`[units, schemes]` for each layer."""
    cost: list[Floats]
    """`[units, schemes]` for each layer; they add up over layers."""
    unfit: dict[str, str]
    """Schemes that do not fit every layer, by name: the first layer that they do not fit, and why."""


def measure(
    activations: Activations,
    schemes: Sequence[QuantScheme | SchemeMap],
    *,
    metric: str = "rel_l1",
    cost: str = "bits",
    heads: bool = False,
    rows: int | None = 256,
    target: str | None = None,
    relative_to: QuantScheme | SchemeMap | None = None,
    progress: Progress | None = None,
    **features: Any,
) -> Table:
    """Error and cost of every scheme in every layer; arguments are those of `tokquant.search`."""
    layers = list(activations)
    kv_heads, errors_of, costs_of, values = [], [], [], 0
    unfit: dict[str, str] = {}
    for layer in progress(iter(layers), len(layers)) if progress else layers:
        q, k, v = operands(activations, layer)
        judge = _Judge(q, k, v, rows, heads, metric, features)
        layer_schemes = [of_layer(scheme, layer) for scheme in schemes]
        judged = [judge.error(scheme) for scheme in layer_schemes]
        found = np.stack([error for error, _ in judged], axis=1)
        for scheme, (_, why) in zip(schemes, judged, strict=True):
            if why is not None:
                unfit.setdefault(scheme.name, f"{layer}: {why}")
        if relative_to is not None:
            base = judge.error(of_layer(relative_to, layer))[0].sum()
            if not 0 < base < np.inf:
                why = "has no error" if base == 0 else "does not fit, or gives what is no number,"
                raise ValueError(f"relative_to: {relative_to.name!r} {why} in layer {quote(layer)}; count in another's errors")
            found = found / base
        if cost != "ms":
            spent = [_bits(q, k, scheme, cost) for scheme in layer_schemes]
            values += k.numel() + v.numel() + (q.numel() if cost == "bits" else 0)
        elif target is None:
            spent = [_measured_ms(q, k, v, scheme, features) for scheme in layer_schemes]
        else:
            spent = [_predicted_ms(q, k, scheme, target, judge.features) for scheme in layer_schemes]
        kv_heads.append(k.shape[1])
        errors_of.append(found)
        costs_of.append(np.repeat(np.array(spent)[None] / len(found), len(found), axis=0))
    if cost != "ms":  # bits per value
        costs_of = [each / values for each in costs_of]
    return Table(layers, kv_heads, list(schemes), errors_of, costs_of, unfit)


def operands(activations: Activations, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of a layer. Raises ValueError or TypeError, naming the layer, unless they are finite and fit each other."""
    given = activations[layer]
    try:
        if not isinstance(given, Sequence) or len(given) != 3:
            raise TypeError(f"{quote(given)} is not (q, k, v)")
        q, k, v = given
        check_tensors(q, k, v)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name}: holds a value that is not finite")
    except (ValueError, TypeError) as error:
        raise type(error)(f"activations of {quote(layer)}: {error}") from None
    return q, k, v


class _Judge:
    """Measures schemes against the exact output of a sample of one layer's queries."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rows: int | None, heads: bool, metric: str, features: dict[str, Any]):
        self.operands, self.metric = (q, k, v), metric
        self.units = k.shape[1] if heads else 1
        self.features = features_of(q, k, **features)
        self.only = runs(q.shape[2], rows)
        self.exact, _ = reference.oracle(q, k, v, self.features, self.only)

    def error(self, scheme: LayerScheme) -> tuple[Floats, str | None]:
        """The error of each unit, infinite where the scheme does not fit this layer or its output is not finite; then why."""
        try:
            out = self.output(scheme)
        except ValueError as error:  # a group that does not divide head_dim, a scale that its type does not hold
            return np.full(self.units, np.inf), str(error)
        if self.units == 1:
            value = getattr(errors(out, self.exact), self.metric)
            found = np.array([1 - value if self.metric == "cosine" else value])
        else:
            off = (out.double() - self.exact).abs().unflatten(1, (self.units, -1)).sum(dim=(0, 2, 3, 4))
            found = (off / self.exact.abs().sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu().numpy()
        finite = np.isfinite(found)
        return np.where(finite, found, np.inf), None if finite.all() else "its output is not finite"

    def output(self, scheme: LayerScheme) -> Tensor:
        """Attention with the scheme for the sampled queries, `[B, H_q, rows, D]`."""
        q, k, v = self.operands
        if isinstance(scheme, HeadSchemes):
            check_heads(scheme, k.shape[1], None)
            outs = [
                _emulated(q[:, rows], k[:, heads], v[:, heads], own, self.features.of_heads(rows), self.only)
                for rows, heads, own in ranges(scheme, q, k)
            ]
            return torch.cat(outs, dim=1)
        return _emulated(q, k, v, scheme, self.features, self.only)


def _emulated(q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, features: Features, only: list[slice]) -> Tensor:
    codes = quantize_operands(q, k, v, scheme, scales_for(scheme, q, k, v))
    return reference.attention(*codes, scheme, features, only=only)[0]


def scales_for(scheme: LayerScheme, q: Tensor, k: Tensor, v: Tensor) -> LayerScales | None:
    """Scales calibrated on these very tensors; None for a scheme that needs none."""
    if isinstance(scheme, HeadSchemes) or not needed(scheme):
        return None
    calibrator = Calibrator(scheme)
    calibrator.observe("layer", q, k, v)
    return calibrator.scales()["layer"]


def _bits(q: Tensor, k: Tensor, scheme: LayerScheme, cost: str) -> float:
    total = 0.0
    for heads, part in parts_of(scheme):
        try:
            bits = part.bits_per_value(q.shape[3])
        except SchemeError:
            return np.inf
        of_keys = (bits["k"] + bits["v"]) * k.numel()
        total += (of_keys + (bits["q"] * q.numel() if cost == "bits" else 0)) * (heads or k.shape[1]) / k.shape[1]
    return total


def _measured_ms(q: Tensor, k: Tensor, v: Tensor, scheme: LayerScheme, features: dict[str, Any]) -> float:
    """Milliseconds of attention with quantization, measured."""
    scales = scales_for(scheme, q, k, v)
    own = quantizing_backend("auto", q.device)
    [found] = interleaved_medians([partial(attention, q, k, v, scheme, scales=scales, backend=own, **features)], 3, q.device)
    return found


def _predicted_ms(q: Tensor, k: Tensor, scheme: LayerScheme, target: str, features: Features) -> float:
    """Milliseconds of attention on codes: its operations at the rate predicted for such kernels on the target."""
    (b, h, n_q, d), (kv_heads, n_k) = q.shape, k.shape[1:3]
    first, end = seen(n_q, n_k, features.reach())
    operations = 4 * b * h * int(np.maximum(end - first, 0).sum()) * d
    wanted, sizes = Wanted.of(features, False), dict(head_dim=d, dtype=torch.float16, shared_heads=h // kv_heads)
    ms = 0.0
    for heads, part in parts_of(scheme):
        kernel = kernel_of(part, wanted, **sizes, target=targets.get(target))  # type: ignore[arg-type]
        ms += (heads or kv_heads) / kv_heads * operations / kernel.prediction.serial_tops / 1e9
    return ms
