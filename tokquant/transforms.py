"""Transforms of Q, K and V that leave attention unchanged and reduce the quantization error.

In exact arithmetic `softmax(Q K^T) V` does not change: a constant subtracted from every key shifts all logits of a row alike,
factors of K are divided out of Q, a rotation is applied to both, and V's mean is added back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from tokquant.autocast import joined
from tokquant.schemes.granularity import WHOLE

BLOCK_MEAN = 128
"""Queries that share a mean with `smooth: block_mean`."""

PIECE = 2**18
"""Values whose float32 copy stays in a CPU's cache."""


def by_heads(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Decorate a function that treats each head of `[B, H, N, D]` by itself: on a CPU it is called for a few heads at a time.

    torch copies a 16-bit tensor before it reduces it in float32. A copy of a large one takes ten times as long as its sums.
    """

    @wraps(function)
    def in_pieces(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() <= PIECE:
            return function(x)
        heads = max(1, PIECE * x.shape[0] * x.shape[1] // x.numel())
        batches = max(1, heads // x.shape[1])
        rows = ([function(piece) for piece in row.split(heads, dim=1)] for row in x.split(batches))
        return joined([joined(row, dim=1) for row in rows], dim=0)

    return in_pieces


def sixteen_bit(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type for a tensor's offsets: its own type, or for float32 bf16, which has the same range."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


@by_heads
def mean_over_tokens(x: Tensor) -> Tensor:
    """`[B, H, N, D] -> [B, H, 1, D]`, summed in float32 and rounded to 16 bits."""
    if x.is_cuda and x.dtype == sixteen_bit(x.dtype):
        return x.mean(dim=2, keepdim=True)  # the same result on a GPU, without launching casts
    return x.mean(dim=2, keepdim=True, dtype=torch.float32).to(sixteen_bit(x.dtype))


@by_heads
def mean_over_blocks(x: Tensor) -> Tensor:
    """`[B, H, N, D] -> [B, H, ceil(N / 128), D]`: the mean of each block of queries, rounded to 16 bits."""
    blocks, rest = divmod(x.shape[2], BLOCK_MEAN)
    whole, last = x.split([x.shape[2] - rest, rest], dim=2)
    means = whole.unflatten(2, (blocks, BLOCK_MEAN)).mean(dim=3, dtype=torch.float32)
    if rest:
        means = torch.cat([means, last.mean(dim=2, keepdim=True, dtype=torch.float32)], dim=2)
    return means.to(sixteen_bit(x.dtype))


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension by the orthonormal Hadamard matrix (natural order); its own inverse.

    The matrix is block-diagonal; the order of its blocks is the largest power of two that divides D.
    """
    d = x.shape[-1]
    order = d & -d
    y = _wide(x)
    stride = 1
    while stride < order:
        pairs = y.unflatten(-1, (-1, 2, stride))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        stride *= 2
    return y * order**-0.5


def query_maxima(q: Tensor, kv_heads: int) -> Tensor:
    """max |Q| of each channel over tokens and over the heads that share a head of K: `[B, H_q, N, D] -> [B, H_kv, 1, D]`."""
    return key_maxima(q).unflatten(1, (kv_heads, -1)).amax(dim=2)


@by_heads
def key_maxima(k: Tensor) -> Tensor:
    """max |K| of each channel over tokens: `[B, H, N, D] -> [B, H, 1, D]`."""
    return _wide(k).abs().amax(dim=2, keepdim=True)


@by_heads
def pair_norms(k: Tensor) -> Tensor:
    """Norm of each pair of channels (f, f + D/2), which RoPE keeps; maxima over tokens: `[B, H, N, D] -> [B, H, 1, D/2]`."""
    return torch.hypot(*_wide(k).chunk(2, dim=-1)).amax(dim=2, keepdim=True)


def channel_factors(q_largest: Tensor, k_largest: Tensor, alpha: float = 0.5) -> Tensor:
    """Factors `[..., D]` for K, divided out of Q, that even out the channels: max |Q|^alpha / max |K|^(1 - alpha).

    SmoothQuant's rule (arXiv 2211.10438), from the results of `query_maxima` and `key_maxima`.
    """
    return _or_one(q_largest**alpha / k_largest ** (1 - alpha))


def rope_pair_factors(norms: Tensor, k_largest: Tensor, alpha: float = 8.0, beta: float = 8.0, top_k: int = 0) -> Tensor:
    """Factors `[..., D]` for K, divided out of Q: `alpha / norm`, the same for both channels of a pair that RoPE rotates.

    The `top_k` channels with the largest magnitudes and their partners get a factor each instead, `beta / max |K|`. This is
    FireQ's normalization before RoPE and scaling after it (arXiv 2505.20839, 3.3). RoPE keeps norms, so both can be computed
    after it, from the results of `pair_norms` `[..., D/2]` and `key_maxima` `[..., D]`.
    """
    factors = torch.cat([alpha / norms] * 2, dim=-1)
    if top_k:
        chosen = torch.zeros_like(factors, dtype=torch.bool).scatter(-1, k_largest.topk(top_k, dim=-1).indices, True)
        chosen = chosen | chosen.roll(norms.shape[-1], dims=-1)
        factors = torch.where(chosen, beta / k_largest, factors)
    return _or_one(factors)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _or_one(factor: Tensor) -> Tensor:
    # a channel of zeros, or with values that are not finite, gets the factor 1
    return torch.where((factor == 0) | factor.isinf() | factor.isnan(), 1.0, factor)


class Steps(NamedTuple):
    """The steps of a frame that a quantization kernel has to do."""

    offset_tokens: int
    """Tokens that share an offset; 0 without an offset."""
    balanced: bool
    rotated: bool
    folded: bool


@dataclass(frozen=True)
class Frame:
    """The transforms of a tensor `[B, H, N, D]` before it is quantized, in this order, and their inverse."""

    offset: Tensor | None = None
    """Subtracted, in 16 bits: `[B, H, 1, D]`, or block means `[B, H, ceil(N / 128), D]`."""
    balance: Tensor | None = None
    """Multiplied with: `[B, H, 1, D]`."""
    rotated: bool = False
    """Multiplied by the Hadamard matrix."""
    fold: Tensor | None = None
    """Multiplied with, in Q's frame: K's scale per channel, `[B, H, 1, D]`."""

    @property
    def changes(self) -> bool:
        """Whether the frame changes a tensor at all."""
        return self.rotated or bool(self.tensors())

    def apply(self, x: Tensor) -> Tensor:
        """`x` in this frame, in float32, or float64 if `x` is float64."""
        y = _wide(x)
        if self.offset is not None:
            y = y - self.offset_of_tokens(x.shape[2])
        if self.balance is not None:
            y = y * self.balance
        if self.rotated:
            y = hadamard(y)
        return y if self.fold is None else y * self.fold

    def undo(self, y: Tensor) -> Tensor:
        """The inverse of `apply`, in the type of `y`, float32 or float64."""
        if self.fold is not None:
            y = y / self.fold
        if self.rotated:
            y = hadamard(y)
        if self.balance is not None:
            y = y / self.balance
        return y if self.offset is None else y + self.offset_of_tokens(y.shape[2])

    def offset_of_tokens(self, n: int) -> Tensor:
        """The offset, broadcastable to n tokens, float32."""
        assert self.offset is not None
        offset = self.offset.float()
        if offset.shape[2] == 1:
            return offset.expand(-1, -1, n, -1)
        return offset.repeat_interleave(BLOCK_MEAN, dim=2)[:, :, :n]

    def steps(self) -> Steps:
        """The steps of this frame, without their tensors."""
        tokens = 0 if self.offset is None else BLOCK_MEAN if self.offset.shape[2] > 1 else WHOLE
        return Steps(tokens, self.balance is not None, self.rotated, self.fold is not None)

    def tensors(self) -> list[Tensor]:
        """The tensors that the frame holds."""
        return [x for x in (self.offset, self.balance, self.fold) if x is not None]
