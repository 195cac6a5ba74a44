"""Attention bias: what is added to the logits of pairs, and what a kernel makes of it without a tensor `[N_q, N_k]`.

`S = softcap * tanh(scale * (q . k) / softcap) + bias + additive mask` in natural logarithms. Query i stands at key
`i + N_k - N_q`, as it does for causality. Low-rank factors are FlashBias (arXiv 2505.12044), but for ALiBi, which takes
no product: distances are counted in the kernel, exact at any length where 16-bit positions end at 2048, or 256 in bf16.
"""

from tokquant.bias.factors import squared_distance, svd
from tokquant.bias.kinds import Alibi, Bias, Dense, KeyVector, LowRank, alibi, alibi_slopes, dense, key_vector, lowrank

__all__ = [
    "Alibi",
    "Bias",
    "Dense",
    "KeyVector",
    "LowRank",
    "alibi",
    "alibi_slopes",
    "dense",
    "key_vector",
    "lowrank",
    "squared_distance",
    "svd",
]
