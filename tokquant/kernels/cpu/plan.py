"""What is fixed before a CPU kernel is written: from a scheme and the features asked for to constants and fragments."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tokquant import precisions
from tokquant.errors import UnsupportedError
from tokquant.kernels.plan import Wanted
from tokquant.kernels.products import FLOAT_NAMES
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import lowers_logits, place

LARGEST_TILE = 1024
"""Keys whose scores a thread holds at once."""
SCRATCH = 2**16
"""Bytes of sums that a thread holds at once, where head_dim allows it."""


@dataclass(frozen=True)
class CpuPlan:
    """Everything that is fixed before a kernel is written. Equal plans give equal kernels."""

    name: str
    title: str
    constants: tuple[tuple[str, str], ...]
    """Names and C++ literals; 0 and 1 say whether there is such a thing."""
    encode_p: str
    """The fragment that rounds P."""
    instructions: str
    """The file with the products of an instruction set."""

    def has(self, name: str) -> bool:
        """Whether a constant is 1."""
        return dict(self.constants)[name] == "1"

    def __repr__(self) -> str:
        return f"<plan {self.name} for {self.instructions}: {self.title}>"


@lru_cache(maxsize=256)
def plan(scheme: QuantScheme, *, head_dim: int, dtype: torch.dtype, wanted: Wanted, instructions: str) -> CpuPlan:
    """The plan for operands that were of type `dtype`. Raises UnsupportedError for what no C++ kernel can do."""
    encoder = p_format(scheme, dtype)
    _refuse(scheme, encoder)
    q, k, v = scheme.q, scheme.k, scheme.v
    at = {role: place(getattr(scheme, role)) for role in "qkv"}
    integer_k, integer_v = integers(scheme, "k"), integers(scheme, "v")
    rotation = head_dim & -head_dim
    lowered = lowers_logits(scheme)
    natural = wanted.softcap or wanted.mask == "additive" or wanted.bias != "none"
    block = SCRATCH // (4 * head_dim)
    constants: dict[str, Any] = {
        "INTEGERS": integer_k or integer_v,
        "FLOATS": not (integer_k and integer_v) or q.smooth == "block_mean" or wanted.bias == "lowrank",
        "INTEGER_K": integer_k,
        "INTEGER_V": integer_v,
        "Q_SCALED": at["q"] == "scores",
        "K_SCALED": at["k"] == "scores",
        "K_ZERO": at["k"] == "scores" and not k.symmetric,
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
    }
    constants = {name: int(value) for name, value in constants.items()} | {
        "D": head_dim,
        "TILE": scheme.key_tile,
        "BLOCK": min(64, max(8, 1 << block.bit_length() - 1)) if block else 8,
        "RANK": wanted.bias_rank,
        "ROTATION": rotation,
        "ROTATION_NORM": _literal(rotation**-0.5),
        "LOG2_LARGEST": _literal(math.log2(scheme.p.format.largest or 1)),
        "LOGIT_BASE": _literal(1.0 if natural else math.log2(math.e)),
    }
    return CpuPlan(
        name="attention_" + "_".join(getattr(scheme, role).precision for role in "qkvp"),
        title=f"{scheme}, head_dim {head_dim}",
        constants=tuple((name, str(value)) for name, value in constants.items()),
        encode_p=encoder.cpp_encode,
        instructions=instructions,
    )


def integers(scheme: QuantScheme, role: str) -> bool:
    """Whether K meets Q, or V meets P, as bytes. Everything else meets as float32."""
    other = scheme.q if role == "k" else scheme.p
    operand = getattr(scheme, role)
    if role == "v" and scheme.p.format.cpp_encode != precisions.get("int8").cpp_encode:
        return False  # bytes of P are the nearest integers
    decoded = "operand" in (place(operand), place(scheme.q) if role == "k" else "")
    return not decoded and operand.format.compute == other.format.compute == "tl.int8"


def p_format(scheme: QuantScheme, dtype: torch.dtype) -> precisions.Precision:
    """P's precision; 16 bits are V's own."""
    precision = scheme.p.format
    return precisions.get(FLOAT_NAMES[dtype]) if precision.bits == 16 and dtype != torch.float32 else precision


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


def _literal(x: float) -> str:
    text = repr(torch.tensor(x, dtype=torch.float64).float().item())
    return f"{text}f"
