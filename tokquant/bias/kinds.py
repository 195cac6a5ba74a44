"""The kinds of bias, as plain data that can compute any block of the bias, and the functions that make and check them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokquant.autocast import no_autocast
from tokquant.whole_numbers import whole_number

Kind = Literal["alibi", "key_vector", "lowrank", "dense"]

STEEPEST = 64.0
"""The largest slope. Kernels add up to 128 times the slope to float32 logits. At this one a query hardly sees a second key."""


class Bias(ABC):
    """A bias of one of the kinds below."""

    kind: ClassVar[Kind]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # each kind is a dataclass

    @abstractmethod
    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "Bias":
        """This bias expanded to these sizes without copies. Raises ValueError if it does not broadcast to them."""

    @abstractmethod
    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        """The values for these queries and keys, broadcastable to `[B, H_q, rows, keys]`."""

    @abstractmethod
    def of_sequence(self, queries: slice, keys: slice) -> "Bias":
        """The bias of one of several concatenated sequences. Raises ValueError for a dense bias."""

    @abstractmethod
    def of_heads(self, heads: slice) -> "Bias":
        """The expanded bias for a slice of Q's heads."""

    def terms(self, rows: slice, keys: slice, n_q: int, n_k: int) -> Tensor:
        """Magnitudes of the terms that `block` sums, float64: a kernel's rounding error is relative to them."""
        return self.block(rows, keys, n_q, n_k, torch.float64).abs()

    def tensors(self) -> list[Tensor]:
        """The tensors that the bias holds."""
        return [x for x in (getattr(self, name) for name in self.__dataclass_fields__) if isinstance(x, Tensor)]


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

    def of_sequence(self, queries: slice, keys: slice) -> "Alibi":
        return self

    def of_heads(self, heads: slice) -> "Alibi":
        return replace(self, slopes=self.slopes[heads])

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        i = torch.arange(rows.start, rows.stop, device=self.slopes.device)[:, None] + (n_k - n_q)
        j = torch.arange(keys.start, keys.stop, device=self.slopes.device)
        return -self.slopes.to(dtype)[:, None, None] * (i - j).abs().to(dtype)

    def terms(self, rows: slice, keys: slice, n_q: int, n_k: int) -> Tensor:
        # kernels count keys from the first of up to 128 queries
        return super().terms(rows, keys, n_q, n_k) + 128 * self.slopes.double().abs()[:, None, None]


