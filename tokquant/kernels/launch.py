"""Launches attention kernels: turns operands into pointers and strides, computes the grid, and calls the kernel."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokquant.bias import Alibi, Bias, Dense, KeyVector, LowRank
from tokquant.errors import UnsupportedError
from tokquant.features import Features
from tokquant.kernels import generate, order, targets, tuned
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import Plan, plan
from tokquant.kernels.products import takes_tokens_last
from tokquant.kernels.triton.operands import Features as Arguments
from tokquant.kernels.triton.operands import Operand, Rows
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor, canonical, tokens_last

Operands = tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]

MOST = 65535
"""The largest second and third dimension of a grid."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of this device."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


def on(device: torch.device) -> AbstractContextManager:
    """A context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attention(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedTensor,
    scheme: QuantScheme,
    features: Features,
    return_lse: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention on codes by the scheme's kernel: out `[B, H_q, N_q, D]` in q's type, LSE `[B, H_q, N_q]` float32 or None.

    `deterministic` ignores tuning, which depends on the batch and on the contents of the cache folder.

    Raises UnsupportedError for what no kernel does.
    """
    check(q.device, features)
    return prepare(q, k, v, scheme, features, return_lse, deterministic=deterministic).run()


def check(device: torch.device, features: Features) -> None:
    """Raise UnsupportedError where no kernel runs on this device, or none with these features."""
    if not available(device):
        raise UnsupportedError(
            f"backend: 'triton' needs a GPU, and q is on {device}; move the tensors, set TRITON_INTERPRET=1 before Python "
            "starts, or use backend='reference'"
        )
    if features.scale < 0:
        raise UnsupportedError(
            f"scale: {features.scale} is below zero, which no kernel takes; negate q, or use backend='reference'"
        )


@dataclass(frozen=True)
class Call:
    """A prepared launch: the kernel, its configuration and all its arguments."""

    plan: Plan
    config: Config
    operands: tuple[Any, ...]
    """The kernel's arguments without the constexpr ones."""
    shape: tuple[int, int, int]
    """Batch, heads, and queries of the longest sequence."""
    abreast: int | None
    """Heads per group of the grid, from `order.abreast`; None without a right bound, where heads follow one another."""
    out: Tensor
    lse: Tensor | None
    dtype: torch.dtype
    """Type of the returned output; `out` may be wider."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """(heads of a group, blocks of queries, groups of heads) with a right bound; else (blocks of queries, heads, batch).

        Raises UnsupportedError where a dimension exceeds the limits of a launch.
        """
        (b, heads, n_q), block_m = self.shape, self.config.block_m
        blocks = -(-n_q // block_m)
        if self.abreast is None:
            return grid("q", blocks, heads, b)
        groups = b * heads // self.abreast
        if max(blocks, groups) > MOST:
            raise UnsupportedError(
                f"q: batch {b}, {heads} heads and {n_q} queries; a launch takes at most {MOST} blocks of {block_m} queries, "
                f"and {MOST} times the {self.abreast} heads that start side by side, so split the call"
            )
        return (self.abreast, blocks, groups)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All of the kernel's arguments, in order."""
        return (*self.operands, *self.config.tiles().values())

    def compiled(self) -> Any:
        """Triton's compiled kernel for these arguments, without launching it."""
        kernel, device = generate.load(self.plan, self.config.loop), self.out.device
        with on(device):
            return kernel.warmup(*self.arguments, grid=self.grid, **self.config.options())

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Launch. Returns output and LSE."""
        with on(self.out.device):
            generate.load(self.plan, self.config.loop)[self.grid](*self.arguments, **self.config.options())
        return self.out.to(self.dtype), self.lse


def prepare(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedTensor,
    scheme: QuantScheme,
    features: Features,
    return_lse: bool,
    *,
    deterministic: bool = False,
    onto: tuple[Tensor, Tensor] | None = None,
) -> Call:
    """Prepare a launch: choose plan and configuration, allocate the outputs, and lay out the arguments.

    Given attention to other keys, output and LSE in float32, the result is merged into it, and masked keys may hold anything.
    """
    q, k, v = (canonical(x) for x in (q, k, v))
    wanted = replace(Wanted.of(features, return_lse), beside=onto is not None)
    made = planned((q, k, v), scheme, wanted)
    out, lse = onto or outputs(q, q.shape, return_lse)
    (b, heads, n_q, _), n_k = q.shape, k.shape[2]
    operands = (operand(x) for x in (q, k, v))
    kv_bytes = k.codes.nbytes + v.codes.nbytes
    return Call(
        plan=made,
        config=made.config if deterministic else tuned.choose(made, q.device, b * heads, n_q, n_k)[0],
        operands=(*operands, Rows(out, *out.stride()[:3]), lse, arguments_of(features), features.scale, n_q, n_k, heads),
        shape=(b, heads, n_q),
        abreast=order.abreast(b * heads, b * k.shape[1], kv_bytes, targets.of(q.device).cache_size) if wanted.right else None,
        out=out,
        lse=lse,
        dtype=q.dtype if onto is None else out.dtype,
    )


def grid(name: str, blocks: int, heads: int, batch: int) -> tuple[int, int, int]:
    """The grid (blocks of tokens, heads, batch) of an operand. Raises UnsupportedError where it exceeds a launch's limits."""
    if max(batch, heads) > MOST:
        raise UnsupportedError(
            f"{name}: batch {batch} and {heads} heads; a launch takes at most {MOST} of each, so split the call"
        )
    return (blocks, heads, batch)


