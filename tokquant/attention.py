"""The public functions `attention` and `quantize`: they check arguments, resolve the scheme and call the chosen backend."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokquant import reference
from tokquant.autocast import joined
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales, Scales, needed, static
from tokquant.errors import ScalesError, SchemeError, nearest, quote
from tokquant.inputs import check_flags, check_tensors, check_together, features_of
from tokquant.kernels import launch, sixteen_bit
from tokquant.kernels import quantize as kernels
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu import launch as cpu
from tokquant.kernels.cpu import quantize as cpu_kernels
from tokquant.operators import operator, untraced
from tokquant.quantize import quantize_operands
from tokquant.schemes import HeadSchemes, LayerScheme, QuantScheme, SchemeMap, of_layer
from tokquant.tensor import Coded, QuantizedHeads, QuantizedTensor

Scheme = LayerScheme | SchemeMap | str
Part = tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, QuantScheme]
"""Quantized Q, K and V of heads that share a scheme, and that scheme."""

Backend = Literal["auto", "triton", "cpu", "reference"]
BACKENDS = get_args(Backend)


@untraced("quantize")
def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: Scheme,
    *,
    layer: str | None = None,
    scales: LayerScales | None = None,
    backend: Backend = "auto",
) -> tuple[Coded, Coded, Coded]:
    """Quantize Q, K and V together, as the scheme's transforms need.

    Args:
        q: `[B, H_q, N_q, D]`, float16, bfloat16 or float32, any strides. Never changed.
        k, v: `[B, H_kv, N_k, D]`, H_q a multiple of H_kv.
        scheme: a QuantScheme, a preset's name, the path of a YAML file, or a SchemeMap.
        layer: the layer's name, for a SchemeMap; if None, the layer of `scales`.
        scales: one layer's calibrated scales, `scales["layers.0"]`, for a scheme with static parts.
        backend: where the codes will be used, which decides their layout in memory; every backend accepts every layout.

    Returns: what `attention` takes in place of q, k and v.

    Raises:
        SchemeError: a scheme that cannot be read or does not fit the shapes.
        ScalesError: scales that are missing, unused or of another shape.
        ValueError, TypeError: shapes and types that do not fit. RuntimeError: a tensor that requires grad.
    """
    resolved = scheme_of(scheme, layer, scales)
    check_tensors(q, k, v)
    return quantized(q, k, v, resolved, scales, choose_backend(backend, q.device))


def quantized(
    q: Tensor, k: Tensor, v: Tensor, resolved: LayerScheme, scales: LayerScales | None, backend: str
) -> tuple[Coded, Coded, Coded]:
    """`quantize` for tensors that are already checked, a resolved scheme and a chosen backend."""
    q, k, v = (x.detach() if x.requires_grad else x for x in (q, k, v))
    if isinstance(resolved, HeadSchemes):
        check_heads(resolved, k.shape[1], scales)
        parts = [
            _quantize(q[:, rows], k[:, heads], v[:, heads], part, None, backend) for rows, heads, part in ranges(resolved, q, k)
        ]
        return tuple(QuantizedHeads(operand) for operand in zip(*parts, strict=True))  # type: ignore[return-value]
    check_scales(resolved, scales)
    return _quantize(q, k, v, resolved, scales, backend)


def _quantize(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None, backend: str
) -> launch.Operands:
    if backend == "triton" and launch.available(q.device):
        return kernels.quantize_operands(q, k, v, scheme, scales)
    if backend == "cpu" and q.device.type == "cpu" and build.available():
        return cpu_kernels.quantize_operands(q, k, v, scheme, scales)
    operands = quantize_operands(q, k, v, scheme, scales)
    to_layout = PACKED.get(backend)
    return to_layout(operands, scheme) if to_layout else operands


@operator("Tensor? mask=None")
def attention(
    q: Tensor | Coded,
    k: Tensor | Coded,
    v: Tensor | Coded,
    scheme: Scheme,
    *,
    layer: str | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: LayerScales | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale Q K^T + bias + mask) V in the scheme's precisions.

    Args:
        q, k, v: tensors as `quantize` takes them, or the three that it returned.
        scheme: a QuantScheme, a preset's name, the path of a YAML file, or a SchemeMap.
        layer: the layer's name, for a SchemeMap; if None, the layer of `scales`.
        causal: query i sees keys up to i + N_k - N_q: the last query sees the last key.
        scale: factor of the scores; D**-0.5 if None.
        mask: broadcastable to `[B, H_q, N_q, N_k]`: boolean, True where a pair attends, or floats that are added; a float
            below -2.3e38 masks as -inf does.
        bias: one of `tokquant.bias`, added to the scores: alibi, key_vector, lowrank, dense, svd, squared_distance.
        window: (left, right): query i sees the keys from i + N_k - N_q - left to i + N_k - N_q + right, inclusive; None leaves
            a side open.
        softcap: scores s become softcap * tanh(s / softcap), before bias and mask.
        sinks: `[H_q]`, one more logit for each head, which takes part in the softmax and adds nothing to the output.
        scales: one layer's calibrated scales, for a scheme with static parts.
        return_lse: also return the natural log of the sum of exp(scores), without sinks.
        backend: `triton`, `cpu` (C++, built by the compiler that is found), `reference` (torch, on any device), or `auto`. On
            a GPU `auto` takes triton, or, with a warning, torch's own 16-bit attention for tensors of a shape at which
            `tokquant.tune` found it faster than quantizing. On a CPU it takes cpu, or, with a warning, reference if there is
            no compiler.
        deterministic: ignore what was tuned, so that a kernel gives the same bits on every run and for every batch size. The
            exception is dynamic `tensor` scales, which span the batch. (`reference` sums as torch does, by shapes.)

    Returns: `[B, H_q, N_q, D]` in q's type; with `return_lse` also `[B, H_q, N_q]` float32. A query that attends to nothing
    gets 0 and an LSE of -inf. Means and dynamic scales are taken over the whole sequence, later tokens included.

    Raises: as `quantize`; UnsupportedError where the chosen backend lacks a feature.
    """
    check_flags(return_lse=return_lse, deterministic=deterministic)
    resolved = scheme_of(scheme, layer, scales)
    parts = check_operands(q, k, v, resolved, scales)
    features = features_of(q, k, causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    chosen = choose_backend(backend, q.device)
    if parts is None:
        may_use_torch = backend == "auto" and chosen == "triton" and not deterministic and not return_lse and scales is None
        if may_use_torch and isinstance(resolved, QuantScheme) and sixteen_bit.faster(q, k, v, resolved, features):  # type: ignore[arg-type]
            return sixteen_bit.attention(q, k, v, features)  # type: ignore[arg-type]
        parts = operands_of(resolved, *quantized(q, k, v, resolved, scales, chosen))  # type: ignore[arg-type]
    if len(parts) == 1:
        out, lse = RUN[chosen](*parts[0], features, return_lse, deterministic)
    else:
        spans = (rows for rows, _, _ in ranges(resolved, q, k))  # type: ignore[arg-type]
        results = [
            RUN[chosen](*part, features.of_heads(rows), return_lse, deterministic)
            for rows, part in zip(spans, parts, strict=True)
        ]
        out, lse = (None if x[0] is None else joined(x, dim=1) for x in zip(*results, strict=True))
    return (out, lse) if return_lse else out


def _reference(q, k, v, scheme, features, return_lse, deterministic):
    return reference.attention(q, k, v, scheme, features)


RUN = {"triton": launch.attention, "cpu": cpu.attention, "reference": _reference}
PACKED = {"triton": launch.packed, "cpu": cpu.packed}


def scheme_of(scheme: Scheme, layer: str | None, scales: object = None) -> LayerScheme:
    """The scheme of a layer: the named one, or else the one that the scales are for. Raises SchemeError."""
    return of_layer(scheme, layer if layer is not None else getattr(scales, "layer", None))


def ranges(schemes: HeadSchemes, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, QuantScheme]]:
    """For each range of heads: the slice of Q's heads, the slice of K's and V's heads, and their scheme."""
    shared = q.shape[1] // k.shape[1]
    for heads, scheme in schemes.slices():
        yield slice(heads.start * shared, heads.stop * shared), heads, scheme


