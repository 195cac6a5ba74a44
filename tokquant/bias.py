"""Attention bias: what is added to the logits of pairs, and what a kernel makes of it without a tensor `[N_q, N_k]`.

`S = softcap * tanh(scale * (q . k) / softcap) + bias + additive mask` in natural logarithms. Query i stands at key
`i + N_k - N_q`, as it does for causality. Low-rank factors are FlashBias (arXiv 2505.12044), but for ALiBi, which takes
no product: distances are counted in the kernel, exact at any length where 16-bit positions end at 2048, or 256 in bf16.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokquant.errors import quote

Kind = Literal["alibi", "key_vector", "lowrank", "dense"]

STEEPEST = 64.0
"""The largest slope that kernels keep exact; beyond it a query hardly sees a second key."""


class Bias(ABC):
    """A bias of one of the kinds below."""

    kind: ClassVar[Kind]

    @abstractmethod
    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "Bias":
        """The same for these sizes, without copies. Raises ValueError where it does not broadcast to them."""

    @abstractmethod
    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        """Values of these queries and keys, broadcastable to `[B, H_q, rows, keys]`."""

    def tensors(self) -> list[Tensor]:
        """What it keeps in memory."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """-slope * |i + N_k - N_q - j|."""

    kind = "alibi"
    slopes: Tensor
    """`[H_q]` float32."""

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "Alibi":
        if self.slopes.shape != (heads,):
            raise ValueError(f"bias: slopes of shape {list(self.slopes.shape)}, not [{heads}], one for each head of q")
        return self

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        i = torch.arange(rows.start, rows.stop, device=self.slopes.device)[:, None] + (n_k - n_q)
        j = torch.arange(keys.start, keys.stop, device=self.slopes.device)
        return -self.slopes.to(dtype)[:, None, None] * (i - j).abs().to(dtype)


@dataclass(frozen=True, eq=False)
class KeyVector(Bias):
    """A value for each key, the same for every query."""

    kind = "key_vector"
    values: Tensor
    """Broadcastable to `[B, H_q, N_k]`, float32."""

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "KeyVector":
        return replace(self, values=_expanded("values", self.values, b, heads, n_k))

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        return self.values[..., None, keys].to(dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Bias):
    """q_factors @ k_factors^T, summed in float32."""

    kind = "lowrank"
    q_factors: Tensor
    """Broadcastable to `[B, H_q, N_q, R]`, 16 bit."""
    k_factors: Tensor
    """Broadcastable to `[B, H_q, N_k, R]`, of the same type."""
    energy: Tensor | None = None
    """Of `svd`: the share of the squared singular values that is kept, of each head."""

    @property
    def rank(self) -> int:
        """R."""
        return self.q_factors.shape[-1]

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "LowRank":
        q = _expanded("q_factors", self.q_factors, b, heads, n_q, self.rank)
        return replace(self, q_factors=q, k_factors=_expanded("k_factors", self.k_factors, b, heads, n_k, self.rank))

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        return self.q_factors[..., rows, :].to(dtype) @ self.k_factors[..., keys, :].to(dtype).mT


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """A value for each pair."""

    kind = "dense"
    values: Tensor
    """Broadcastable to `[B, H_q, N_q, N_k]`."""

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "Dense":
        return replace(self, values=_expanded("values", self.values, b, heads, n_q, n_k))

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        return self.values[..., rows, keys].to(dtype)


def alibi(slopes: Tensor) -> Alibi:
    """ALiBi (Press et al., arXiv 2108.12409): -slope * |i + N_k - N_q - j|, so -slope * (i - j) where it is causal.

    Args:
        slopes: `[H_q]`, finite and at most 64 in magnitude; `alibi_slopes(H_q)` are the paper's.

    Raises TypeError, ValueError.
    """
    _check_floats("slopes", slopes)
    if slopes.ndim != 1:
        raise ValueError(f"slopes: shape {list(slopes.shape)}; give [H_q], one for each head of q")
    if not bool((slopes.abs() <= STEEPEST).all()):
        raise ValueError(f"slopes: {slopes.tolist()[:8]} are not all finite and at most {STEEPEST:g} in magnitude")
    return Alibi(slopes.float())


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi's paper, `[heads]` float32: 2^(-8 / heads) and its powers.

    Where heads is no power of two: those of the next lower one, p, then every other one of 2 p, as in the authors' code.
    """
    if type(heads) is not int or heads < 1:
        raise ValueError(f"heads: {quote(heads)} is not a whole number from 1")
    p = 1 << (heads.bit_length() - 1)
    exponents = [8 * n / p for n in range(1, p + 1)] + [8 * n / (2 * p) for n in range(1, 2 * (heads - p), 2)]
    return torch.tensor([2.0**-x for x in exponents], device=device)


