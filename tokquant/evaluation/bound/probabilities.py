"""Bounds on the error of rounding P."""

import math

import torch
from torch import Tensor

from tokquant.precisions import Precision
from tokquant.schemes import QuantScheme


def rounding_of_p(
    log2_p: Tensor, drift: Tensor, scheme: QuantScheme, dtype: torch.dtype, stacked: bool
) -> tuple[Tensor, Tensor]:
    """Largest error of P's codes, in units of the codes, and log2 of that unit.

    Args:
        log2_p: base-2 logits including V's weight `[..., N]`, -inf where masked.
        drift: largest error of the logarithm of a weight before rounding, `[..., N]`.
        dtype: of V.
        stacked: whether a kernel subtracts 128 from codes and adds it back with the tile's sum of V, in float32.

    Returns: `[..., T, n]` and `[..., T, 1]` of T key tiles. The error of rounding to nearest is the distance to the nearest
    code, which changes no faster than the value that is rounded: so `drift` is added, whichever way a tie goes. Where the unit
    is not known (against a running maximum, with tiles that a kernel chooses; or 2^64 below the row's maximum), the error is
    the worst over all units up to the row's.
    """
    tile, n, largest = scheme.key_tile, log2_p.shape[-1], scheme.p.format.largest or 1.0
    padding = (0, -n % tile)
    t = torch.nn.functional.pad(log2_p, padding, value=-math.inf).unflatten(-1, (-1, tile))
    off = torch.nn.functional.pad(drift, padding).unflatten(-1, (-1, tile))
    highest = t.amax(dim=-1, keepdim=True)
    running = highest.cummax(dim=-2).values
    if scheme.p.granularity.kind == "unit":
        unit, loose = running[..., -1:, :].expand_as(running), torch.ones_like(running, dtype=torch.bool)
    else:
        unit, loose = torch.maximum(highest, running - 64), highest < running - 64
    unit = torch.where(highest == -math.inf, 0.0, unit + unit.abs() * 2.0**-23)
    x = largest * torch.exp2(t - unit)
    error = torch.minimum(
        _error(x, loose, scheme.p.format, dtype) + x * torch.expm1(off.clamp(max=700)), _widest(scheme, dtype, x)
    )
    if stacked:
        error = error + torch.where(highest == -math.inf, 0.0, 2.0**-15)
    return error, unit - math.log2(largest)


def _float_of(precision: Precision, dtype: torch.dtype) -> torch.dtype | None:
    """The floating-point type that P is cast to; None for a precision of few bits."""
    return None if precision.bits < 16 else precision.of(dtype).stored


def _widest(scheme: QuantScheme, dtype: torch.dtype, like: Tensor) -> Tensor:
    kind = _float_of(scheme.p.format, dtype)
    if kind is not None:
        return like.new_tensor(torch.finfo(kind).eps)
    return like.new_tensor(scheme.p.format.values().diff().max().item() / 2)


def _error(x: Tensor, loose: Tensor, precision: Precision, dtype: torch.dtype) -> Tensor:
    kind = _float_of(precision, dtype)
    if kind is not None:
        info = torch.finfo(kind)
        return torch.maximum(x * (info.eps / 2), x.clamp(max=info.smallest_normal * info.eps / 2))
    nearest = (precision.decode(precision.encode(x.float())).double() - x).abs()
    values = precision.values().double().to(x.device)
    values = values[values >= 0]
    middles = (values[1:] + values[:-1]) / 2
    # in units of u <= 1, x is off by u |y - code(y)| with y = x / u: at most x times the largest share beyond x
    shares = ((values[1:] - values[:-1]) / (values[1:] + values[:-1])).flip(0).cummax(dim=0).values.flip(0)
    shares = torch.nn.functional.pad(shares, (0, 1))
    worst = torch.maximum(nearest, x * shares[torch.searchsorted(middles, x)])
    return torch.where(loose, worst, nearest)