def check_heads(schemes: HeadSchemes, heads: int, scales: object) -> None:
    """Raise SchemeError or ScalesError unless the schemes cover `heads` heads of K and V, are dynamic, and `scales` is None."""
    if schemes.heads != heads:
        raise SchemeError(f"scheme: its ranges are of {schemes.heads} heads ({schemes}), and k has {heads}")
    static(schemes, "scheme")  # raises for static parts
    if scales is not None:
        raise ScalesError(f"scales: no scheme of these heads has a use for them ({schemes})")


def check_operands(q: object, k: object, v: object, scheme: LayerScheme, scales: object) -> list[Part] | None:
    """Operands and scheme of each range of heads if q, k and v are quantized already; None if they are tensors.

    Raises unless all three were quantized by this scheme, or all are tensors that can be quantized.
    """
    coded = [isinstance(x, Coded) for x in (q, k, v)]
    if any(coded) and not all(coded):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise TypeError(f"q, k, v: either all tensors or all QuantizedTensors, not {kinds}")
    if not all(coded):
        check_tensors(q, k, v)
        return None
    if scales is not None:
        raise ScalesError("scales: the tensors are quantized already; give scales to quantize")
    parts = operands_of(scheme, q, k, v)
    for part in parts:
        _check_quantized(*part)
    return parts