def key_vector(values: Tensor) -> KeyVector:
    """`values`, broadcastable to `[B, H_q, N_k]`, added to every score of their key, in float32. Raises TypeError."""
    _check_floats("values", values)
    return KeyVector(values.float())


def lowrank(q_factors: Tensor, k_factors: Tensor) -> LowRank:
    """q_factors `[B | 1, H_q | 1, N_q, R]` times k_factors `[B | 1, H_q | 1, N_k, R]` (FlashBias, arXiv 2505.12044).

    A second product, of 16-bit factors on tensor cores, added to the scaled scores in float32: it never shares a scale with
    Q and K. R of 16, 32, 64 and 128 load fastest. Raises TypeError, ValueError.
    """
    for name, x in (("q_factors", q_factors), ("k_factors", k_factors)):
        _check_floats(name, x)
        if x.dtype not in (torch.float16, torch.bfloat16):
            # tensor cores would take float32 as TF32, which has no more digits than float16 and looks as if it had
            raise TypeError(
                f"{name}: {x.dtype} is not supported; round it to float16 or bfloat16, or split it into a high and a low "
                "part of 16 bits as further columns, as bias.squared_distance does"
            )
        if x.ndim != 4 or x.shape[3] == 0:
            raise ValueError(f"{name}: shape {list(x.shape)}; give [batch or 1, heads of q or 1, tokens, rank]")
    if q_factors.dtype != k_factors.dtype:
        raise TypeError(f"q_factors, k_factors: types {q_factors.dtype} and {k_factors.dtype} differ; give one type")
    if q_factors.shape[3] != k_factors.shape[3]:
        raise ValueError(f"k_factors: rank {k_factors.shape[3]} is not that of q_factors, {q_factors.shape[3]}")
    return LowRank(q_factors, k_factors)


def dense(values: Tensor) -> Dense:
    """`values`, broadcastable to `[B, H_q, N_q, N_k]`, added to the scores in float32. Raises TypeError."""
    _check_floats("values", values)
    return Dense(values)


def svd(values: Tensor, energy: float = 0.995, largest_rank: int = 32, dtype: torch.dtype = torch.float16) -> LowRank | Dense:
    """Factors of a bias that does not change, by singular values (FlashBias, arXiv 2505.12044): to be made once.

    Args:
        values: `[H, N_q, N_k]` or `[B, H, N_q, N_k]`, finite.
        energy: the share of the squared singular values that every head is to keep.
        largest_rank: the most columns that may take.
        dtype: of the factors, float16 or bfloat16; each gets the square roots of the singular values.

    Returns: LowRank, with the `energy` that each head keeps; or Dense, with `values` as they are, where more than
    `largest_rank` columns would be needed, or so many that the factors are no smaller than the bias.

    Raises TypeError; ValueError also where the factors do not fit float16.
    """
    _check_floats("values", values)
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"values: shape {list(values.shape)}; give [heads, N_q, N_k] or [batch, heads, N_q, N_k]")
    if not 0 < energy <= 1:
        raise ValueError(f"energy: {quote(energy)} is no share; give more than 0 and at most 1")
    if type(largest_rank) is not int or largest_rank < 1:
        raise ValueError(f"largest_rank: {quote(largest_rank)} is not a whole number from 1")
    if not bool(values.isfinite().all()):
        raise ValueError("values: not all finite; give what is masked as mask")
    wide = values if values.dtype == torch.float64 else values.float()
    u, s, vh = torch.linalg.svd(wide[None] if values.ndim == 3 else wide, full_matrices=False)
    squares = s.double().square()
    # the share beyond each rank, summed from the smallest so that nothing is lost beside the largest
    beyond = squares.flip(-1).cumsum(-1).flip(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-300)
    needed = max(1, int((beyond > 1 - energy).sum(-1).max()))
    n_q, n_k = values.shape[-2:]
    # a kernel multiplies whole blocks: what fits the last one is free
    rank = min(block_of(needed), max(needed, largest_rank), s.shape[-1])
    if needed > largest_rank or (n_q + n_k) * rank >= n_q * n_k:
        return Dense(values)
    root = s[..., None, :rank].sqrt()
    q, k = ((x[..., :rank] * root).to(dtype) for x in (u, vh.mT))
    if not bool(q.isfinite().all() and k.isfinite().all()):
        raise ValueError(f"values: singular values up to {float(s.max()):.4g} do not fit float16; use dtype=torch.bfloat16")
    kept = 1 - torch.nn.functional.pad(beyond, (0, 1))[..., rank]
    return replace(lowrank(q, k), energy=kept[0] if values.ndim == 3 else kept)


