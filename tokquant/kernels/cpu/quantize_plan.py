"""Makes all decisions about a C++ quantization kernel: from an operand and its transforms to constants and fragments."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

from tokquant import blocks, precisions
from tokquant.kernels.cpu.instructions import INSTRUCTIONS
from tokquant.kernels.cpu.plan import CPP_TYPES, CpuPlan
from tokquant.kernels.products import FLOAT_NAMES
from tokquant.kernels.quantize_task import OperandTask
from tokquant.quantize import check_groups
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import as_bytes, needs_code_sums, needs_query_sums, place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.transforms import Steps

LONGEST = 128
"""The most tokens of a chunk. Scales of more tokens need two passes: extremes first, then codes."""
SOURCES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
"""C++ types of the tensor that is quantized."""


@dataclass(frozen=True, kw_only=True)
class Task(OperandTask):
    """What a C++ quantization kernel does with one operand. Of V, `code_sum` is for each tile."""

    as_bytes: bool
    """Whether products take its codes as bytes, which decides how `tokquant.blocks` stores them."""
    tile: int
    """V: tokens of a tile, which has panels of its own."""
    met: Literal["", "bytes", "floats"] = ""
    """Q: also write it as products read it, as unpacked `bytes` or decoded `floats`; empty if they read its codes."""

    __hash__ = OperandTask.__hash__  # a dataclass would replace it

    @cached_property
    def stored(self) -> torch.dtype:
        """The type of stored elements in the canonical layout, which Q has."""
        return self.spec.format.of(self.dtype).stored

    @cached_property
    def bits(self) -> int:
        """Bits of a code in memory."""
        return blocks.bits_of(self.spec.format, self.stored, self.as_bytes)


@lru_cache(maxsize=1024)  # every call looks up three tasks
def task_of(
    scheme: QuantScheme,
    role: str,
    head_dim: int,
    dtype: torch.dtype,
    steps: Steps,
    *,
    k_offset: bool = False,
    k_origin: bool = False,
    paged: bool = False,
) -> Task | None:
    """The task for an operand; None where torch quantizes it, because no kernel can, or where Q stays as it is.

    Raises SchemeError where its granularity does not fit head_dim.
    """
    spec: Operand = getattr(scheme, role)
    if spec.scaled:
        check_groups(spec, head_dim)
    elif role == "q" and not any(steps) and spec.format.of(dtype).stored == dtype:
        return None
    sums = {
        # sums of integers are exact in any order; others are left to torch
        "q": needs_query_sums(scheme) and spec.format.kind == "int" and place(spec) == "scores",
        "k": False,
        "v": needs_code_sums(scheme) and not paged,
    }
    task = Task(
        spec=spec,
        head_dim=head_dim,
        dtype=dtype,
        as_bytes=role != "q" and as_bytes(scheme, role),
        weighted=role == "v" and place(spec) == "p",
        tile=scheme.key_tile if role == "v" else LONGEST,
        **steps._asdict(),
        k_offset=k_offset,
        k_origin=k_origin,
        met=_met(scheme) if role == "q" else "",
        code_sum=sums[role],
    )
    return None if lacking(task) else task


def _met(scheme: QuantScheme) -> Literal["", "bytes", "floats"]:
    """`Task.met` for a scheme. Empty also where the values have to be computed from the codes afterwards."""
    q = scheme.q
    if as_bytes(scheme, "k"):
        return "bytes" if q.format.kind == "int" and q.format.packed > 1 else ""
    decodable = q.format.kind == "int" or bool(q.format.cpp_decode)
    return "floats" if decodable and place(q) != "operand" else ""


def lacking(task: Task) -> str | None:
    """Why no kernel can quantize this operand, so that torch does; None where one can."""
    spec = task.spec
    precision = spec.format
    if not precision.of(task.dtype).cpp_quantize:
        return f"{spec.role}: precision {spec.precision} has no cpp_quantize"
    integers = precision.kind == "int"
    if not integers and (task.as_bytes or task.code_sum):
        return f"{spec.role}: codes of {spec.precision} are multiplied as bytes, but are no integers"
    if task.head_dim == 1:
        return f"{spec.role}: head_dim 1, where a token is a channel"
    if task.bits < 2:
        return f"{spec.role}: codes of {spec.precision} have less than two bits"
    if task.bits != 8 * precision.of(task.dtype).stored.itemsize // precision.packed:
        return f"{spec.role}: bytes of {spec.precision} are other numbers than its codes"
    if spec.role == "q" and task.bits < 8 and not _side_by_side(precision):
        return f"q: {spec.precision} packs its codes in an order or from a number of its own"
    return None


def _side_by_side(precision: precisions.Precision) -> bool:
    """Whether codes are packed as kernels pack those of Q: the first in the lowest bits, integers counted from the lowest."""
    bits = 8 // precision.packed
    stored = torch.arange(256, dtype=torch.uint8, device="cpu")
    codes = precision.unpack(stored.view(precision.stored)[:, None], precision.packed).view(torch.uint8)
    first = 2 ** (bits - 1) if precision.kind == "int" else 0
    shifted = stored[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu")
    return torch.equal(codes & (2**bits - 1), (shifted - first) & (2**bits - 1))


@lru_cache(maxsize=256)
def plan(task: Task, instructions: str) -> CpuPlan:
    """The plan of the kernel for a task for which `lacking` returns None."""
    spec, d, precision = task.spec, task.head_dim, task.spec.format
    tokens, channels = spec.granularity.cover(WHOLE, d) if spec.scaled else (1, d)
    dynamic = spec.scaled and spec.scale == "dynamic"
    here = dynamic and tokens <= LONGEST
    scale_type = SCALE_TYPES[spec.scale_dtype]
    integers, half = precision.kind == "int", 2 ** (precision.bits - 1)
    written = precision.of(task.dtype)
    decode = "to_floats(number(code))" if integers else written.cpp_decode
    input_codes = not spec.scaled and written.stored == torch.float16
    packed = task.bits < 8
    order = d & -d
    constants = {
        "QUERIES": spec.role == "q",
        "KEYS": spec.role == "k",
        "VALUES": spec.role == "v",
        "OFFSET": task.offset_tokens > 0,
        "BALANCED": task.balanced,
        "ROTATED": task.rotated,
        "FOLDED": task.folded,
        "LOGITS": task.k_offset or task.k_origin,
        "K_OFFSET": task.k_offset,
        "K_ORIGIN": task.k_origin,
        "SCALED": spec.scaled,
        "SCALE_HERE": here,
        "SPANNING": dynamic and not here,
        "SCALE_GIVEN": spec.scaled and not here,
        "SYMMETRIC": spec.scaled and spec.symmetric,
        "ASYMMETRIC": spec.scaled and not spec.symmetric,
        "EXACT_SCALE": spec.scale_dtype == "fp32",
        "HALF_SCALE": spec.scale_dtype == "fp16",
        "SMALL_SCALE": spec.scale_dtype == "fp8_e4m3",
        "SCALE_UP": integers and precision.bits == 8,
        # a symmetric scale in fp32 always fits
        "CHECKED": (dynamic and (spec.scale_dtype != "fp32" or not spec.symmetric)) or input_codes,
        "CHECKED_CODES": input_codes,
        # count integers from the lowest: K's that are multiplied as bytes, and Q's that precisions pack so
        "COUNTED": integers and (task.as_bytes if spec.role == "k" else spec.role == "q" and packed),
        "CODE_SUM": spec.role == "q" and task.code_sum,
        "MET_BYTES": task.met == "bytes",
        "MET_FLOATS": task.met == "floats",
        "TILE_SUMS": spec.role == "v" and task.code_sum,
        "SIGNED_SCALE": task.weighted and dynamic,
        "REGISTER": INSTRUCTIONS[instructions].register,
        "D": d,
        "SOURCE": SOURCES[task.dtype],
        "SCALE_TYPE": CPP_TYPES[spec.scale_dtype],
        "TOKENS": max(blocks.LANES, tokens) if here else blocks.LANES,
        "ITEM": max(LONGEST, task.tile),
        "TILE": task.tile,
        "OFFSET_TOKENS": task.offset_tokens or WHOLE,
        "SCALE_TOKENS": tokens,
        "SCALE_CHANNELS": channels,
        "BITS": task.bits,
        "ROTATION": order,
        "ROTATION_NORM": order**-0.5,
        "LEAST_CODE": 0 if spec.symmetric else -half & (2**task.bits - 1),
        "NOT_SIGN": 2**task.bits - 1 if integers else 2 ** (task.bits - 1) - 1,
        "LARGEST": float(precision.largest or 1),
        "LEVELS": float(precision.levels),
        "HALF": float(half),
        "SCALE_LARGEST": torch.finfo(scale_type).max,
        "SCALE_SMALLEST": torch.finfo(scale_type).smallest_normal,
    }
    return CpuPlan(
        name=f"quantize_{spec.role}_{spec.precision}",
        title=_title(task),
        constants=constants,
        fragments=(
            ("encode", f"static inline ints encode(floats x) {{ return {written.cpp_quantize}; }}"),
            ("decode", f"static inline floats decode(ints code) {{ return {decode}; }}"),
        ),
        instructions=instructions,
        template="quantize",
        # torch rounds a product before it adds, so no fused multiply-adds
        flags=("-ffp-contract=off",),
    )


precisions.base.WHEN_REPLACED.extend((task_of.cache_clear, plan.cache_clear))


def _title(task: Task) -> str:
    source = f"{task.spec.role} {FLOAT_NAMES[task.dtype]}"
    return ", ".join([f"{source} to {task.spec}", f"head_dim {task.head_dim}", *task.words()])
