"""The signature of a generated kernel: the types of its arguments, as Triton's compiler takes them."""

from typing import TYPE_CHECKING, Any

import torch

from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.triton.operands import Features, Operand, Pages, Rows, Table
from tokquant.schemes.placement import lowers_logits, place
from tokquant.transforms import sixteen_bit

if TYPE_CHECKING:
    from tokquant.kernels.compile import Kernel

POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
SCALE_POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "fp8_e4m3": "*fp8e4nv"}


def arguments(kernel: "Kernel") -> dict[str, Any]:
    """Name -> type of each argument except the constexpr ones; None for an argument that the kernel does not use."""
    wanted, constants = kernel.wanted, kernel.plan.constants
    mask = {"none": None, "boolean": "*u8", "additive": "*fp32"}[wanted.mask]
    features = Features(
        "i32" if wanted.left else None,
        "i32" if wanted.right else None,
        "fp32" if wanted.softcap else None,
        "*fp32" if wanted.sinks else None,
        mask,
        *["i64" if mask else None] * 4,
        *["*i32" if wanted.varlen else None] * 2,
        **_bias(kernel),
    )
    if isinstance(kernel.plan, DecodePlan):
        return {
            "Q": _operand(kernel, "q"),
            **{role.upper(): _pages(kernel, role) for role in "kv"},
            "T": Table(table="*i32", row="i32", lengths="*i32", newer="*i32" if constants["NEWER"] else None),
            "Out": "*fp32",
            "Lse": "*fp32",
            "F": features,
            "scale": "fp32",
            "n_q": "i32",
            "run": "i32",
            "step": "i32",
        }
    return {
        **{role.upper(): _operand(kernel, role) for role in "qkv"},
        "Out": Rows(POINTERS[kernel.dtype], "i64", "i64", "i32"),
        "Lse": "*fp32" if wanted.lse else None,
        "F": features,
        "scale": "fp32",
        "n_q": "i32",
        "n_k": "i32",
        "heads": "i32",
    }


def _pages(kernel: "Kernel", role: str) -> Pages:
    operand = getattr(kernel.scheme, role)
    sides = SCALE_POINTERS[operand.scale_dtype] if operand.scaled else None
    offset = POINTERS[sixteen_bit(kernel.dtype)] if operand.smooth == "static" and role == "v" else None
    return Pages(_codes(kernel, role), "i32", sides, "i32" if sides else None, offset)


def _codes(kernel: "Kernel", role: str) -> str:
    return POINTERS[getattr(kernel.scheme, role).format.of(kernel.dtype).stored]


def _bias(kernel: "Kernel") -> dict[str, str]:
    """The fields of the argument `F` that hold the kernel's bias."""
    kind, factors = kernel.wanted.bias, POINTERS[sixteen_bit(kernel.dtype)]
    fields = {} if kind == "none" else {"bias": factors if kind == "lowrank" else "*fp32"}
    dimensions = {"key_vector": 2, "lowrank": 3, "dense": 4}.get(kind, 0)
    fields |= {f"bias_{dimension}": "i64" for dimension in ("batch", "head", "row", "column")[:dimensions]}
    if kind == "lowrank":
        fields |= {"k_factors": factors, **{f"k_factors_{dimension}": "i64" for dimension in ("batch", "head", "row")}}
    return fields


def _operand(kernel: "Kernel", role: str) -> Operand:
    operand, at = getattr(kernel.scheme, role), place(getattr(kernel.scheme, role))
    scale = SCALE_POINTERS[operand.scale_dtype] if operand.scaled else None
    constants = kernel.plan.constants
    offset = sixteen_bit(kernel.dtype) if operand.smooth != "none" and role != "k" else None
    return Operand(
        codes=_codes(kernel, role),
        batch="i64",
        head="i64",
        row="i32",
        scale=scale,
        zero=None if operand.symmetric else scale if at == "operand" else "*fp32",
        scale_batch="i32" if scale else None,
        scale_head="i32" if scale else None,
        scale_row="i32" if scale else None,
        offset=POINTERS[offset] if offset else None,
        code_sum="*fp32" if role == "q" and constants["K_ZERO"] else None,
        correction="*fp32" if role == "v" and constants["UNSIGNED_P"] else None,
        log2_weight="*fp32" if at == "p" else None,
        inverse_weight="*fp32" if at == "p" else None,
        logit_offset="*fp32" if role == "q" and lowers_logits(kernel.scheme) else None,
        companion=POINTERS[kernel.dtype] if role == "k" and kernel.scheme.q.smooth == "block_mean" else None,
    )
