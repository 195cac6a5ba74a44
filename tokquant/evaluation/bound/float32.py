"""What float32 arithmetic may add, in any order of summation: the part of a bound that belongs to no operand."""

import torch
from torch import Tensor

from tokquant.schemes import QuantScheme

HALF_ULP = 2.0**-24
"""The relative rounding of one operation in float32."""

OPERATIONS = 16
"""More than a value meets on its way beside sums: scales, log2(e), a softcap, the reference of a row."""

EXP2 = 2.0**-21
"""The relative error of 2^x: of the polynomial on a CPU 1.4e-7, of a GPU's instruction 2 ulps."""

SMALLEST = 2.0**-100
"""More than all that underflows, beside the largest value."""

FLUSHED = 2.0**-124
"""More than a product of bfloat16 loses: it takes operands and sums below 2^-126 as zero."""

NORM = 2.0**-50
"""Added to the norms of Q and K: the rounding of products of so much is more than what those of bfloat16 lose."""


def tiles(scheme: QuantScheme, n_k: int) -> int:
    """How often sums are rescaled, at most: against a running maximum a kernel chooses its tiles, of 16 keys or more."""
    return -(-n_k // (16 if scheme.p.granularity.kind == "unit" else scheme.key_tile)) + 1


def score_rounding(terms: Tensor, others: Tensor, logits: Tensor, exact: bool, columns: int, rescaled: int) -> Tensor:
    """How far the logarithm of a key's weight may be off.

    Args:
        terms: the sum of magnitudes of the terms of its score; exact where those are integers, else of so many columns.
        others: magnitudes of what is added to the score.
        logits: magnitudes of the logit and of what it is compared with, natural.
        rescaled: how often its weight is multiplied by a power.
    """
    products = 0 if exact else columns
    powers = (1 + rescaled) * (EXP2 + 2 * HALF_ULP * logits)
    return HALF_ULP * ((products + OPERATIONS) * terms + OPERATIONS * (others + logits)) + powers + SMALLEST


def sums_of_products(scheme: QuantScheme, n_k: int) -> float:
    """The relative error of sums over keys: in a tile, and over tiles."""
    return HALF_ULP * (scheme.key_tile + 3 * tiles(scheme, n_k) + 2 * OPERATIONS)


def moved(p: Tensor, drift: Tensor) -> Tensor:
    """The total variation, at most, between weights p `[..., N]` and those of logits that are off by up to `drift`: `[..., 1]`.

    tanh(omega / 4) with a spread omega of twice the largest drift; or, better where one key has nearly all the weight, what the
    others may gain beside it.
    """
    top = p.argmax(dim=-1, keepdim=True)
    largest = drift.amax(dim=-1, keepdim=True)
    beside = (p * torch.expm1((drift + drift.gather(-1, top)).clamp(max=700))).scatter(-1, top, 0.0)
    return torch.minimum(torch.tanh(largest / 2), beside.sum(dim=-1, keepdim=True) / p.gather(-1, top))


def cast(magnitude: Tensor, kind: torch.dtype) -> Tensor:
    """What rounding an output of at most this magnitude to its type takes; infinite where it may overflow."""
    info = torch.finfo(kind)
    rounding = magnitude * (info.eps / 2) + info.smallest_normal * info.eps
    return torch.where(magnitude < info.max, rounding, float("inf"))
