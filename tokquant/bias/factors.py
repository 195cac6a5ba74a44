"""Low-rank factors of biases: from a singular value decomposition, and for distances between points."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tokquant.autocast import joined
from tokquant.bias.kinds import Dense, LowRank, check_floats, check_sixteen_bits, lowrank
from tokquant.errors import quote
from tokquant.whole_numbers import whole_number


def svd(values: Tensor, energy: float = 0.995, largest_rank: int = 32, dtype: torch.dtype = torch.float16) -> LowRank | Dense:
    """Factors of a constant bias by singular value decomposition (FlashBias, arXiv 2505.12044). Compute them once.

    Args:
        values: `[H, N_q, N_k]` or `[B, H, N_q, N_k]`, finite.
        energy: the share of the squared singular values that every head must keep.
        largest_rank: the largest rank of the factors.
        dtype: of the factors, float16 or bfloat16; both factors get the square roots of the singular values.

    Returns: LowRank, with the `energy` that each head keeps; or Dense with `values`, if the rank would exceed `largest_rank`
    or the factors would be no smaller than the bias.

    Raises TypeError, ValueError; the latter also if the factors do not fit float16.
    """
    check_floats("values", values)
    check_sixteen_bits("dtype", dtype)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"values: shape {list(values.shape)}; give [heads, N_q, N_k] or [batch, heads, N_q, N_k]")
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise ValueError(f"energy: {quote(energy)} is no share; give more than 0 and at most 1")
    largest_rank = whole_number("largest_rank", largest_rank, 1)
    if not bool(values.isfinite().all()):
        raise ValueError("values: not all finite; give what is masked as mask")
    wide = values if values.dtype == torch.float64 else values.float()
    u, s, vh = torch.linalg.svd(wide[None] if values.ndim == 3 else wide, full_matrices=False)
    squares = s.double().square()
    # the share that each rank leaves out, summed from the smallest value so that small ones are not rounded away
    left_out = squares.flip(-1).cumsum(-1).flip(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-300)
    needed = max(1, int((left_out > 1 - energy).sum(-1).max()))
    n_q, n_k = values.shape[-2:]
    # a kernel multiplies whole blocks of columns, so filling the last block costs nothing
    rank = min(block_of(needed), largest_rank, s.shape[-1])
    if needed > largest_rank or (n_q + n_k) * rank >= n_q * n_k:
        return Dense(values)
    root = s[..., None, :rank].sqrt()
    q, k = ((x[..., :rank] * root).to(dtype) for x in (u, vh.mT))
    if not bool(q.isfinite().all() and k.isfinite().all()):
        raise ValueError(f"values: singular values up to {float(s.max()):.4g} do not fit float16; use dtype=torch.bfloat16")
    kept = 1 - torch.nn.functional.pad(left_out, (0, 1))[..., rank]
    return replace(lowrank(q, k), energy=kept[0] if values.ndim == 3 else kept)


def squared_distance(
    x: Tensor, y: Tensor | None = None, weight: float | Tensor = 1.0, dtype: torch.dtype = torch.float16
) -> LowRank:
    """Factors of -weight * |x_i - y_j|^2, for points in space.

    |x|^2 + |y|^2 - 2 x . y suffers from cancellation. So points are centred, and every number is split into a high and a low
    16-bit part: 9 columns for the products of three coordinates, 2 and 3 for the two norms, and 2 of zeros.

    With s the largest distance along an axis from the middle of all points, rounded up to a power of two, and w the largest
    weight, errors measured against float64 are below 2^-18 * max(w * s^2, 1) in float16 and 2^-13 * max(w * s^2, 1) in
    bfloat16, wherever the points lie.

    Args:
        x: `[B, N_q, 3]` or `[N_q, 3]`, finite. y: the same for keys; x where None.
        weight: a number, or `[H_q]`.
        dtype: of the factors, float16 or bfloat16.

    Raises TypeError, ValueError.
    """
    y = x if y is None else y
    for name, points in (("x", x), ("y", y)):
        check_floats(name, points)
        if points.ndim not in (2, 3) or points.shape[-1] != 3 or 0 in points.shape:
            raise ValueError(f"{name}: shape {list(points.shape)}; give points [batch, tokens, 3] or [tokens, 3]")
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name}: not all finite")
    if x.ndim == y.ndim == 3 and x.shape[0] != y.shape[0] and 1 not in (x.shape[0], y.shape[0]):
        raise ValueError(f"y: batch {y.shape[0]} is not that of x, {x.shape[0]}")
    check_sixteen_bits("dtype", dtype)
    if not isinstance(weight, Tensor | int | float):
        raise TypeError(f"weight: {quote(weight)}; give a number, or one for each head of q [H_q]")
    try:
        w = torch.as_tensor(weight, dtype=torch.float64, device=x.device)
    except OverflowError:  # an integer of many digits
        w = torch.full((), math.inf, dtype=torch.float64, device=x.device)
    if w.ndim > 1 or not w.numel() or not bool(w.isfinite().all()):
        raise ValueError(f"weight: {quote(weight)}; give a finite number, or one for each head of q [H_q]")
    x, y = (points.double().reshape(-1, 1, *points.shape[-2:]) for points in (x, y))  # [B, 1, N, 3]
    low = torch.minimum(x.amin(2, keepdim=True), y.amin(2, keepdim=True))
    high = torch.maximum(x.amax(2, keepdim=True), y.amax(2, keepdim=True))
    x, y = x - (low + high) / 2, y - (low + high) / 2
    s = _power_of_two(max(float(x.abs().max()), float(y.abs().max())))
    w = (w.reshape(1, -1, 1, 1) * s**2).clamp(-1e300, 1e300)  # beyond this the factors are not finite either
    t = _power_of_two(float(w.abs().max()) ** 0.5)  # makes both factors about equally large
    x, y, w = x / s, y / s, w / t
    (q_high, q_low), (k_high, k_low), (w_high, w_low) = (_parts(part, dtype) for part in (2 * w * x, t * y, w))
    q_norm, k_norm = (_parts(-f * points.square().sum(-1, keepdim=True), dtype) for points, f in ((x, w), (y, t)))
    w_high, w_low = (part.expand(*q_high.shape[:3], 1) for part in (w_high, w_low))
    t_column = torch.ones_like(k_norm[0]) * t
    q = joined([q_high, q_high, q_low, *q_norm, w_high, w_high, w_low, 0 * w_low, 0 * w_low], dim=-1)
    k = joined([k_high, k_low, k_high, t_column, t_column, *k_norm, k_norm[0], 0 * t_column, 0 * t_column], dim=-1)
    if not bool(q.isfinite().all() and k.isfinite().all()):
        raise ValueError(f"weight: with points {s:g} from their middle, {quote(weight)} is too large for factors of {dtype}")
    return lowrank(q, k)


def block_of(rank: int) -> int:
    """The columns that a kernel multiplies for this rank: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _power_of_two(x: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(x, 2.0**-60)))


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = x.to(dtype)
    return high, (x - high.double()).to(dtype)
