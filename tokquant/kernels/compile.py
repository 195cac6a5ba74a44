"""Compile a scheme's kernel for any GPU, on a machine without one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch

from tokquant.errors import UnsupportedError, quote
from tokquant.kernels import generate, launch, targets
from tokquant.kernels.candidates import Config
from tokquant.kernels.decode_plan import DecodePlan, decode_plan
from tokquant.kernels.plan import Plan, plan
from tokquant.kernels.products import FLOAT_NAMES, takes_tokens_last
from tokquant.kernels.resources import Resources, measure
from tokquant.kernels.roofline import Bandwidth, Prediction, bandwidth, predict
from tokquant.kernels.signature import arguments
from tokquant.kernels.targets import Target
from tokquant.kernels.wanted import BiasKind, MaskKind, Wanted
from tokquant.schemes import QuantScheme, SchemeMap, resolve
from tokquant.schemes.appending import windows
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True)
class Kernel:
    """A generated kernel: its text, its launch, and what it compiles to."""

    source: str
    config: Config
    target: Target
    plan: Plan
    scheme: QuantScheme
    head_dim: int
    dtype: torch.dtype
    wanted: Wanted
    launched: Callable[[Config], Any] | None = None
    """Compiles the kernel for a launch on actual tensors, specialized on their strides. None: compile for aligned, contiguous
    tensors."""

    @classmethod
    def of(cls, plan: Plan, scheme: QuantScheme, head_dim: int, dtype: torch.dtype, target: Target, wanted: Wanted) -> "Kernel":
        """The kernel of a plan, with the untuned configuration."""
        return cls(generate.render(plan), plan.config, target, plan, scheme, head_dim, dtype, wanted)

    def __repr__(self) -> str:
        return f"<kernel {self.plan.name} for {self.target.name}, {self.config}>"

    def candidates(self) -> "list[Kernel]":
        """The same kernel under every configuration that tuning may choose, this one's own among them."""
        return list(self._candidates)

    @cached_property
    def _candidates(self) -> "tuple[Kernel, ...]":
        # cached, as each of them caches its compiled code and its resources
        return tuple(
            replace(self, config=config, source=generate.render(self.plan, config.loop)) for config in self.plan.candidates
        )

    @cached_property
    def compiled(self) -> Any:
        """Triton's compiled kernel. Raises UnsupportedError in the interpreter, which cannot share a process with it."""
        if launch.interpreted():
            raise UnsupportedError("compile: Triton's interpreter is on; unset TRITON_INTERPRET before Python starts")
        return _compile(self) if self.launched is None else self.launched(self.config)

    @property
    def asm(self) -> dict[str, Any]:
        """The output of each stage of the compiler: `ttir ttgir llir ptx cubin`, or `amdgcn hsaco` for AMD."""
        return self.compiled.asm

    @cached_property
    def resources(self) -> Resources:
        """Registers, spills, shared memory and the instructions of the main loop. Raises as `asm`."""
        return measure(self.compiled, self.config, self.target)

    @property
    def prediction(self) -> Prediction:
        """Predicted time of the main loop, by a roofline model. Raises as `asm`."""
        return predict(self.resources, self.plan, self.head_dim, self.target, self.config.loop)

    @property
    def bandwidth(self) -> Bandwidth:
        """Predicted bandwidth of a decoding kernel. Raises as `asm`, and ValueError for a kernel that does not read pages."""
        if not isinstance(self.plan, DecodePlan):
            raise ValueError("bandwidth: this kernel does not read pages; compile it with decode=True")
        return bandwidth(self.resources, self.scheme, self.config, self.head_dim, self.target)