def squared_distance(
    x: Tensor, y: Tensor | None = None, weight: float | Tensor = 1.0, dtype: torch.dtype = torch.float16
) -> LowRank:
    """Factors of -weight * |x_i - y_j|^2, for points in space.

    |x|^2 + |y|^2 - 2 x . y cancels, so points are centred, and every number is kept as a high and a low part of 16 bits: 9
    columns for the products of three coordinates, 2 and 3 for the two norms, and 2 of zeros.

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
        _check_floats(name, points)
        if points.ndim not in (2, 3) or points.shape[-1] != 3 or 0 in points.shape:
            raise ValueError(f"{name}: shape {list(points.shape)}; give points [batch, tokens, 3] or [tokens, 3]")
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name}: not all finite")
    w = torch.as_tensor(weight, dtype=torch.float64, device=x.device)
    if w.ndim > 1 or not bool(w.isfinite().all()):
        raise ValueError(f"weight: {quote(weight)}; give a finite number, or one for each head of q [H_q]")
    x, y = (points.double().reshape(-1, 1, *points.shape[-2:]) for points in (x, y))  # [B, 1, N, 3]
    low = torch.minimum(x.amin(2, keepdim=True), y.amin(2, keepdim=True))
    high = torch.maximum(x.amax(2, keepdim=True), y.amax(2, keepdim=True))
    x, y = x - (low + high) / 2, y - (low + high) / 2
    s = _power_of_two(max(float(x.abs().max()), float(y.abs().max())))
    w = w.reshape(1, -1, 1, 1) * s**2
    t = _power_of_two(float(w.abs().max()) ** 0.5)  # leaves both factors about as large
    x, y, w = x / s, y / s, w / t
    (q_high, q_low), (k_high, k_low), (w_high, w_low) = (_parts(part, dtype) for part in (2 * w * x, t * y, w))
    q_norm, k_norm = (_parts(-f * points.square().sum(-1, keepdim=True), dtype) for points, f in ((x, w), (y, t)))
    w_high, w_low = (part.expand(*q_high.shape[:3], 1) for part in (w_high, w_low))
    one = torch.ones_like(k_norm[0]) * t
    q = torch.cat([q_high, q_high, q_low, *q_norm, w_high, w_high, w_low, 0 * w_low, 0 * w_low], dim=-1)
    k = torch.cat([k_high, k_low, k_high, one, one, *k_norm, k_norm[0], 0 * one, 0 * one], dim=-1)
    if not bool(q.isfinite().all() and k.isfinite().all()):
        raise ValueError(f"weight: with points {s:g} from their middle, {quote(weight)} is too large for factors of {dtype}")
    return lowrank(q, k)


def block_of(rank: int) -> int:
    """The columns that a kernel multiplies for so many: a power of two from 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _power_of_two(x: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(x, 2.0**-60)))


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = x.to(dtype)
    return high, (x - high.double()).to(dtype)


def _check_floats(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"{name}: {kind}; give a floating-point tensor")


def _expanded(name: str, x: Tensor, *shape: int) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"bias: {name} of shape {list(x.shape)} do not broadcast to {list(shape)}") from None
