"""Makes all decisions about a C++ attention kernel: from a scheme and features to its constants and fragments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch

from tokquant import blocks, precisions
from tokquant.errors import UnsupportedError
from tokquant.kernels.cpu.instructions import INSTRUCTIONS
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import as_bytes, in_bfloat, lowers_logits, place
from tokquant.schemes.scheme import Operand

LARGEST_TILE = 1024
"""The largest tile of keys: a thread holds the scores of a tile at once."""
SCRATCH = 2**16
"""Bytes for the output sums of the queries that a thread takes at once; more if 8 queries need more."""
CHUNK = 2048
"""Keys of a chunk. Where few queries would leave threads without work, the keys of a head are divided into chunks."""
CPP_TYPES = {"fp32": "float", "fp16": "half", "fp8_e4m3": "e4m3"}
ROUNDED = {torch.float16: "rounded_half(x)", torch.bfloat16: "rounded_bfloat(x)", torch.float32: "x"}
"""C++ that rounds the float x to an input's type."""
BITS = {torch.float16: "to_half(x)", torch.bfloat16: "to_bfloat(x)", torch.float32: "as_ints(x)"}
"""C++ for the bits of x, rounded to an output's type."""


@dataclass(frozen=True)
class CpuPlan:
    """The complete description of a kernel before it is generated. Equal plans give equal kernels."""

    name: str
    title: str
    constants: Mapping[str, Any]
    """The template's constants: values in bool, int and float, types as C++ names them. A constant always has one kind."""
    fragments: tuple[tuple[str, str], ...]
    """Functions of the template and the C++ that replaces them: for example, that rounds P or decodes codes of K and V."""
    instructions: str
    """The instruction set; the header of this name has its products."""
    template: str = "attention"
    """The file that becomes the kernel, and the name of its function."""
    flags: tuple[str, ...] = ()
    """Compiler flags besides those of all kernels."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached, as every call looks its kernel up
        return hash((self.name, tuple(self.constants.items()), self.fragments, self.instructions, self.template, self.flags))

    def __repr__(self) -> str:
        return f"<plan {self.name} for {self.instructions}: {self.title}>"


@lru_cache(maxsize=256)
def plan(
    scheme: QuantScheme,
    *,
    head_dim: int,
    dtype: torch.dtype,
    wanted: Wanted,
    instructions: str,
    output: torch.dtype = torch.float32,
) -> CpuPlan:
    """The plan of an attention kernel for tensors of `dtype`. Raises UnsupportedError for what no C++ kernel can do."""
    encoder = scheme.p.format.of(dtype)
    _refuse(scheme, encoder)
    q, k, v = scheme.q, scheme.k, scheme.v
    at = {role: place(getattr(scheme, role)) for role in "qkv"}
    products_k, products_v = (products(scheme, role, dtype, instructions) for role in "kv")
    integer_k, integer_v = products_k == "integers", products_v == "integers"
    k_bits, v_bits = (blocks.bits_of(x.format, x.format.of(dtype).stored, as_bytes(scheme, x.role)) for x in (k, v))
    k_scales_scores = at["k"] == "scores"
    k_tokens, v_tokens = (x.granularity.cover(WHOLE, head_dim)[0] if x.scaled else 1 for x in (k, v))
    # one scale of K for a whole tile is multiplied into the factor of the queries
    uniform = k.symmetric and k_tokens >= scheme.key_tile
    rotation = head_dim & -head_dim
    lowered = lowers_logits(scheme)
    natural = wanted.softcap or wanted.mask == "additive" or wanted.bias != "none"
    tables = INSTRUCTIONS[instructions].tables
    looked_up_k = tables and not integer_k and _signed(k.format, k_bits)
    looked_up_v = tables and not integer_v and _signed(v.format, v_bits)
    # a table of decoded values serves two panels, so a scale must cover both
    tables_k = tables and at["k"] == "operand" and k_bits <= 4 and k_tokens % (2 * blocks.LANES) == 0
    v_channels = head_dim // columns(v, head_dim)
    tables_v = tables and at["v"] == "operand" and v_bits <= 4 and v_channels % (2 * blocks.LANES) == 0
    block = SCRATCH // (4 * head_dim)
    constants = {
        "INTEGERS": integer_k or integer_v,
        "FLOATS": not (integer_k and integer_v) or q.smooth == "block_mean" or wanted.bias == "lowrank",
        "INTEGER_K": integer_k,
        "INTEGER_V": integer_v,
        "Q_SCALED": at["q"] == "scores",
        "BFLOAT_K": products_k == "bfloats",
        "BFLOAT_V": products_v == "bfloats",
        "K_UNPACKED": not integer_k and k_bits < 32,
        "V_UNPACKED": not integer_v and v_bits < 32,
        "K_DECODED": at["k"] == "operand",
        "V_DECODED": at["v"] == "operand",
        "K_DECODED_ZERO": at["k"] == "operand" and not k.symmetric,
        "V_DECODED_ZERO": at["v"] == "operand" and not v.symmetric,
        "K_TABLES": tables_k,
        "V_TABLES": tables_v,
        "K_LOOKED_UP": looked_up_k,
        "V_LOOKED_UP": looked_up_v,
        "K_SCALED": k_scales_scores,
        "K_UNIFORM": k_scales_scores and uniform,
        "K_EACH": k_scales_scores and not uniform,
        "K_ZERO": k_scales_scores and not k.symmetric,
        "V_PER_TOKEN": at["v"] == "p",
        "V_PER_TILE": at["v"] == "tile",
        "V_ON_OUTPUT": at["v"] == "output",
        "V_TOKEN_ZERO": at["v"] == "p" and not v.symmetric,
        "V_TILE_ZERO": at["v"] == "tile" and not v.symmetric,
        "V_OUTPUT_ZERO": at["v"] == "output" and not v.symmetric,
        "V_ROTATED": scheme.rotate_v == "hadamard",
        "V_MEAN": v.smooth != "none",
        "BLOCK_MEANS": q.smooth == "block_mean",
        "UNIT": scheme.p.granularity.kind == "unit",
        "QUANTIZED_NORMALIZER": scheme.normalizer == "quantized",
        "LEFT": wanted.left,
        "RIGHT": wanted.right,
        "BOUNDED": wanted.left or wanted.right,
        "SOFTCAP": wanted.softcap,
        "LOWERED_SOFTCAP": wanted.softcap and lowered,
        "LOWERED_LOGITS": lowered and not wanted.softcap and (wanted.lse or wanted.sinks),
        "BOOLEAN_MASK": wanted.mask == "boolean",
        "ADDITIVE_MASK": wanted.mask == "additive",
        "PAIRS": wanted.mask != "none" or wanted.bias == "dense",
        "ALIBI": "alibi" in wanted.bias,
        "KEY_VECTOR": wanted.bias == "key_vector",
        "LOWRANK": wanted.bias == "lowrank",
        "DENSE_BIAS": wanted.bias == "dense",
        "NATURAL": natural,
        "SINKS": wanted.sinks,
        "WITH_LSE": wanted.lse,
        "BESIDE": wanted.beside,
        "ROUNDED_OUTPUT": output != torch.float32,
        "BLOCK_OF_ONE_HEAD": q.smooth == "block_mean" or wanted.bias == "lowrank",
        "REGISTER": INSTRUCTIONS[instructions].register,
        "D": head_dim,
        "TILE": scheme.key_tile,
        "BLOCK": min(64, max(8, 1 << block.bit_length() - 1)) if block else 8,
        "CHUNK": CHUNK,
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "K_SCALE_TYPE": CPP_TYPES[k.scale_dtype],
        "V_SCALE_TYPE": CPP_TYPES[v.scale_dtype],
        "K_SCALE_TOKENS": k_tokens,
        "V_SCALE_TOKENS": v_tokens,
        "K_COLUMNS": columns(k, head_dim),
        "V_COLUMNS": columns(v, head_dim),
        "K_LOWEST": -(2 ** (k_bits - 1)),
        "K_HALF": 2.0 ** (k.format.bits - 1),
        "V_HALF": 2.0 ** (v.format.bits - 1),
        "V_UNIT": 2.0 ** (v_bits - 8),
        "RANK": wanted.bias_rank,
        "ROTATION": rotation,
        "ROTATION_NORM": rotation**-0.5,
        "LOG2_LARGEST": math.log2(scheme.p.format.largest or 1),
        "LOGIT_BASE": 1.0 if natural else math.log2(math.e),
    }
    return CpuPlan(
        name="attention_" + "_".join(getattr(scheme, role).precision for role in "qkvp"),
        title=f"{scheme}, head_dim {head_dim}",
        constants=constants,
        fragments=tuple(
            {
                "encode_p": encoder.cpp_encode,
                "decode_k": _decoder(k, dtype, k_bits, tables),
                "decode_v": _decoder(v, dtype, v_bits, tables),
                "look_up_k": _magnitudes("k", k.format) if looked_up_k else "",
                "look_up_v": _magnitudes("v", v.format) if looked_up_v else "",
                "as_input": f"static inline floats as_input(floats x) {{ return {ROUNDED[dtype]}; }}",
                "as_output": f"static inline ints as_output(floats x) {{ return {BITS[output]}; }}",
            }.items()
        ),
        instructions=instructions,
    )


precisions.base.WHEN_REPLACED.append(plan.cache_clear)


def products(scheme: QuantScheme, role: str, dtype: torch.dtype, instructions: str) -> Literal["integers", "bfloats", "floats"]:
    """The type of the products of Q and K, or of P and V."""
    if as_bytes(scheme, role):
        return "integers"
    return "bfloats" if INSTRUCTIONS[instructions].bfloats and in_bfloat(scheme, role, dtype) else "floats"


def columns(operand: Operand, head_dim: int) -> int:
    """Scales per token."""
    return head_dim // operand.granularity.cover(WHOLE, head_dim)[1] if operand.scaled else 1


def _refuse(scheme: QuantScheme, encoder: precisions.Precision) -> None:
    if not encoder.cpp_encode:
        raise UnsupportedError(
            f"scheme {scheme.name!r}: P of {encoder.name} has no C++ fragment; give its precision a cpp_encode, or use "
            "backend='reference'"
        )
    if scheme.key_tile > LARGEST_TILE:
        raise UnsupportedError(
            f"scheme {scheme.name!r}: row_block {scheme.key_tile} is more than a CPU kernel holds; at most {LARGEST_TILE}, or "
            "backend='reference'"
        )


def _decoder(operand: Operand, dtype: torch.dtype, bits: int, tables: bool) -> str:
    """C++ that decodes codes of this many bits to floats, for operands that are not multiplied as bytes.

    Codes with a zero point that are decoded by scale and zero count from 0.
    """
    name, precision = f"decode_{operand.role}", operand.format
    if bits == 32:
        return f"static inline floats {name}(ints code) {{ return as_floats(code); }}"
    if bits == 16:
        decode = "decoded_half" if precision.of(dtype).stored == torch.float16 else "from_bfloat"
        return f"static inline floats {name}(ints code) {{ return {decode}(code); }}"
    from_zero = not operand.symmetric and place(operand) == "operand"
    half = 2.0 ** (precision.bits - 1) if from_zero else 0.0
    if precision.cpp_decode and not (tables and bits <= 4):  # a register holds 16 numbers, which one instruction looks up
        number = precision.cpp_decode + (f" + {literal(half)}" if half else "")
        return f"static inline floats {name}(ints code) {{ return {number}; }}"
    values = blocks.table(precision) + half
    numbers = ", ".join(map(literal, [*values.tolist(), *[0.0] * (16 - len(values))]))
    return (
        f"static const float {name}_values[] = {{{numbers}}};\n"
        f"static inline floats {name}(ints code) {{ return looked_up<{bits}>({name}_values, code); }}"
    )


def _signed(precision: precisions.Precision, bits: int) -> bool:
    """Whether codes are bytes of a sign and a magnitude, with values that bfloat16 holds exactly."""
    if bits != 8 or not precision.in_bfloat:
        return False
    above, below = blocks.table(precision).chunk(2)
    return torch.equal(above.nan_to_num(), -below.nan_to_num())


def _magnitudes(role: str, precision: precisions.Precision) -> str:
    """C++ that looks up the values of codes of a sign and a magnitude."""
    numbers = ", ".join(f"0x{x:x}" for x in blocks.table(precision)[:128].bfloat16().view(torch.uint16).tolist())
    return (
        f"static const uint16_t magnitudes_{role}[] = {{{numbers}}};\n"
        f"static inline void look_up_{role}(words (&pairs)[2], words x) {{ looked_up(pairs, magnitudes_{role}, x); }}"
    )


def literal(x: float) -> str:
    """A float32 as a C++ literal."""
    if not math.isfinite(x):
        return "NAN" if math.isnan(x) else f"{'-' * (x < 0)}INFINITY"
    return f"{float(np.float32(x))!r}f"