def operands_of(scheme: LayerScheme, q: Any, k: Any, v: Any) -> list[Part]:
    """Operands and scheme of each range of heads, or of all heads if they share a scheme.

    Raises ValueError for operands that were quantized by ranges of heads other than the scheme's.
    """
    if isinstance(scheme, HeadSchemes):
        if not all(isinstance(x, QuantizedHeads) and len(x.parts) == len(scheme.parts) for x in (q, k, v)):
            raise ValueError(f"q, k, v: not of {scheme}; attend by the scheme that quantize was given")
        return list(zip(q.parts, k.parts, v.parts, (part for _, part in scheme.parts), strict=True))
    if any(isinstance(x, QuantizedHeads) for x in (q, k, v)):
        raise ValueError(f"q, k, v: their heads are of other schemes than {scheme.name!r}; attend by those of quantize")
    return [(q, k, v, scheme)]


def check_backend(backend: object) -> None:
    """Raise ValueError unless this is a backend's name or `auto`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: {quote(backend)} is not valid; use {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}")


def choose_backend(backend: str, device: torch.device) -> str:
    """The named backend, or for `auto` the one for this device. Raises ValueError for an unknown name."""
    check_backend(backend)
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton"
    if device.type != "cpu":
        return "reference"
    if not build.available():
        # shown once: Python repeats no warning with the same text and place
        warnings.warn(
            "no C++ compiler: attention on a CPU runs on the reference, with the same results, several times slower; "
            "install g++ or set CXX, or say backend='reference'",
            stacklevel=1,
        )
        return "reference"
    return "cpu"


def quantizing_backend(backend: Backend, device: torch.device) -> Backend:
    """The backend argument with which `attention` always quantizes, even where tuning found 16 bits faster.

    For measurements and models, which mean the scheme. torch.compile can trace this function.
    """
    return "triton" if backend == "auto" and device.type == "cuda" else backend


def _check_quantized(q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.spec.role != name:
            raise ValueError(f"{name}: {x!r} is a quantized {x.spec.role}; give q, k and v in the order quantize returned them")
        if x.scheme is not scheme and (x.scheme is None or x.scheme.digest() != scheme.digest()):
            raise ValueError(f"{name}: {x!r} is of another scheme; attend by the one that quantize was given")
    check_together(q, k, v)


def check_one_layer(scales: object) -> None:
    """Raise TypeError unless this is the LayerScales of one layer, or None."""
    if isinstance(scales, Scales):
        raise TypeError(f"scales: these are of {len(scales)} layers; give one, such as scales[{next(iter(scales))!r}]")
    if scales is not None and not isinstance(scales, LayerScales):
        raise TypeError(f"scales: a {type(scales).__name__}; give one layer of load_scales(path), such as scales['layers.0']")


def check_scales(scheme: QuantScheme, scales: LayerScales | None) -> None:
    """Raise TypeError or ScalesError unless these are one layer's scales for this scheme, or None if it needs no scales."""
    check_one_layer(scales)
    if scales is not None:
        if scales.scheme != scheme:  # scales from a file were checked when it was read
            scales.check(scheme)
    elif needed(scheme):
        raise ScalesError(
            f"scales: scheme {scheme.name!r} is static and needs {', '.join(needed(scheme))}; "
            "calibrate with tokquant.Calibrator or `tokquant calibrate`, then give scales= (--scales on the command line)"
        )
