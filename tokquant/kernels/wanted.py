"""The features that a kernel is generated with, besides its scheme."""

from dataclasses import dataclass
from typing import Literal

import torch

from tokquant.bias import LowRank
from tokquant.features import Features

MaskKind = Literal["none", "boolean", "additive"]
BiasKind = Literal["none", "alibi", "key_vector", "lowrank", "dense"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which features a kernel has. Their values are arguments of a launch, and do not change its source."""

    left: bool = False
    """Whether the keys that a query sees are bounded before its own."""
    right: bool = False
    """Whether they are bounded after its own; causal is a right bound of 0."""
    mask: MaskKind = "none"
    softcap: bool = False
    sinks: bool = False
    lse: bool = False
    varlen: bool = False
    """Whether sequences of different lengths are packed one after another, instead of a batch."""
    bias: BiasKind | Literal["past_alibi"] = "none"
    """`past_alibi` is ALiBi where no query sees a key after its own."""
    beside: bool = False
    """Whether there are other keys: output and LSE hold attention to them, which is merged with. What a mask leaves out is then
    memory that may hold anything, and reaches nothing even where it is not a number."""
    bias_rank: int = 16
    """Columns of low-rank factors."""

    @classmethod
    def of(cls, features: Features, return_lse: bool) -> "Wanted":
        """The features of a call."""
        (left, right), mask, bias = features.reach(), features.mask, features.bias
        return cls(
            left=left is not None,
            right=right is not None,
            mask="none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
            softcap=features.softcap is not None,
            sinks=features.sinks is not None,
            lse=return_lse,
            bias="none" if bias is None else "past_alibi" if bias.kind == "alibi" and right == 0 else bias.kind,
            bias_rank=bias.rank if isinstance(bias, LowRank) else 16,
        )


PLAIN = Wanted()
