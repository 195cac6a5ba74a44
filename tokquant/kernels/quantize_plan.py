"""Decides what a quantization kernel is made of: fragments, constants, and how many tokens a program takes."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from tokquant import precisions
from tokquant.kernels.products import FLOAT_NAMES, TRITON_TYPES
from tokquant.kernels.targets import Target
from tokquant.kernels.triton import scales
from tokquant.schemes import Operand
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.scheme import SCALE_TYPES

LONGEST = 128
"""Tokens in a tile, at most. Scales of more tokens take two reads: extremes first, then codes."""


@dataclass(frozen=True)
class QuantizePlan:
    """Everything that is fixed before a quantization kernel is written. Equal plans give equal kernels."""

    name: str
    title: str
    holes: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, str], ...]
    tokens: int
    """Tokens of one head that a program takes."""
    num_warps: int
    checked: bool
    """Whether it tells of values that a type does not hold."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # every launch looks its kernel up
        return hash((self.name, self.holes, self.constants))

    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told: torch rounds after a multiplication, so nothing may contract."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}

    def __repr__(self) -> str:
        return f"<plan {self.name}: {self.title}>"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one kernel does with one operand."""

    spec: Operand
    head_dim: int
    dtype: torch.dtype
    """Of the tensor."""
    step: Literal["both", "extremes", "codes"]
    """`both` scales and codes, or the `extremes` of each tile, or `codes` with scales that are given."""
    offset_tokens: int = 0
    """Tokens under one offset; 0 where there is none."""
    balanced: bool = False
    rotated: bool = False
    folded: bool = False
    k_offset: bool = False
    """Q: its product with K's offset is wanted,"""
    k_origin: bool = False
    """with what K's codes of 0 stand for,"""
    code_sum: bool = False
    """and the sum of its codes."""
    companion: bool = False
    """K less its offset is wanted in its own type."""
    sum_tokens: int = 0
    """V: the sums of its codes are wanted, over so many tokens each."""
    weighted: bool = False
    """V: and which tokens hold anything."""
    tokens_last: bool = False
    page: int = 0
    """Tokens of a page, where the codes go into pages; V of pages with `tokens_last` has no two tokens in an element."""
    few: bool = False
    """Whether there are at most 16 new tokens, so that no program takes more than that."""
    counted: bool = False
    """Whether sequences have different numbers of new tokens."""
    interpreted: bool = False


def lacking(
    spec: Operand, head_dim: int, target: Target | None = None, *, tokens_last: bool = False, sum_tokens: int = 0
) -> str | None:
    """Why no kernel quantizes this operand on `target` (None: the interpreter), so that the definition does, in torch.

    None where a kernel does. V may have to lie with `tokens_last`, and need sums of its codes over so many tokens.
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
    """Whether the tokens of every dynamic scale lie in one tile, so that the tensor is read once."""
    return spec.scaled and spec.scale == "dynamic" and _tokens_of(spec) <= LONGEST


def _tokens_of(spec: Operand) -> int:
    """Tokens under one scale."""
    return spec.granularity.cover(WHOLE, spec.granularity.size or 1)[0]


@lru_cache(maxsize=256)
def plan(task: Task) -> QuantizePlan:
    """The plan of the kernel that does `task`."""
    spec, d, precision = task.spec, task.head_dim, task.spec.format
    padded = max(32, 1 << (d - 1).bit_length())
    group_tokens, group_channels = spec.granularity.cover(WHOLE, d) if spec.scaled else (1, d)
    # stores along the tokens want many of them
    tokens = min(LONGEST, (16384 if task.tokens_last else 8192) // padded)
    if task.page:
        tokens = min(tokens, 16 if task.few else task.page)
    tokens = max(tokens, group_tokens if task.step == "both" else 1, min(task.sum_tokens, LONGEST))
    over_tokens = task.tokens_last and not task.page
    codes, scaled = task.step != "extremes", spec.scaled
    own = precisions.get(FLOAT_NAMES[task.dtype])
    stores = precision.of(task.dtype)
    order = d & -d
    largest_code = precision.largest if precision.largest is not None else 1
    constants: dict[str, Any] = {
        "D": d,
        "D_TILE": padded,
        "OFFSET": task.offset_tokens > 0,
        "OFFSET_TOKENS": task.offset_tokens,
        "COMPANION": task.companion and codes,
        "BALANCED": task.balanced,
        "ROTATED": task.rotated,
        "STAGES": order.bit_length() - 1,
        "NORM": order**-0.5,
        "FOLDED": task.folded,
        "LOGITS": (task.k_offset or task.k_origin) and codes,
        "K_OFFSET": task.k_offset and codes,
        "K_ORIGIN": task.k_origin and codes,
        "EXTREMES": task.step != "codes",
        "ONLY_EXTREMES": not codes,
        "SCALE_HERE": task.step == "both",
        "SCALE_GIVEN": task.step == "codes" and scaled,
        "CODES": codes,
        "SCALED": scaled,
        "STATIC": spec.scale == "static",
        "SYMMETRIC": spec.symmetric,
        "ASYMMETRIC": not spec.symmetric,
        "GROUP_TOKENS": min(group_tokens, tokens),
        "GROUP_CHANNELS": padded if group_channels == d else group_channels,
        "SCALE_TOKENS": group_tokens if codes else tokens,
        "SCALE_COLUMNS": d // group_channels,
        "LARGEST": float(largest_code),
        "LEVELS": float(precision.levels),
        "HALF": 0 if spec.symmetric else 2 ** (precision.bits - 1),
        "SCALE_SMALLEST": torch.finfo(SCALE_TYPES[spec.scale_dtype]).smallest_normal,
        "SCALE_LARGEST": torch.finfo(SCALE_TYPES[spec.scale_dtype]).max,
        "CHECK_SCALE": task.step == "both" and _may_not_fit(task),
        "CHECK_FP16": codes and stores.stored == torch.float16,
        "PACKED": stores.packed,
        "WIDTH": -(-d // stores.packed),
        "RAGGED": d % stores.packed != 0 and not over_tokens,
        "LAST": 2 ** (d % stores.packed * 8 // stores.packed) - 1,
        "BYTES": stores.stored.itemsize == 1,
        "CANONICAL": not task.tokens_last and not task.page,
        "TOKENS_LAST": over_tokens,
        "PAGED": task.page > 0,
        "PAGE": task.page,
        "PAGE_GROUPS": max(1, task.page // group_tokens),
        "COUNTED": task.counted,
        "ROW": 1 if task.tokens_last else -(-d // stores.packed),
        "COLUMN": task.page if task.tokens_last else 1,
        "VALUES": task.code_sum or task.sum_tokens > 0 or task.weighted,
        "VALUE_TYPE": "tl.int32" if precision.compute == "tl.int8" else "tl.float32",
        "CODE_SUM": task.code_sum,
        "TILE_SUMS": task.sum_tokens > 0,
        "SUM_TOKENS": min(task.sum_tokens, tokens),
        "WEIGHTED": task.weighted,
        "WEIGHT_APART": task.weighted and not task.page,
        "WEIGHT_IN_SIGN": task.weighted and task.page > 0,
        "SCALE_STORED": not (task.weighted and task.page > 0),
    }
    order_tokens = scales.in_groups if over_tokens else scales.in_groups_of_16 if task.tokens_last else scales.in_order
    holes = {"order_tokens": order_tokens}
    if codes and scaled:
        holes["fused"] = scales.fused_interpreted if task.interpreted else scales.fused
    if codes:
        holes["encode"] = _encode(stores, task.interpreted)
    if constants["COMPANION"]:
        holes["encode_own"] = _encode(own, task.interpreted)
    if constants["SCALE_HERE"]:
        up = precision.kind == "int" and precision.bits == 8
        e4m3 = scales.up_to_e4m3 if up else scales.within_e4m3
        holes["round_scale"] = e4m3 if spec.scale_dtype == "fp8_e4m3" else scales.nearest
        # without PTX, which takes four values at once: a tile may have one scale
        holes["encode_scale"] = _encode(precisions.get(spec.scale_dtype), True)
    if codes and constants["VALUES"]:
        holes["decode"] = precision.triton_decode
    return QuantizePlan(
        name=f"quantize_{spec.role}_{spec.precision}" if codes else f"extremes_of_{spec.role}",
        title=_title(task),
        holes=tuple(holes.items()),
        constants=tuple((name, value if isinstance(value, str) else repr(value)) for name, value in constants.items()),
        tokens=tokens,
        num_warps=min(8, max(4, tokens * padded // 2048)),
        checked=bool(constants["CHECK_SCALE"] or constants["CHECK_FP16"]),
    )


precisions.base.WHEN_REPLACED.append(plan.cache_clear)


def _may_not_fit(task: Task) -> bool:
    """Whether there are tensors of this type with a scale, or a zero, that is beyond what `scale_dtype` holds."""
    spec = task.spec
    if spec.scale_dtype == "fp32" and spec.symmetric:
        return False
    reach = torch.finfo(task.dtype).max
    if task.offset_tokens:
        reach *= 2  # a mean is as large as a value at most
    if task.rotated:
        reach *= task.head_dim**0.5
    if task.balanced or task.folded or spec.smooth == "static":  # by numbers that are any
        reach = float("inf")
    largest = torch.finfo(SCALE_TYPES[spec.scale_dtype]).max
    if spec.symmetric:
        return reach / (spec.format.largest or 1) > largest
    return max(reach, 2 * reach / (spec.format.levels or 1)) > largest or 2 * reach > torch.finfo(torch.float32).max


def _encode(precision: precisions.Precision, interpreted: bool) -> Any:
    return (interpreted and precision.triton_quantize_interpreted) or precision.triton_quantize


def _title(task: Task) -> str:
    steps = ["less an offset"] * (task.offset_tokens > 0) + ["balanced"] * task.balanced + ["rotated"] * task.rotated
    steps += ["times K's scale"] * task.folded
    made = "extremes of tiles" if task.step == "extremes" else str(task.spec)
    source = f"{task.spec.role} {TRITON_TYPES[task.dtype].removeprefix('tl.')}"
    layout = ["tokens side by side"] * task.tokens_last + [f"into pages of {task.page}"] * (task.page > 0)
    return ", ".join([f"{source} to {made}", f"head_dim {task.head_dim}", *steps, *layout])