@dataclass(frozen=True, eq=False)
class KeyVector(Bias):
    """A value for each key, the same for every query."""

    kind = "key_vector"
    values: Tensor
    """Broadcastable to `[B, H_q, N_k]`, float32."""

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "KeyVector":
        return replace(self, values=_expanded("values", self.values, b, heads, n_k))

    def of_sequence(self, queries: slice, keys: slice) -> "KeyVector":
        return replace(self, values=self.values[..., keys])

    def of_heads(self, heads: slice) -> "KeyVector":
        return replace(self, values=self.values[:, heads])

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
    """From `svd`: the share of the squared singular values that each head keeps."""

    @property
    def rank(self) -> int:
        """R."""
        return self.q_factors.shape[-1]

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "LowRank":
        q = _expanded("q_factors", self.q_factors, b, heads, n_q, self.rank)
        return replace(self, q_factors=q, k_factors=_expanded("k_factors", self.k_factors, b, heads, n_k, self.rank))

    def of_sequence(self, queries: slice, keys: slice) -> "LowRank":
        return replace(self, q_factors=self.q_factors[..., queries, :], k_factors=self.k_factors[..., keys, :])

    def of_heads(self, heads: slice) -> "LowRank":
        return replace(self, q_factors=self.q_factors[:, heads], k_factors=self.k_factors[:, heads])

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        with no_autocast(self.q_factors.device):
            return self.q_factors[..., rows, :].to(dtype) @ self.k_factors[..., keys, :].to(dtype).mT

    def terms(self, rows: slice, keys: slice, n_q: int, n_k: int) -> Tensor:
        magnitudes = replace(self, q_factors=self.q_factors.abs(), k_factors=self.k_factors.abs())
        return self.rank * magnitudes.block(rows, keys, n_q, n_k, torch.float64)


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """A value for each pair."""

    kind = "dense"
    values: Tensor
    """Broadcastable to `[B, H_q, N_q, N_k]`."""

    def expand(self, b: int, heads: int, n_q: int, n_k: int) -> "Dense":
        return replace(self, values=_expanded("values", self.values, b, heads, n_q, n_k))

    def of_sequence(self, queries: slice, keys: slice) -> "Dense":
        raise ValueError("bias: a dense one would be mostly of pairs in different sequences; give each sequence to attention")

    def of_heads(self, heads: slice) -> "Dense":
        return replace(self, values=self.values[:, heads])

    def block(self, rows: slice, keys: slice, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor:
        return self.values[..., rows, keys].to(dtype)


KINDS: dict[str, Any] = {bias.kind: bias for bias in (Alibi, KeyVector, LowRank, Dense)}
"""The classes by `kind`. Each can be constructed from the result of its `tensors`, in that order."""


def alibi(slopes: Tensor) -> Alibi:
    """ALiBi (Press et al., arXiv 2108.12409): -slope * |i + N_k - N_q - j|, so -slope * (i - j) where it is causal.

    Args:
        slopes: `[H_q]`, finite and at most 64 in magnitude; `alibi_slopes(H_q)` gives those of the paper.

    Raises TypeError, ValueError.
    """
    check_floats("slopes", slopes)
    if slopes.ndim != 1:
        raise ValueError(f"slopes: shape {list(slopes.shape)}; give [H_q], one for each head of q")
    if not bool((slopes.abs() <= STEEPEST).all()):
        raise ValueError(f"slopes: {slopes.tolist()[:8]} are not all finite and at most {STEEPEST:g} in magnitude")
    return Alibi(slopes.float())


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi's paper, `[heads]` float32: 2^(-8 / heads) and its powers.

    If heads is not a power of two: the slopes for the next lower power p, then every other slope for 2 p, as in the authors'
    code.
    """
    heads = whole_number("heads", heads, 1)
    p = 1 << (heads.bit_length() - 1)
    exponents = [8 * n / p for n in range(1, p + 1)] + [8 * n / (2 * p) for n in range(1, 2 * (heads - p), 2)]
    return torch.tensor([2.0**-x for x in exponents], dtype=torch.float32, device=device)


def key_vector(values: Tensor) -> KeyVector:
    """`values`, broadcastable to `[B, H_q, N_k]`, added to every score of their key, in float32. Raises TypeError."""
    check_floats("values", values)
    return KeyVector(values.float())


def lowrank(q_factors: Tensor, k_factors: Tensor) -> LowRank:
    """q_factors `[B | 1, H_q | 1, N_q, R]` times k_factors `[B | 1, H_q | 1, N_k, R]` (FlashBias, arXiv 2505.12044).

    Tensor cores multiply the 16-bit factors in a second product, which is added to the scaled scores in float32, so the factors
    share no scale with Q and K. Ranks of 16, 32, 64 and 128 load fastest. Raises TypeError, ValueError.
    """
    for name, x in (("q_factors", q_factors), ("k_factors", k_factors)):
        check_floats(name, x)
        check_sixteen_bits(name, x.dtype)
        if x.ndim != 4 or x.shape[3] == 0:
            raise ValueError(f"{name}: shape {list(x.shape)}; give [batch or 1, heads of q or 1, tokens, rank]")
    if q_factors.dtype != k_factors.dtype:
        raise TypeError(f"q_factors, k_factors: types {q_factors.dtype} and {k_factors.dtype} differ; give one type")
    if q_factors.shape[3] != k_factors.shape[3]:
        raise ValueError(f"k_factors: rank {k_factors.shape[3]} is not that of q_factors, {q_factors.shape[3]}")
    return LowRank(q_factors, k_factors)


def dense(values: Tensor) -> Dense:
    """`values`, broadcastable to `[B, H_q, N_q, N_k]`, added to the scores in float32. Raises TypeError."""
    check_floats("values", values)
    return Dense(values)


def check_floats(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"{name}: {kind}; give a floating-point tensor")


def check_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        # tensor cores would multiply float32 as TF32, which has no more digits than float16
        raise TypeError(
            f"{name}: {dtype} is not supported; use float16 or bfloat16. What needs more digits can be split into a high "
            "and a low part as further columns, as bias.squared_distance does"
        )


def _expanded(name: str, x: Tensor, *shape: int) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"bias: {name} of shape {list(x.shape)} do not broadcast to {list(shape)}") from None
