"""Tasks of quantization kernels: what to do with an operand, by its scheme, type and frame. Plans are made from tasks."""

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Literal

import torch

from tokquant.kernels.products import takes_tokens_last
from tokquant.kernels.targets import Target
from tokquant.precisions.base import WHEN_REPLACED
from tokquant.quantize import check_groups
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.transforms import Steps

LONGEST = 128
"""The most tokens of a tile. Scales of more tokens need two passes: extremes first, then codes."""


@dataclass(frozen=True, kw_only=True)
class OperandTask:
    """What a quantization kernel, of Triton or in C++, does with one operand."""

    spec: Operand
    head_dim: int
    dtype: torch.dtype
    """Type of the tensor."""
    offset_tokens: int = 0
    """Tokens under one offset; 0 where there is none."""
    balanced: bool = False
    rotated: bool = False
    folded: bool = False
    k_offset: bool = False
    """Q: also compute its product with K's offset."""
    k_origin: bool = False
    """Q: also compute its product with the values that K's codes of 0 stand for."""
    code_sum: bool = False
    """Q: also sum its codes."""
    weighted: bool = False
    """V: its scales go into P; also mark tokens that are all zero, whose weight has no inverse."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached, as every call looks its plans up
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def words(self) -> list[str]:
        """The transforms before quantization, in words."""
        steps = ["less an offset"] * (self.offset_tokens > 0) + ["balanced"] * self.balanced + ["rotated"] * self.rotated
        return steps + ["times K's scale"] * self.folded


@dataclass(frozen=True, kw_only=True)
class Task(OperandTask):
    """What a quantization kernel of Triton does with one operand."""

    step: Literal["both", "extremes", "codes"]
    """Compute `both` scales and codes, or the `extremes` of each tile, or `codes` with given scales."""
    companion: bool = False
    """K: also write it, without its offset, in its own type."""
    sum_tokens: int = 0
    """V: also sum its codes over groups of this many tokens; 0 for no sums."""
    tokens_last: bool = False
    sequences: bool = False
    """Whether sequences of different lengths are packed one after another, each with scales of its own."""
    page: int = 0
    """Tokens of a page, where codes go into pages; with `tokens_last`, no element of V in pages holds two tokens."""
    few: bool = False
    """Whether there are at most 16 new tokens, so that a program takes at most that many."""
    counted: bool = False
    """Whether sequences have different numbers of new tokens."""
    interpreted: bool = False

    __hash__ = OperandTask.__hash__  # a dataclass would replace it


def lacking(
    spec: Operand, head_dim: int, target: Target | None = None, *, tokens_last: bool = False, sum_tokens: int = 0
) -> str | None:
    """Why no kernel quantizes this operand on `target` (None: the interpreter), and torch does; None where a kernel does.

    V may need the layout `tokens_last`, and sums of its codes over `sum_tokens` tokens.
    """
    if spec.format.triton_quantize is None:
        return f"{spec.role}: precision {spec.precision} has no triton_quantize"
    if head_dim > 256:
        return f"{spec.role}: head_dim {head_dim} is more than a kernel holds"
    fp8 = "float8" in spec.format.compute or (spec.scaled and spec.scale_dtype == "fp8_e4m3")
    if fp8 and target is not None and not target.fp8:
        return f"{spec.role}: {target.name} has no fp8 of this kind (e4m3fn)"
    shared, block = 16 * spec.format.packed, _tokens_of(spec)
    if tokens_last and (1 < block < shared or 0 < sum_tokens < shared):
        return f"{spec.role}: stored elements mix tokens of {shared}, and its blocks or P's have fewer"
    return None


def in_one_tile(spec: Operand) -> bool:
    """Whether all tokens of a dynamic scale fit one tile, so that the tensor is read once."""
    return spec.scaled and spec.scale == "dynamic" and _tokens_of(spec) <= LONGEST


def _tokens_of(spec: Operand) -> int:
    """Tokens under one scale."""
    return spec.granularity.cover(WHOLE, spec.granularity.size or 1)[0]


def columns_of(task: Task) -> int:
    """Scales per row of tokens: one for every group of channels."""
    return task.spec.granularity.scale_shape((1, 1, 1, task.head_dim))[3]


@lru_cache(maxsize=1024)
def task_of(
    scheme: QuantScheme,
    role: str,
    head_dim: int,
    dtype: torch.dtype,
    steps: Steps,
    target: Target | None,
    interpreted: bool,
    sequences: bool = False,
    k_offset: bool = False,
    k_origin: bool = False,
) -> Task | None:
    """The task for an operand; None where torch quantizes it, because no kernel can or because it is only cast.

    Raises SchemeError where its granularity does not fit head_dim.
    """
    spec: Operand = getattr(scheme, role)
    if spec.scaled:
        check_groups(spec, head_dim)
    elif not any(steps):
        return None
    tokens_last = role == "v" and takes_tokens_last(scheme, dtype)
    sum_tokens = min(scheme.key_tile, LONGEST) if role == "v" and needs_code_sums(scheme) else 0
    if lacking(spec, head_dim, target, tokens_last=tokens_last, sum_tokens=sum_tokens):
        return None
    return Task(
        spec=spec,
        head_dim=head_dim,
        dtype=dtype,
        step="both" if in_one_tile(spec) else "codes",
        **steps._asdict(),
        k_offset=k_offset,
        k_origin=k_origin,
        companion=role == "k" and scheme.q.smooth == "block_mean",
        # sums of integers are exact in any order; others are left to torch
        code_sum=role == "q" and needs_query_sums(scheme) and spec.format.compute == "tl.int8" and place(spec) == "scores",
        sum_tokens=sum_tokens,
        weighted=role == "v" and place(spec) == "p",
        tokens_last=tokens_last,
        sequences=sequences,
        interpreted=interpreted,
    )


WHEN_REPLACED.append(task_of.cache_clear)
