"""The types in which Q and K, P and V are multiplied, and the layout of V that these require."""

import torch

from tokquant import precisions
from tokquant.errors import UnsupportedError
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.placement import needs_code_sums, place

TRITON_TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}
FLOAT_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

EIGHT = ("tl.int8", "tl.float8e4nv", "tl.float8e5")
BYTES = {**dict.fromkeys(EIGHT, 1), "tl.float16": 2, "tl.bfloat16": 2, "tl.float32": 4}
"""Bytes of an element, by the type of a product's operand."""

UNITS = {
    "tl.int8": "int8 tensor cores, exact 32-bit sums within a tile",
    "tl.float8e4nv": "fp8 tensor cores",
    "tl.float8e5": "fp8 tensor cores",
    "tl.float32": "float32, IEEE",
}


def product_types(scheme: QuantScheme, roles: str, dtype: torch.dtype) -> dict[str, str]:
    """The types that two operands are multiplied in, by role: int8, fp8, float32, or else a 16-bit type."""
    first, second = (getattr(scheme, role).format for role in roles)
    if roles == "pv" and first.code_zero and not needs_code_sums(scheme):
        raise UnsupportedError(
            f"scheme {scheme.name!r}: P of {first.name} needs an integer V in a kernel; use p: int8, or backend='reference'"
        )
    decoded = [role != "p" and place(getattr(scheme, role)) == "operand" for role in roles]
    if any(x.compute == "tl.float32" and not here for x, here in zip((first, second), decoded, strict=True)):
        return dict.fromkeys(roles, "tl.float32")
    if any(decoded):
        # scales are applied before the product, in the input's own type
        return dict.fromkeys(roles, TRITON_TYPES[dtype])
    if first.compute == second.compute == "tl.int8":
        return dict.fromkeys(roles, "tl.int8")
    if fp8 := fp8_types(first, second):
        return dict(zip(roles, fp8, strict=True))
    if dtype != torch.float32:
        return dict.fromkeys(roles, TRITON_TYPES[dtype])
    named = [TRITON_TYPES[x.stored] for x in (first, second) if x.stored in TRITON_TYPES]
    return dict.fromkeys(roles, named[0] if named else "tl.float16")


def fp8_types(first: precisions.Precision, second: precisions.Precision) -> tuple[str, str] | None:
    """The types of an fp8 product: of fp8 with fp8, or with a precision whose values fp8 holds exactly, such as int4."""
    wide = [x for x in (first, second) if x.compute.startswith("tl.float8") and x.bits == 8]
    if not wide:
        return None
    types = []
    for x in (first, second):
        if x.compute.startswith("tl.float8"):
            types.append(x.compute)
        elif x.bits <= 8 and torch.equal(x.values(), x.values().to(wide[0].stored).float()):
            types.append(wide[0].compute)
    return (types[0], types[1]) if len(types) == 2 else None


def takes_tokens_last(scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether kernels take V with its tokens contiguous: 8-bit tensor cores need that of the contracted dimension."""
    kind, v = product_types(scheme, "pv", dtype)["v"], scheme.v.format
    if v.bits > 8 or 16 * v.packed > scheme.key_tile:
        # elements would hold tokens of several tiles
        return False
    return kind == "tl.int8" or (v.packed == 1 and "float8" in kind)


def via(operand: Operand, product: str) -> str:
    """The type that a tile's codes are first converted to: that of their decoder where scales are applied to them, else the
    product's, or float16 on the way from integers to fp8."""
    decoded = operand.format.compute
    if place(operand) == "operand":
        return decoded
    return "tl.float16" if decoded == "tl.int8" and product.startswith("tl.float8") else product