def planned(operands: Operands, scheme: QuantScheme, wanted: Wanted, *, portable: bool = False) -> Plan:
    """The plan for operands with their layouts, on their device. Raises UnsupportedError where no kernel can run."""
    q, k, v = operands
    made = plan(
        scheme,
        head_dim=q.shape[3],
        dtype=v.dtype,
        shared_heads=q.shape[1] // k.shape[1],
        wanted=wanted,
        tokens_last=v.layout == "tokens_last",
        interpreted=interpreted(),
        portable=portable or not all(aligned(x.codes) for x in operands),
        target=targets.of(q.device),
    )
    check_products(made)
    return made


def check_products(plan: Plan) -> None:
    """Raise UnsupportedError for products that Triton's interpreter computes wrongly, if kernels run in it."""
    if "tl.bfloat16" in plan.products and interpreted():
        raise UnsupportedError(
            "dtype: Triton's interpreter multiplies bf16 wrongly; use float16 or float32, or backend='reference'"
        )


def aligned(codes: Tensor) -> bool:
    """Whether rows of codes begin at multiples of 16 bytes."""
    elements = 16 // codes.itemsize
    return codes.data_ptr() % 16 == 0 and not any([step % elements for step in steps(codes)[:-1]])


def outputs(q: QuantizedTensor, shape: tuple[int, ...], return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for the output `[B, H, N, D]` and, if wanted, the LSE `[B, H, N]`."""
    # the interpreter truncates floats to bf16 instead of rounding them
    dtype = torch.float32 if interpreted() and q.dtype == torch.bfloat16 else q.dtype
    out = torch.empty(shape, dtype=dtype, device=q.device)
    return out, torch.empty(shape[:3], dtype=torch.float32, device=q.device) if return_lse else None


def packed(operands: Operands, scheme: QuantScheme) -> Operands:
    """Quantized operands in the memory layouts that kernels take."""
    q, k, v = operands
    return (q, k, tokens_last(v)) if takes_tokens_last(scheme, v.dtype) else operands


def arguments_of(features: Features) -> Arguments:
    """The kernel's argument `F`: the values of a call's features."""
    left, right = features.reach()
    mask, sinks = features.mask, features.sinks
    steps = (None,) * 4 if mask is None else mask.stride()
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    sinks = None if sinks is None else sinks.contiguous()
    return Arguments(left, right, features.softcap, sinks, mask, *steps, **_bias(features.bias))


def _bias(bias: Bias | None) -> dict[str, Any]:
    """The fields of the argument `F` that hold a bias."""
    match bias:
        case Alibi():
            return {"bias": bias.slopes.contiguous()}
        case KeyVector():
            return _strided("bias", _rows(bias.values), "batch", "head")
        case LowRank():
            q, k = _rows(bias.q_factors), _rows(bias.k_factors)
            if interpreted() and q.dtype == torch.bfloat16:
                q, k = q.float(), k.float()  # the interpreter computes bf16 products wrongly
            return _strided("bias", q, "batch", "head", "row") | _strided("k_factors", k, "batch", "head", "row")
        case Dense():
            return _strided("bias", bias.values, "batch", "head", "row", "column")
    return {}


def _strided(name: str, x: Tensor, *dimensions: str) -> dict[str, Any]:
    return {name: x, **{f"{name}_{dimension}": step for dimension, step in zip(dimensions, steps(x), strict=False)}}


def operand(x: QuantizedTensor) -> Operand:
    """A quantized tensor as a kernel's argument."""
    codes = _rows(x.codes)
    origin = x.zero if place(x.spec) == "operand" else x.origin if place(x.spec) != "p" else x.origin_over_weight
    scale, zero = (None if each is None else _rows(each) for each in (x.scale, origin))
    if scale is not None and zero is not None and scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    offset = None
    if x.offset is not None and x.spec.role != "k":
        offset = x.offset.expand(*x.shape[:2], *x.offset.shape[2:])
    sums = x.code_sum if x.spec.role == "q" else None
    offset, *rest = (
        None if each is None else each.contiguous()
        for each in (offset, sums, x.correction, x.log2_weight, x.inverse_weight, x.logit_offset, x.companion)
    )
    return Operand(codes, *strides(codes), scale, zero, *strides(scale), offset, *rest)


def _rows(x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous and its row stride small enough for 32-bit offsets in a tile."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < 2**22 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int | None, int | None, int | None]:
    """Strides of batch, head and row; None for no tensor."""
    return (None, None, None) if x is None else steps(x)[:3]  # type: ignore[return-value]


def steps(x: Tensor) -> tuple[int, ...]:
    """Strides of every dimension; zero for dimensions of size 1, so that they broadcast."""
    shape, stride = x.shape, x.stride()
    return tuple([0 if size == 1 else step for size, step in zip(shape, stride, strict=True)]) if 1 in shape else stride
