"""Plans quantization kernels: their fragments, constants, and the tokens that a program takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from tokquant import precisions
from tokquant.kernels.products import FLOAT_NAMES, TRITON_TYPES
from tokquant.kernels.quantize_task import LONGEST, Task, columns_of
from tokquant.kernels.triton import scales
from tokquant.schemes import Operand
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.scheme import SCALE_TYPES

AT_ONCE = 4096
"""Extremes that a program of the scales kernel reads at once."""


@dataclass(frozen=True)
class QuantizePlan:
    """The complete description of a quantization kernel before it is generated. Equal plans give equal kernels."""

    name: str
    title: str
    holes: Mapping[str, Any]
    constants: Mapping[str, Any]
    tokens: int
    """Tokens of one head that a program takes."""
    num_warps: int
    checked: bool
    """Whether the kernel checks for values that overflow their type, and sets a flag."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached, as every launch looks its kernel up
        return hash((self.name, tuple(self.holes.items()), tuple(self.constants.items())))

    def options(self) -> dict[str, Any]:
        """Options of Triton's compiler: without FMA contraction, as torch rounds after each multiplication."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}

    def __repr__(self) -> str:
        return f"<plan {self.name}: {self.title}>"


@dataclass(frozen=True, eq=False, repr=False)
class ScalesPlan(QuantizePlan):
    """The plan of a kernel that makes scales from the extremes of tiles."""


@lru_cache(maxsize=256)
def plan(task: Task) -> QuantizePlan:
    """The plan of the kernel for a task."""
    spec, d, precision = task.spec, task.head_dim, task.spec.format
    padded = max(32, 1 << (d - 1).bit_length())
    group_tokens, group_channels = spec.granularity.cover(WHOLE, d) if spec.scaled else (1, d)
    # stores along the tokens are efficient only for many tokens
    tokens = min(LONGEST, (16384 if task.tokens_last else 8192) // padded)
    if task.page:
        tokens = min(tokens, 16 if task.few else task.page)
    tokens = max(tokens, group_tokens if task.step == "both" else 1, min(task.sum_tokens, LONGEST))
    over_tokens = task.tokens_last and not task.page
    codes, scaled = task.step != "extremes", spec.scaled
    own = precisions.get(FLOAT_NAMES[task.dtype])
    stores = precision.of(task.dtype)
    order = d & -d
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
        "GROUP_TOKENS": min(group_tokens, tokens),
        "GROUP_CHANNELS": padded if group_channels == d else group_channels,
        "SCALE_TOKENS": group_tokens if codes else tokens,
        "SCALE_COLUMNS": d // group_channels,
        "HALF": 0 if spec.symmetric else 2 ** (precision.bits - 1),
        **_of_scales(task),
        "CHECK_SCALE": task.step == "both" and _may_not_fit(task),
        "CHECK_FP16": codes and stores.stored == torch.float16,
        "PACKED": stores.packed,
        "WIDTH": -(-d // stores.packed),
        "RAGGED": d % stores.packed != 0 and not over_tokens,
        "LAST": 2 ** (d % stores.packed * 8 // stores.packed) - 1,
        "BYTES": stores.stored.itemsize == 1,
        "CANONICAL": not task.tokens_last and not task.page,
        "TOKENS_LAST": over_tokens,
        "SEQUENCES": task.sequences,
        "SEQUENCE_ROWS": 0 if task.weighted else 1,
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
        holes |= _rounding(spec)
    if codes and constants["VALUES"]:
        holes["decode"] = precision.triton_decode
    return QuantizePlan(
        name=f"quantize_{spec.role}_{spec.precision}" if codes else f"extremes_of_{spec.role}",
        title=_title(task),
        holes=holes,
        constants=constants,
        tokens=tokens,
        num_warps=min(8, max(4, tokens * padded // 2048)),
        checked=bool(constants["CHECK_SCALE"] or constants["CHECK_FP16"]),
    )


@lru_cache(maxsize=256)
def extremes(task: Task) -> QuantizePlan:
    """The plan of the kernel that finds the extremes of tiles, for the scales of `task`."""
    return plan(replace(task, step="extremes"))


@lru_cache(maxsize=256)
def scales_plan(task: Task) -> ScalesPlan:
    """The plan of the kernel that makes the scales of `task` from the extremes of tiles."""
    spec, columns = task.spec, columns_of(task)
    padded = 1 << (columns - 1).bit_length()
    constants = _of_scales(task) | {
        "SEQUENCES": task.sequences,
        "CHECK_SCALE": _may_not_fit(task),
        "SCALE_STORED": True,
        "SCALE_COLUMNS": columns,
        "COLUMNS_TILE": padded,
        "ROWS": max(2, AT_ONCE // padded),
    }
    return ScalesPlan(
        name=f"scales_of_{spec.role}",
        title=f"scales of {spec.role} {spec}, of the extremes of tiles",
        holes=_rounding(spec),
        constants=constants,
        tokens=0,
        num_warps=4,
        checked=constants["CHECK_SCALE"],
    )


for _planner in (plan, extremes, scales_plan):
    precisions.base.WHEN_REPLACED.append(_planner.cache_clear)


def _of_scales(task: Task) -> dict[str, Any]:
    """The constants of the arithmetic of scales."""
    spec, precision = task.spec, task.spec.format
    kind = torch.finfo(SCALE_TYPES[spec.scale_dtype])
    return {
        "SYMMETRIC": spec.symmetric,
        "ASYMMETRIC": not spec.symmetric,
        "LARGEST": float(1 if precision.largest is None else precision.largest),
        "LEVELS": float(precision.levels),
        "SCALE_SMALLEST": kind.smallest_normal,
        "SCALE_LARGEST": kind.max,
    }


def _rounding(spec: Operand) -> dict[str, Any]:
    """The fragments that round a scale to its type."""
    up = spec.format.kind == "int" and spec.format.bits == 8
    e4m3 = scales.up_to_e4m3 if up else scales.within_e4m3
    # not in PTX, which converts four values at once, as a tile may have just one scale
    encode = _encode(precisions.get(spec.scale_dtype), True)
    return {"round_scale": e4m3 if spec.scale_dtype == "fp8_e4m3" else scales.nearest, "encode_scale": encode}


def _may_not_fit(task: Task) -> bool:
    """Whether a scale or zero of some tensor of this type could overflow `scale_dtype`."""
    spec = task.spec
    if spec.scale_dtype == "fp32" and spec.symmetric:
        return False
    reach = torch.finfo(task.dtype).max
    if task.offset_tokens:
        reach *= 2  # a mean is as large as a value at most
    if task.rotated:
        reach *= task.head_dim**0.5
    if task.balanced or task.folded or spec.smooth == "static":  # factors and offsets may have any size
        reach = float("inf")
    largest = torch.finfo(SCALE_TYPES[spec.scale_dtype]).max
    if spec.symmetric:
        return reach / (spec.format.largest or 1) > largest
    return max(reach, 2 * reach / (spec.format.levels or 1)) > largest or 2 * reach > torch.finfo(torch.float32).max


def _encode(precision: precisions.Precision, interpreted: bool) -> Any:
    return (interpreted and precision.triton_quantize_interpreted) or precision.triton_quantize


def _title(task: Task) -> str:
    made = "extremes of tiles" if task.step == "extremes" else str(task.spec)
    source = f"{task.spec.role} {TRITON_TYPES[task.dtype].removeprefix('tl.')}"
    layout = ["tokens side by side"] * task.tokens_last + [f"into pages of {task.page}"] * (task.page > 0)
    layout += ["of sequences of their own lengths"] * task.sequences
    return ", ".join([f"{source} to {made}", f"head_dim {task.head_dim}", *task.words(), *layout])
