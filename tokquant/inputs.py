"""Checks of the arguments of attention. Each error names the argument."""

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tokquant.bias import Bias
from tokquant.errors import first_line, quote
from tokquant.features import Features
from tokquant.tensor import Coded

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""The supported types by the names that files use for them."""


def check_tensors(q: object, k: object, v: object) -> None:
    """Raise TypeError, ValueError or RuntimeError unless these are Q, K and V that `attention` can take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    check_together(q, k, v)  # type: ignore[arg-type]


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError, ValueError or RuntimeError unless this is a tensor that can be quantized."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {type(x).__name__}; give a torch.Tensor [B, H, N, D]")
    check_memory(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: {x.dtype} is not supported; use float16, bfloat16 or float32")
    if x.ndim != 4:
        raise ValueError(f"{name}: shape {list(x.shape)} has {x.ndim} dimensions; give [batch, heads, tokens, head_dim]")
    if 0 in x.shape:
        raise ValueError(f"{name}: shape {list(x.shape)} is empty; give at least one of batch, heads, tokens and head_dim")
    check_no_grad(name, x)


def check_memory(name: str, x: object) -> None:
    """Raise TypeError for a tensor whose values cannot be read from memory at strides: nested, sparse, fake, lazily negated."""
    if not isinstance(x, Tensor):
        return
    if x.is_nested:
        raise TypeError(f"{name}: a nested tensor; give a dense one, and sequences of several lengths to tq.attention_varlen")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: a tensor of layout {x.layout}; give a dense one")
    if without_numbers(x):
        raise TypeError(f"{name}: stands for numbers that it does not hold, as in FakeTensorMode or torch.vmap; give those")
    if x.is_neg():
        # such as the imaginary part of a lazily conjugated tensor
        raise TypeError(f"{name}: a view that torch negates when it is read; give its resolve_neg()")


def without_numbers(x: object) -> bool:
    """Whether a tensor has no memory that a kernel could read: a FakeTensor, or a wrapper made by torch.func."""
    if not isinstance(x, Tensor):
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or (type(x) is not Tensor and isinstance(x, FakeTensor))


def check_no_grad(name: str, x: object) -> None:
    """Raise RuntimeError for a tensor that requires a gradient while autograd is on."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: requires grad, and quantized attention has no backward; call it under torch.no_grad()")


def check_beside_cache(
    name: str, x: object, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, queries: bool = False
) -> None:
    """Raise TypeError, ValueError or RuntimeError unless a tensor fits a cache.

    Args:
        sizes: (batch, heads of K and V, head_dim) of the cache.
        queries: whether the tensor is Q, which may have a multiple of the cache's heads.
    """
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    (batch, heads, d), shape = sizes, x.shape
    if shape[0] != batch or shape[3] != d or (shape[1] % heads if queries else shape[1] != heads):
        wanted = f"[{batch}, {'a multiple of ' if queries else ''}{heads}, tokens, {d}]"
        raise ValueError(f"{name}: shape {list(shape)} does not fit the cache; give {wanted}")
    if x.dtype != dtype:
        raise TypeError(
            f"{name}: {x.dtype}, and the cache is of {dtype}; make the cache with dtype={x.dtype}, or convert {name}"
        )
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, and the cache on {device}")


def check_together(q: Tensor | Coded, k: Tensor | Coded, v: Tensor | Coded) -> None:
    """Raise TypeError or ValueError unless the types, devices and shapes of Q, K and V match."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v: types {q.dtype}, {k.dtype}, {v.dtype} differ; give one type")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: on {q.device}, {k.device}, {v.device}; put them on one device")
    if k.shape != v.shape:
        raise ValueError(f"v: shape {list(v.shape)} is not that of k, {list(k.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k: batch {k.shape[0]} is not that of q, {q.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"k: head_dim {k.shape[3]} is not that of q, {q.shape[3]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k: {k.shape[1]} heads do not divide the {q.shape[1]} of q")


def check_flags(**flags: object) -> None:
    """Raise TypeError unless every flag is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {quote(flag)} is not a bool")


def check_device(given: Any) -> torch.device:
    """The torch device for an argument. Raises ValueError unless tensors can be made on it."""
    try:
        device = torch.empty(0, device=given).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"device: {quote(given)} is none that torch has here ({first_line(error)})") from None
    if device.type == "meta":
        raise ValueError("device: 'meta' keeps no numbers; use cpu or cuda")
    return device


def features_of(
    q: Tensor | Coded,
    k: Tensor | Coded,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias | None = None,
) -> Features:
    """The features of a call to `attention`, checked, with defaults filled in and masks expanded."""
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    check_flags(causal=causal)
    scale = d**-0.5 if scale is None else _finite("scale", scale)
    if softcap is not None:
        if (number := _finite("softcap", softcap)) <= 0:
            raise ValueError(f"softcap: {quote(softcap)} is not above zero; leave it out for none")
        softcap = number
    if window is not None:
        window = window_of(window)
    if bias is not None and not isinstance(bias, Bias):
        raise TypeError(
            f"bias: a {type(bias).__name__}; give one of tokquant.bias: alibi, key_vector, lowrank, "
            + ("or dense(tensor)" if isinstance(bias, Tensor) else "dense, svd or squared_distance")
        )
    parts = [] if bias is None else bias.tensors()
    for name, tensor in (("mask", mask), ("sinks", sinks), *(("bias", part) for part in parts)):
        check_memory(name, tensor)
        check_no_grad(name, tensor)
        if isinstance(tensor, Tensor) and tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, and q on {q.device}")
    if mask is not None:
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: {kind} is no mask; give a boolean tensor (True = attend) or floats to add")
        try:
            mask = mask.expand(b, heads, n_q, n_k)
        except RuntimeError:
            raise ValueError(f"mask: shape {list(mask.shape)} does not broadcast to {[b, heads, n_q, n_k]}") from None
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
            kind = sinks.dtype if isinstance(sinks, Tensor) else f"a {type(sinks).__name__}"
            raise TypeError(f"sinks: {kind}; give a floating-point tensor [H_q]")
        if sinks.shape != (heads,):
            raise ValueError(f"sinks: shape {list(sinks.shape)} is not [{heads}], one logit for each head of q")
    if bias is not None:
        bias = bias.expand(b, heads, n_q, n_k)
    return Features(scale=scale, causal=causal, window=window, mask=mask, softcap=softcap, sinks=sinks, bias=bias)


def window_of(window: Any) -> tuple[int | None, int | None]:
    """A window as (left, right), each a whole number or None for an open side. Raises ValueError."""
    try:
        left, right = window
        if isinstance(left, bool) or isinstance(right, bool):
            raise ValueError
        left, right = (side if side is None else operator.index(side) for side in (left, right))
        if any(side is not None and side < 0 for side in (left, right)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"window: {quote(window)} is not (left, right); give whole numbers from 0, or None for an open side"
        ) from None
    # kernels add these to positions in 32 bits; 2**30 is longer than any sequence
    return left if left is None else min(left, 2**30), right if right is None else min(right, 2**30)


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {quote(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: {quote(value)} is not finite")
    if abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: {quote(value)} is more than float32 holds, in which logits are computed")
    return number
