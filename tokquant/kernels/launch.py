"""The only place that starts a kernel: operands to pointers and strides, the grid, the call."""

from contextlib import nullcontext

import torch
from torch import Tensor

from tokquant.errors import UnsupportedError
from tokquant.kernels import generate
from tokquant.kernels.plan import check_target, plan
from tokquant.kernels.triton.operands import Operand, Rows
from tokquant.reference import Features
from tokquant.schemes import QuantScheme
from tokquant.tensor import QuantizedTensor


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
    for name in ("window", "mask", "softcap", "sinks"):
        if getattr(features, name) is not None:
            raise UnsupportedError(f"{name}: no Triton kernel has it yet; use backend='reference'")
    if not available(q.device):
        raise UnsupportedError(
            f"backend: 'triton' needs a GPU, and q is on {q.device}; move the tensors, set TRITON_INTERPRET=1 before Python "
            "starts, or use backend='reference'"
        )
    b, heads, n_q, d = q.shape
    kernel_plan = plan(
        scheme, head_dim=d, dtype=v.dtype, shared_heads=heads // k.shape[1], causal=features.causal, return_lse=return_lse
    )
    if interpreted() and "tl.bfloat16" in kernel_plan.products:
        raise UnsupportedError(
            "dtype: Triton's interpreter multiplies bf16 wrongly; use float16 or float32, or backend='reference'"
        )
    if q.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        check_target(kernel_plan, scheme, 10 * major + minor)

    # the interpreter cuts floats to bf16 instead of rounding them
    written = torch.float32 if interpreted() and q.dtype == torch.bfloat16 else q.dtype
    out = torch.empty(q.shape, dtype=written, device=q.device)
    lse = torch.empty(b, heads, n_q, dtype=torch.float32, device=q.device) if return_lse else None
    config = kernel_plan.config
    grid = (-(-n_q // config.block_m), heads, b)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        generate.load(kernel_plan)[grid](
            operand(q, offset=q.logit_offset if return_lse else None),
            operand(k),
            operand(v, offset=v.offset, code_sum=v.code_sum),
            Rows(out, *out.stride()[:3]),
            lse,
            features.scale,
            n_q,
            k.shape[2],
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out.to(q.dtype), lse


def operand(x: QuantizedTensor, offset: Tensor | None = None, code_sum: Tensor | None = None) -> Operand:
    """A quantized tensor as a kernel takes it."""
    codes, scale = _rows(x.codes), x.scale if x.scale is None else _rows(x.scale)
    if offset is not None:
        offset = offset.expand(x.shape[0], x.shape[1], *offset.shape[2:]).contiguous()
    return Operand(codes, *_strides(codes), scale, *_strides(scale), offset, code_sum, x.weight)


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int | None, int | None, int | None]:
    """Strides of batch, head and row; zero where all share one scale."""
    if x is None:
        return (None, None, None)
    batch, head, row = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, head, row
