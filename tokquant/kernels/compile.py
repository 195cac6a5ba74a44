"""Compile a scheme's kernel for any GPU, on a machine without one."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from tokquant.errors import UnsupportedError, quote
from tokquant.kernels import generate, launch, targets
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import Plan, Wanted, plan
from tokquant.kernels.products import FLOAT_NAMES, takes_tokens_last
from tokquant.kernels.resources import Resources, measure
from tokquant.kernels.roofline import Prediction, predict
from tokquant.kernels.targets import Target
from tokquant.kernels.triton.operands import Features, Operand, Rows
from tokquant.schemes import QuantScheme, resolve
from tokquant.schemes.placement import lowers_logits, place
from tokquant.transforms import sixteen_bit

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


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its text, how it is launched, and what it compiles to."""

    source: str
    config: Config
    target: Target
    plan: Plan
    scheme: QuantScheme
    head_dim: int
    dtype: torch.dtype
    wanted: Wanted

    @classmethod
    def of(cls, plan: Plan, scheme: QuantScheme, head_dim: int, dtype: torch.dtype, target: Target, wanted: Wanted) -> "Kernel":
        """The kernel of a plan, launched as it is without tuning."""
        return cls(generate.render(plan), plan.config, target, plan, scheme, head_dim, dtype, wanted)

    def __repr__(self) -> str:
        return f"<kernel {self.plan.name} for {self.target.name}, {self.config}>"

    def candidates(self) -> "list[Kernel]":
        """The same kernel under every configuration that tuning may choose, this one's own among them."""
        return [replace(self, config=config) for config in self.plan.candidates]

    @cached_property
    def compiled(self) -> Any:
        """Triton's compiled kernel. Raises UnsupportedError in the interpreter, which cannot share a process with it."""
        if launch.interpreted():
            raise UnsupportedError("compile: Triton's interpreter is on; unset TRITON_INTERPRET before Python starts")
        return _compile(self)

    @property
    def asm(self) -> dict[str, Any]:
        """What each stage of the compiler made: `ttir ttgir llir ptx cubin`, or `amdgcn hsaco` for AMD."""
        return self.compiled.asm

    @cached_property
    def resources(self) -> Resources:
        """Registers, spills, shared memory and the instructions of the main loop. Raises as `asm`."""
        return measure(self.compiled, self.config, self.target)

    @property
    def prediction(self) -> Prediction:
        """What the main loop should take, by a model. Raises as `asm`."""
        return predict(self.resources, self.plan, self.head_dim, self.target)


def compile(
    scheme: QuantScheme | str,
    *,
    head_dim: int,
    causal: bool = False,
    window: bool = False,
    mask: Literal["none", "boolean", "additive"] = "none",
    softcap: bool = False,
    sinks: bool = False,
    return_lse: bool = False,
    varlen: bool = False,
    bias: Literal["none", "alibi", "key_vector", "lowrank", "dense"] = "none",
    bias_rank: int = 16,
    shared_heads: int = 1,
    dtype: torch.dtype = torch.float16,
    target: str = "sm_90",
) -> Kernel:
    """The kernel of a scheme, for `target` (sm_80, sm_90, gfx942 ...). It is compiled when `asm` is first read.

    Args:
        causal, window, mask, softcap, sinks, return_lse, varlen: the features it is to have.
        bias: its kind; factors of low rank have `bias_rank` columns of 16 bits.
        shared_heads: heads of Q to one of K and V.
        dtype: of the tensors.

    Raises SchemeError, ValueError for a target that is none, UnsupportedError where scheme and target do not go together.
    """
    scheme = resolve(scheme)
    chosen = targets.get(target)
    if dtype not in FLOAT_NAMES:
        raise TypeError(f"dtype: {dtype} is not supported; use torch.float16, torch.bfloat16 or torch.float32")
    if type(head_dim) is not int or head_dim < 1:
        raise ValueError(f"head_dim: {quote(head_dim)} is not a whole number from 1")
    if type(shared_heads) is not int or shared_heads < 1:
        raise ValueError(f"shared_heads: {quote(shared_heads)} is not a whole number from 1")
    flags = dict(causal=causal, window=window, softcap=softcap, sinks=sinks, return_lse=return_lse, varlen=varlen)
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {quote(flag)} is not a bool: whether the kernel has it")
    if varlen and (mask != "none" or bias == "dense"):
        raise UnsupportedError("varlen: sequences of their own lengths have no mask and no dense bias")
    if mask not in ("none", "boolean", "additive"):
        raise ValueError(f"mask: {quote(mask)} is none; use none, boolean or additive")
    if bias not in ("none", "alibi", "key_vector", "lowrank", "dense"):
        raise ValueError(f"bias: {quote(bias)} is none; use none, alibi, key_vector, lowrank or dense")
    if type(bias_rank) is not int or bias_rank < 1:
        raise ValueError(f"bias_rank: {quote(bias_rank)} is not a whole number from 1")
    wanted = Wanted(
        left=window,
        right=causal or window,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        lse=return_lse,
        varlen=varlen,
        bias="past_alibi" if bias == "alibi" and causal else bias,
        bias_rank=bias_rank,
    )
    made = plan(
        scheme,
        head_dim=head_dim,
        dtype=dtype,
        shared_heads=shared_heads,
        wanted=wanted,
        tokens_last=takes_tokens_last(scheme, dtype),
        target=chosen,
    )
    return Kernel.of(made, scheme, head_dim, dtype, chosen, wanted)


def _compile(kernel: Kernel) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, wanted = kernel.config, kernel.wanted
    mask = {"none": None, "boolean": "*u8", "additive": "*fp32"}[wanted.mask]
    strides = ("i64", "i64", "i64", "i64") if mask else (None,) * 4
    arguments: dict[str, Any] = {
        **{role.upper(): _signature(kernel, role) for role in "qkv"},
        "Out": Rows(POINTERS[kernel.dtype], "i64", "i64", "i32"),
        "Lse": "*fp32" if wanted.lse else None,
        "F": Features(
            "i32" if wanted.left else None,
            "i32" if wanted.right else None,
            "fp32" if wanted.softcap else None,
            "*fp32" if wanted.sinks else None,
            mask,
            *strides,
            *["*i32" if wanted.varlen else None] * 2,
            **_bias(kernel),
        ),
        "scale": "fp32",
        "n_q": "i32",
        "n_k": "i32",
    }
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes = {}
    for position, (name, value) in enumerate(arguments.items()):
        parts = list(value) if isinstance(value, tuple) else [value]
        for index, part in enumerate(parts):
            path = (position, index) if isinstance(value, tuple) else (position,)
            if part is None:
                constexprs[path] = None
                parts[index] = "constexpr"
            elif part.startswith("*") or part in ("i64", "i32"):
                # as at a launch on tensors of even strides; without it loads are scalar
                attributes[path] = [["tt.divisibility", 16]]
        signature[name] = type(value)(*parts) if isinstance(value, tuple) else parts[0]
    for name, number in (("BLOCK_M", config.block_m), ("BLOCK_N", config.block_n)):
        constexprs[(len(signature),)] = number
        signature[name] = "constexpr"
    source = ASTSource(fn=generate.load(kernel.plan), signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget(kernel.target.backend, kernel.target.arch, kernel.target.lanes)
    return triton.compile(source, target=target, options=config.options())


def _bias(kernel: Kernel) -> dict[str, str]:
    """The fields of the kernel's features that hold its bias."""
    kind, factors = kernel.wanted.bias, POINTERS[sixteen_bit(kernel.dtype)]
    fields = {} if kind == "none" else {"bias": factors if kind == "lowrank" else "*fp32"}
    dimensions = {"key_vector": 2, "lowrank": 3, "dense": 4}.get(kind, 0)
    fields |= {f"bias_{dimension}": "i64" for dimension in ("batch", "head", "row", "column")[:dimensions]}
    if kind == "lowrank":
        fields |= {"k_factors": factors, **{f"k_factors_{dimension}": "i64" for dimension in ("batch", "head", "row")}}
    return fields


def _signature(kernel: Kernel, role: str) -> Operand:
    operand, at = getattr(kernel.scheme, role), place(getattr(kernel.scheme, role))
    own = operand.format.bits == 16 and kernel.dtype != torch.float32
    scale = SCALE_POINTERS[operand.scale_dtype] if operand.scaled else None
    constants = dict(kernel.plan.constants)
    offset = sixteen_bit(kernel.dtype) if operand.smooth != "none" and role != "k" else None
    return Operand(
        codes=POINTERS[kernel.dtype if own else operand.format.stored],
        batch="i64",
        head="i64",
        row="i32",
        scale=scale,
        zero=None if operand.symmetric else scale if at == "operand" else "*fp32",
        scale_batch="i32" if scale else None,
        scale_head="i32" if scale else None,
        scale_row="i32" if scale else None,
        offset=POINTERS[offset] if offset else None,
        code_sum="*fp32" if role == "q" and constants["K_ZERO"] == "True" else None,
        correction="*fp32" if role == "v" and constants["UNSIGNED_P"] == "True" else None,
        log2_weight="*fp32" if at == "p" else None,
        inverse_weight="*fp32" if at == "p" else None,
        logit_offset="*fp32" if role == "q" and lowers_logits(kernel.scheme) else None,
        companion=POINTERS[kernel.dtype] if role == "k" and kernel.scheme.q.smooth == "block_mean" else None,
    )