def compile(
    scheme: QuantScheme | SchemeMap | str,
    *,
    layer: str | None = None,
    head_dim: int,
    causal: bool = False,
    window: bool = False,
    mask: MaskKind = "none",
    softcap: bool = False,
    sinks: bool = False,
    return_lse: bool = False,
    varlen: bool = False,
    bias: BiasKind = "none",
    bias_rank: int = 16,
    shared_heads: int = 1,
    decode: bool = False,
    dtype: torch.dtype = torch.float16,
    target: str = "sm_90",
) -> Kernel:
    """The kernel of a scheme, for `target` (sm_80, sm_90, gfx942 ...). It is compiled when `asm` is first read.

    Args:
        layer: the layer's name, for a SchemeMap.
        causal, window, mask, softcap, sinks, return_lse, varlen: the features that it has.
        bias: its kind; factors of low rank have `bias_rank` columns of 16 bits.
        shared_heads: heads of Q to one of K and V.
        decode: make the kernel that reads a KV cache in pages of the scheme's size: always causal and with LSE, for one query;
            sinks do not change it.
        dtype: of the tensors.

    Raises SchemeError, ValueError for a target that is none, UnsupportedError where scheme and target do not go together.
    """
    scheme = resolve(scheme, layer)
    chosen = targets.get(target)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_NAMES:
        raise TypeError(f"dtype: {dtype} is not supported; use torch.float16, torch.bfloat16 or torch.float32")
    head_dim, shared_heads = whole_number("head_dim", head_dim, 1), whole_number("shared_heads", shared_heads, 1)
    flags = dict(
        causal=causal, window=window, softcap=softcap, sinks=sinks, return_lse=return_lse, varlen=varlen, decode=decode
    )
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {quote(flag)} is not a bool: whether the kernel has it")
    if varlen and (mask != "none" or bias == "dense"):
        raise UnsupportedError("varlen: sequences of their own lengths have no mask and no dense bias")
    if mask not in get_args(MaskKind):
        raise ValueError(f"mask: {quote(mask)} is not valid; use none, boolean or additive")
    if bias not in get_args(BiasKind):
        raise ValueError(f"bias: {quote(bias)} is not valid; use none, alibi, key_vector, lowrank or dense")
    wanted = Wanted(
        left=window,
        right=causal or window,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        lse=return_lse,
        varlen=varlen,
        bias="past_alibi" if bias == "alibi" and causal else bias,
        bias_rank=whole_number("bias_rank", bias_rank, 1),
    )
    if decode:
        if mask != "none" or bias != "none" or varlen:
            raise UnsupportedError("decode: a kernel that reads pages has no mask and no bias, and lengths of its own anyway")
        if sinks:
            raise UnsupportedError(
                "sinks: no kernel that reads pages has them, as they enter where its result is merged; leave them out for the "
                "kernel that tokquant.decode launches with sinks as without"
            )
        wanted = replace(wanted, right=True, lse=True)
        paged = decode_plan(
            scheme,
            head_dim=head_dim,
            dtype=dtype,
            page=windows(scheme).page,
            shared_heads=shared_heads,
            wanted=wanted,
            rows=shared_heads,
            target=chosen,
        )
        return Kernel.of(paged, scheme, head_dim, dtype, chosen, wanted)
    return kernel_of(scheme, wanted, head_dim=head_dim, dtype=dtype, shared_heads=shared_heads, target=chosen)


def kernel_of(
    scheme: QuantScheme, wanted: Wanted, *, head_dim: int, dtype: torch.dtype, shared_heads: int, target: Target
) -> Kernel:
    """The attention kernel of a scheme with these features. Raises UnsupportedError."""
    tokens_last = takes_tokens_last(scheme, dtype)
    sizes: dict[str, Any] = dict(head_dim=head_dim, dtype=dtype, shared_heads=shared_heads)
    made = plan(scheme, **sizes, wanted=wanted, tokens_last=tokens_last, target=target)
    return Kernel.of(made, scheme, head_dim, dtype, target, wanted)


def _compile(kernel: Kernel) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes = {}
    for position, (name, value) in enumerate(arguments(kernel).items()):
        parts = list(value) if isinstance(value, tuple) else [value]
        for index, part in enumerate(parts):
            path = (position, index) if isinstance(value, tuple) else (position,)
            if part is None:
                constexprs[path] = None
                parts[index] = "constexpr"
            elif part.startswith("*") or part in ("i64", "i32"):
                # as Triton finds at a launch on aligned tensors; without it loads are scalar
                attributes[path] = [["tt.divisibility", 16]]
        signature[name] = type(value)(*parts) if isinstance(value, tuple) else parts[0]
    for name, number in kernel.config.tiles().items():
        constexprs[(len(signature),)] = number
        signature[name] = "constexpr"
    function = generate.load(kernel.plan, kernel.config.loop)
    source = _language(kernel)(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget(kernel.target.backend, kernel.target.arch, kernel.target.lanes)
    return triton.compile(source, target=target, options=kernel.config.options())


def _language(kernel: Kernel) -> Any:
    if kernel.config.loop == "hopper":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource
