"""Error bounds of float32 arithmetic in any order of summation: the part of a certificate that belongs to no operand."""

import torch
from torch import Tensor

from tokquant.schemes import QuantScheme

HALF_ULP = 2.0**-24
"""Largest relative error of one operation in float32."""

OPERATIONS = 16
"""At least the number of operations on a value besides sums: scales, log2(e), a softcap, the reference of a row."""

EXP2 = 2.0**-21
"""Largest relative error of 2^x: 1.4e-7 of the polynomial on a CPU, 2 ulps of a GPU's instruction."""

SMALLEST = 2.0**-100
"""Bound on the sum of all that underflows, relative to the largest value."""

FLUSHED = 2.0**-124
"""Bound on what a product of bfloat16 loses by flushing operands and sums below 2^-126 to zero."""

NORM = 2.0**-50
"""Added to the norms of Q and K, so that the rounding of their product covers what bfloat16 flushes to zero."""


def tiles(scheme: QuantScheme, n_k: int) -> int:
    """The most times that sums are rescaled: against a running maximum a kernel is free to choose tiles of 16 keys or more."""
    return -(-n_k // (16 if scheme.p.granularity.kind == "unit" else scheme.key_tile)) + 1


def score_rounding(terms: Tensor, others: Tensor, logits: Tensor, exact: bool, columns: int, rescaled: int) -> Tensor:
    """Largest error of the logarithm of a key's weight.

    Args:
        terms: sum of the magnitudes of the terms of its score.
        others: magnitudes of what is added to the score.
        logits: magnitudes of the natural logit and of the maximum that is subtracted from it.
        exact: whether the score is an exact sum of integers.
        columns: terms of the score, if not exact.
        rescaled: how often the weight is multiplied by a power of 2.
    """
    products = 0 if exact else columns
    powers = (1 + rescaled) * (EXP2 + 2 * HALF_ULP * logits)
    return HALF_ULP * ((products + OPERATIONS) * terms + OPERATIONS * (others + logits)) + powers + SMALLEST


def sums_of_products(scheme: QuantScheme, n_k: int) -> float:
    """Largest relative error of sums over keys, within tiles and over tiles."""
    return HALF_ULP * (scheme.key_tile + 3 * tiles(scheme, n_k) + 2 * OPERATIONS)


def moved(p: Tensor, drift: Tensor) -> Tensor:
    """Bound on the total variation between weights p `[..., N]` and those of logits off by up to `drift`: `[..., 1]`.

    tanh(omega / 4) with a spread omega of twice the largest drift; or, which is smaller where one key has nearly all the
    weight, what the other keys can gain on it.
    """
    top = p.argmax(dim=-1, keepdim=True)
    largest = drift.amax(dim=-1, keepdim=True)
    beside = (p * torch.expm1((drift + drift.gather(-1, top)).clamp(max=700))).scatter(-1, top, 0.0)
    return torch.minimum(torch.tanh(largest / 2), beside.sum(dim=-1, keepdim=True) / p.gather(-1, top))


def cast(magnitude: Tensor, kind: torch.dtype) -> Tensor:
    """Largest error of rounding an output of at most this magnitude to its type; infinite where it may overflow."""
    info = torch.finfo(kind)
    rounding = magnitude * (info.eps / 2) + info.smallest_normal * info.eps
    return torch.where(magnitude < info.max, rounding, float("inf"))
