"""Quantizes Q, K and V by C++ kernels, with the codes and scales that `tokquant.quantize` defines, and K and V in panels.

Each tensor is read once if the tokens of a scale fit one chunk, and twice if a scale spans more. Torch computes means and
balance factors, and quantizes operands that no kernel can (`quantize_plan.lacking` says why).
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from tokquant import blocks
from tokquant.calibration.scales import LayerScales
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.bound import BoundKernel
from tokquant.kernels.cpu.launch import PREPARED
from tokquant.kernels.cpu.quantize_plan import Task, plan, task_of
from tokquant.kernels.launch import Operands
from tokquant.quantize import frames, keys, log2_weight, of_keys, values, without_offset
from tokquant.quantize import quantize_operands as define
from tokquant.quantize import queries as define_queries
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.placement import needs_query_sums
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, in_blocks, product_values
from tokquant.transforms import Frame

Tensors = Mapping[str, Tensor | None]

MET = {"bytes": torch.int8, "floats": torch.float32}
"""Types of Q as products read it, by `Task.met`."""


def quantize_operands(q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None) -> Operands:
    """`tokquant.quantize.quantize_operands`, but with K and V in panels. Raises as that.

    All results are equal bit for bit except `logit_offset`, whose float32 sums are added in another order.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    run = _Run(scheme, scales)
    kq = run.keys(k, k_frame)
    qq = run.queries(q, q_frame, kq)
    vq = run.values(v, v_frame)
    if not run.fits:
        # raises, and says which value overflows its type
        define(q, k, v, scheme, scales)
    return qq, kq, vq


def queries(
    q: Tensor, frame: Frame, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> tuple[QuantizedTensor, BoundKernel | None]:
    """`tokquant.quantize.queries`, and the kernel that computed it, which can be called to overwrite it; None for torch."""
    run = _Run(scheme, scales)
    qq = run.queries(q, frame, k)
    return (qq, run.bound) if run.fits else (define_queries(q, frame, k, scheme, scales), None)


class _Run:
    """Quantizes the operands of one call, each by its kernel or by torch."""

    def __init__(self, scheme: QuantScheme, scales: LayerScales | None):
        self.scheme = scheme
        self.scales = scales
        self.instructions = build.instructions()
        self.fits = True
        """Whether no value has overflowed its type so far."""
        self.bound: BoundKernel | None = None
        """The last kernel that ran."""

    def keys(self, k: Tensor, frame: Frame) -> QuantizedTensor:
        task = task_of(self.scheme, "k", k.shape[3], k.dtype, frame.steps())
        if task is None:
            return in_blocks(keys(k, frame, self.scheme, self.scales), self.scheme)
        kq = self._quantize(k, frame, task)
        if self.scheme.q.smooth == "block_mean":
            kq = replace(kq, companion=without_offset(k, frame))
        return kq

    def queries(self, q: Tensor, frame: Frame, k: QuantizedTensor) -> QuantizedTensor:
        turned, k_offset, k_origin = of_keys(q, frame, k)
        of_k = dict(k_offset=k_offset is not None, k_origin=k_origin is not None)
        task = task_of(self.scheme, "q", q.shape[3], q.dtype, turned.steps(), **of_k)
        if task is None:
            return replace(define_queries(q, frame, k, self.scheme, self.scales), scheme=self.scheme)
        b, h, n, _ = q.shape
        logit_offset = torch.empty(b, h, n, 1, dtype=torch.float32, device="cpu") if any(of_k.values()) else None
        code_sum = torch.empty(b, h, n, 1, dtype=torch.float32, device="cpu") if task.code_sum else None
        unpacked = torch.empty(q.shape, dtype=MET[task.met], device="cpu") if task.met else None
        fields = {"logit_offset": logit_offset, "code_sum": code_sum}
        qq = self._quantize(q, turned, task, fields, {"k_offset": k_offset, "k_origin": k_origin, "met": unpacked})
        if needs_query_sums(self.scheme) and code_sum is None:
            qq = replace(qq, code_sum=product_values(qq).sum(dim=-1, keepdim=True))
        if unpacked is not None:
            PREPARED[qq] = unpacked
        return qq

    def values(self, v: Tensor, frame: Frame) -> QuantizedTensor:
        b, h, n, d = v.shape
        task = task_of(self.scheme, "v", d, v.dtype, frame.steps())
        if task is None:
            return in_blocks(values(v, frame, self.scheme, self.scales), self.scheme)
        sums = torch.empty(b, h, -(-n // task.tile), d, dtype=torch.int32, device="cpu") if task.code_sum else None
        vq = self._quantize(v, frame, task, {"code_sum": sums})
        if not task.weighted:
            return vq
        assert vq.scale is not None
        signed = vq.scale.float()
        scale = signed.abs()
        weighted = replace(vq, scale=scale.to(vq.scale.dtype), log2_weight=log2_weight(scale, signed < 0))
        PREPARED[weighted] = vq.scale
        return weighted

    def _quantize(
        self, x: Tensor, frame: Frame, task: Task, fields: Tensors = MappingProxyType({}), more: Tensors = MappingProxyType({})
    ) -> QuantizedTensor:
        """Quantize `x` in `frame`. The kernel also writes `fields` of the result, and reads or writes the tensors in `more`."""
        codes, (scale, zero) = allocate_codes(x.shape, task), self._scales(x, task.spec)
        tensors = dict(codes=codes, scale=scale, zero=zero, offset=frame.offset, balance=frame.balance, fold=frame.fold)
        self.bound = BoundKernel(plan(task, self.instructions), {**tensors, **fields, **more})
        self.fits &= self.bound(x)
        return QuantizedTensor(
            codes=codes,
            scale=scale,
            zero=zero,
            frame=frame,
            spec=task.spec,
            scheme=self.scheme,
            shape=x.shape,
            dtype=x.dtype,
            layout="canonical" if task.spec.role == "q" else "blocks",
            **fields,
        )

    def _scales(self, x: Tensor, spec: Operand) -> tuple[Tensor | None, Tensor | None]:
        """Calibrated scales and zeros, or empty tensors for the kernel to write."""
        if not spec.scaled:
            return None, None
        if spec.scale == "static":
            assert self.scales is not None
            zero = self.scales.zero(spec, x)
            return self.scales.scale(spec, x).contiguous(), None if zero is None else zero.contiguous()
        shape = spec.granularity.scale_shape(x.shape)
        scale = torch.empty(*shape, dtype=SCALE_TYPES[spec.scale_dtype], device="cpu")
        return scale, None if spec.symmetric else torch.empty_like(scale)


def allocate_codes(shape: torch.Size, task: Task) -> Tensor:
    """Memory for the codes of `[B, H, N, D]`."""
    b, h, n, d = shape
    role, codes = task.spec.role, 32 // task.bits
    if role == "q":
        return torch.empty(b, h, n, -(-d // task.spec.format.packed), dtype=task.stored, device="cpu")
    if role == "k":
        tokens, size = blocks.LANES, (-(-d // codes), blocks.LANES)
    else:
        tokens, size = task.tile, (-(-d // blocks.LANES), task.tile // codes, blocks.LANES)  # type: ignore[assignment]
    # a kernel writes the codes of tokens only; those that fill up the last panels are zeros
    make = torch.zeros if n % tokens else torch.empty
    return make(b, h, -(-n // tokens), *size, dtype=torch.int32, device="cpu")
