"""The only place that starts a kernel: operands to pointers and strides, the grid, the call."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokquant.bias import Alibi, Bias, Dense, KeyVector, LowRank
from tokquant.errors import UnsupportedError
from tokquant.kernels import generate
from tokquant.kernels.plan import Plan, Wanted, check_target, plan, takes_tokens_last
from tokquant.kernels.triton.operands import Features as Arguments
from tokquant.kernels.triton.operands import Operand, Rows
from tokquant.reference import Features
from tokquant.schemes import QuantScheme
from tokquant.tensor import QuantizedTensor, tokens_last

Operands = tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]


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


def attention(
    q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme, features: Features, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention on codes by the scheme's kernel: out `[B, H_q, N_q, D]` in q's type, LSE `[B, H_q, N_q]` float32 or None.

    Raises UnsupportedError for what no kernel does.
    """
    if not available(q.device):
        raise UnsupportedError(
            f"backend: 'triton' needs a GPU, and q is on {q.device}; move the tensors, set TRITON_INTERPRET=1 before Python "
            "starts, or use backend='reference'"
        )
    if features.scale < 0:
        raise UnsupportedError(
            f"scale: {features.scale} is below zero, which no kernel takes; negate q, or use backend='reference'"
        )
    call = prepare(q, k, v, scheme, features, return_lse)
    if interpreted() and "tl.bfloat16" in call.plan.products:
        raise UnsupportedError(
            "dtype: Triton's interpreter multiplies bf16 wrongly; use float16 or float32, or backend='reference'"
        )
    if q.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        check_target(call.plan, scheme, 10 * major + minor)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        generate.load(call.plan)[call.grid](*call.arguments, **call.options)
    return call.out.to(q.dtype), call.lse


@dataclass(frozen=True)
class Call:
    """A kernel's launch, but for the launch."""

    plan: Plan
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    out: Tensor
    lse: Tensor | None


def prepare(
    q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme, features: Features, return_lse: bool
) -> Call:
    """The plan, the outputs and every argument of a launch."""
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    wanted, given = asked(features, return_lse)
    made = plan(
        scheme,
        head_dim=d,
        dtype=v.dtype,
        shared_heads=heads // k.shape[1],
        wanted=wanted,
        tokens_last=v.layout == "tokens_last",
        interpreted=interpreted(),
    )
    # the interpreter cuts floats to bf16 instead of rounding them
    written = torch.float32 if interpreted() and q.dtype == torch.bfloat16 else q.dtype
    out = torch.empty(q.shape, dtype=written, device=q.device)
    lse = torch.empty(b, heads, n_q, dtype=torch.float32, device=q.device) if return_lse else None
    config = made.config
    return Call(
        plan=made,
        grid=(-(-n_q // config.block_m), heads, b),
        arguments=(
            *(operand(x) for x in (q, k, v)),
            Rows(out, *out.stride()[:3]),
            lse,
            given,
            features.scale,
            n_q,
            n_k,
            config.block_m,
            config.block_n,
        ),
        options=config.options(),
        out=out,
        lse=lse,
    )


def packed(operands: Operands, scheme: QuantScheme) -> Operands:
    """Quantized operands as kernels want them to lie in memory."""
    q, k, v = operands
    return (q, k, tokens_last(v)) if takes_tokens_last(scheme, v.dtype) else operands


def asked(features: Features, return_lse: bool) -> tuple[Wanted, Arguments]:
    """What changes a kernel's text, and what it is given at a call."""
    left, right = features.reach()
    mask, kind = features.mask, "none"
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    bias = features.bias
    wanted = Wanted(
        left=left is not None,
        right=right is not None,
        mask=kind,  # type: ignore[arg-type]
        softcap=features.softcap is not None,
        sinks=features.sinks is not None,
        lse=return_lse,
        bias="none" if bias is None else "past_alibi" if bias.kind == "alibi" and right == 0 else bias.kind,
        bias_rank=bias.rank if isinstance(bias, LowRank) else 16,
    )
    sinks = None if features.sinks is None else features.sinks.contiguous()
    strides = (None,) * 4 if mask is None else mask.stride()
    return wanted, Arguments(left, right, features.softcap, sinks, mask, *strides, **_bias(bias))


def _bias(bias: Bias | None) -> dict[str, Any]:
    """The fields of a kernel's features that hold the bias."""
    match bias:
        case Alibi():
            return {"bias": bias.slopes.contiguous()}
        case KeyVector():
            return _strided("bias", _rows(bias.values), "batch", "head")
        case LowRank():
            q, k = _rows(bias.q_factors), _rows(bias.k_factors)
            if interpreted() and q.dtype == torch.bfloat16:
                q, k = q.float(), k.float()  # whose bf16 products are wrong
            return _strided("bias", q, "batch", "head", "row") | _strided("k_factors", k, "batch", "head", "row")
        case Dense():
            return _strided("bias", bias.values, "batch", "head", "row", "column")
    return {}


def _strided(name: str, x: Tensor, *dimensions: str) -> dict[str, Any]:
    return {name: x, **{f"{name}_{dimension}": x.stride(place) for place, dimension in enumerate(dimensions)}}


def operand(x: QuantizedTensor) -> Operand:
    """A quantized tensor as a kernel takes it."""
    codes = _rows(x.codes)
    scale, zero = (None if each is None else _rows(each) for each in (x.scale, x.zero))
    if scale is not None and zero is not None and scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    kept = None
    if x.offset is not None and x.spec.role != "k":
        kept = x.offset.expand(*x.shape[:2], *x.offset.shape[2:])
    sums = x.code_sum if x.spec.role == "q" else None
    kept, *rest = (
        None if each is None else each.contiguous()
        for each in (kept, sums, x.correction, x.log2_weight, x.logit_offset, x.companion)
    )
    return Operand(codes, *_strides(codes), scale, zero, *_strides(scale), kept, *rest)


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int | None, int | None, int | None]:
    """Strides of batch, head and row; zero where all share one scale."""
    if x is None:
        return (None, None, None)
    batch, head, row = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, head, row
