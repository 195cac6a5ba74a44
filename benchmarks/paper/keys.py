"""Q, K and V with what models' have and normal ones lack: channels that stand out, means, RoPE, a massive token.

Each is `[1, HEADS, n, d]`, float16; the same seed gives the same tensors.
"""

from collections.abc import Callable

import torch
from study import normal, outliers, uniform
from torch import Tensor

HEADS = 2

Operands = tuple[Tensor, Tensor, Tensor]
Draw = Callable[[int, int, int], Operands]
"""Tokens, head_dim and seed -> Q, K, V."""


def normals(n: int, d: int, seed: int) -> Operands:
    """Nothing to gain or to lose."""
    q, k, v = (normal(1, HEADS, n, d, seed=3 * seed + i) for i in range(3))
    return q, k, v


def uniforms(n: int, d: int, seed: int) -> Operands:
    """From -1/2 to 1/2, as in INT-FlashAttention: the largest is 1.7 times the root mean square."""
    q, k, v = (uniform(1, HEADS, n, d, seed=3 * seed + i) for i in range(3))
    return q, k, v


def outlier_channels(n: int, d: int, seed: int) -> Operands:
    """Two channels of K and of V eight times as large."""
    q, _, _ = normals(n, d, seed)
    k, v = (outliers(1, HEADS, n, d, seed=3 * seed + i, times=8.0) for i in (1, 2))
    return q, k, v


def means(n: int, d: int, seed: int) -> Operands:
    """Each channel with a mean of its own, N(0, 1) in Q and N(0, 4) in K and V, whatever the seed."""
    generator = torch.Generator().manual_seed(0)
    sizes = zip(normals(n, d, seed), (1.0, 2.0, 2.0), strict=True)
    q, k, v = ((x + size * torch.randn(1, HEADS, 1, d, generator=generator)).half() for x, size in sizes)
    return q, k, v


def one_mean(n: int, d: int, seed: int) -> Operands:
    """All channels of K and V with a mean of 3: a vector that a Hadamard matrix turns into one large channel."""
    q, k, v = normals(n, d, seed)
    return q, k + 3, v + 3


def rope_biased(n: int, d: int, seed: int) -> Operands:
    """Three channels of K with a mean of 9 to 15, where RoPE turns slowly; then RoPE, of Q too."""
    q, k, v = normals(n, d, seed)
    k[..., torch.tensor([d // 2 - 3, d // 2 - 9, d - 6])] += torch.tensor([12.0, -9.0, 15.0]).half()
    return rope(q), rope(k), v


def massive_token(n: int, d: int, seed: int, times: float = 100.0) -> Operands:
    """One token of K and V a hundred times as large."""
    q, k, v = normals(n, d, seed)
    for x in (k, v):
        x[:, :, n // 3] *= times
    return q, k, v


def sink_and_near(n: int, d: int, seed: int) -> Operands:
    """Queries that look at the first token and at near ones, as language models' do: Q and K have means that RoPE turns apart
    with distance, and the first key lies in the direction of Q's mean. Its V is small."""
    q, k, v = normals(n, d, seed)
    q[..., d // 8 : d // 8 + 8] += 2.5
    k[..., d // 8 : d // 8 + 8] += 2.5
    q[..., -1] += 4
    k[:, :, 0, -1] += 28
    v[:, :, 0] *= 0.1
    return rope(q), rope(k), v


def rope(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding, halves as pairs."""
    n, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(n)[:, None] * base ** (-torch.arange(half) / half)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1).half()
