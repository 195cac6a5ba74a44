"""Attention biases, added to the logits. All kinds but dense need no tensor `[N_q, N_k]`.

`S = softcap * tanh(scale * (q . k) / softcap) + bias + additive mask` in natural logarithms. Query i has the position of key
`i + N_k - N_q`, as for causality. Low-rank factors are those of FlashBias (arXiv 2505.12044). ALiBi uses no factors: kernels
compute distances from positions, which is exact at any length, while positions as 16-bit factors would be exact up to 2048, or
256 in bf16.
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
