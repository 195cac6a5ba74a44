"""Q, K and V to codes by C++ kernels: what `tokquant.quantize` defines, code for code and scale for scale, in panels.

Each tensor is read once where the tokens of a scale lie in one chunk, twice where a scale spans more of the sequence. Means and
factors of balance are torch's, and so is an operand that no kernel takes (`quantize_plan.lacking` says why).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokquant import blocks
from tokquant.calibration.scales import LayerScales
from tokquant.kernels.cpu.bound import Bound
from tokquant.kernels.cpu.launch import READ
from tokquant.kernels.cpu.quantize_plan import Task, lacking
from tokquant.kernels.launch import Operands
from tokquant.quantize import check_groups, frames, keys, less_offset, log2_weight, of_keys, values
from tokquant.quantize import quantize_operands as define
from tokquant.quantize import queries as define_queries
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, in_blocks, met
from tokquant.transforms import Frame


def quantize_operands(q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None) -> Operands:
    """As `tokquant.quantize.quantize_operands`, laid out for attention kernels. Raises what that raises.

    Everything is equal bit for bit, but `logit_offset`, whose float32 sums are taken in another order.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    run = _Run(scheme, scales)
    kq = run.keys(k, k_frame)
    qq = run.queries(q, q_frame, kq)
    vq = run.values(v, v_frame)
    if not run.held:
        # the definition says what does not fit
        define(q, k, v, scheme, scales)
    return qq, kq, vq


def queries(
    q: Tensor, frame: Frame, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> tuple[QuantizedTensor, Bound | None]:
    """As `tokquant.quantize.queries`, by a kernel, and that kernel, bound to what was made: it can be filled again."""
    run = _Run(scheme, scales)
    qq = run.queries(q, frame, k)
    return (qq, run.bound) if run.held else (define_queries(q, frame, k, scheme, scales), None)


class _Run:
    """The kernels of one call."""

    def __init__(self, scheme: QuantScheme, scales: LayerScales | None):
        self.scheme = scheme
        self.scales = scales
        self.held = True
        """Whether every type held its values."""
        self.bound: Bound | None = None
        """The last kernel that ran."""

    def keys(self, k: Tensor, frame: Frame) -> QuantizedTensor:
        task = self._task(k, frame, "k")
        if lacking(task):
            return in_blocks(keys(k, frame, self.scheme, self.scales), self.scheme)
        kq = self._coded(k, frame, task, {}, {})
        if self.scheme.q.smooth == "block_mean":
            kq = replace(kq, companion=less_offset(k, frame))
        return kq

    def queries(self, q: Tensor, frame: Frame, k: QuantizedTensor) -> QuantizedTensor:
        spec, (turned, k_offset, k_origin) = self.scheme.q, of_keys(q, frame, k)
        # the sum of integers is one in any order
        sums = needs_query_sums(self.scheme) and spec.format.kind == "int" and place(spec) == "scores"
        task = self._task(
            q,
            turned,
            "q",
            k_offset=k_offset is not None,
            k_origin=k_origin is not None,
            code_sum=sums,
            met=Task.read_of(self.scheme),
        )
        # floats that nothing is done to stay the tensor that they are in
        own = not spec.scaled and not turned.turns and spec.format.of(q.dtype).stored == q.dtype
        if own or lacking(task):
            return replace(define_queries(q, frame, k, self.scheme, self.scales), scheme=self.scheme)
        column = (*q.shape[:3], 1)
        logit_offset = torch.empty(column, dtype=torch.float32, device=q.device) if task.k_offset or task.k_origin else None
        code_sum = torch.empty(column, dtype=torch.float32, device=q.device) if sums else None
        met_as = {"": None, "bytes": torch.int8, "floats": torch.float32}[task.met]
        read = torch.empty(q.shape, dtype=met_as, device=q.device) if met_as else None
        made = {"logit_offset": logit_offset, "code_sum": code_sum}
        qq = self._coded(q, turned, task, {"k_offset": k_offset, "k_origin": k_origin, "met": read, **made}, made)
        if needs_query_sums(self.scheme) and not sums:
            qq = replace(qq, code_sum=met(qq).sum(dim=-1, keepdim=True))
        if read is not None:
            READ[qq] = read
        return qq

    def values(self, v: Tensor, frame: Frame) -> QuantizedTensor:
        b, h, n, d = v.shape
        sums = needs_code_sums(self.scheme)
        task = self._task(v, frame, "v", code_sum=sums)
        if lacking(task):
            return in_blocks(values(v, frame, self.scheme, self.scales), self.scheme)
        code_sum = torch.empty(b, h, -(-n // task.tile), d, dtype=torch.int32, device=v.device) if sums else None
        made = {"code_sum": code_sum}
        vq = self._coded(v, frame, task, made, made)
        if not task.weighted:
            return vq
        signed = vq.scale.float()  # type: ignore[union-attr]
        scale = signed.abs()
        return replace(vq, scale=scale.to(SCALE_TYPES[task.spec.scale_dtype]), log2_weight=log2_weight(scale, signed < 0))

    def _task(self, x: Tensor, frame: Frame, role: str, **rest: Any) -> Task:
        spec = getattr(self.scheme, role)
        if spec.scaled:
            check_groups(spec, x.shape[3])
        return Task.of(spec, self.scheme, x.shape[3], x.dtype, **frame.steps(), **rest)

    def _coded(
        self, x: Tensor, frame: Frame, task: Task, more: dict[str, Tensor | None], kept: dict[str, Tensor | None]
    ) -> QuantizedTensor:
        """`x` in `frame` and in codes, with what is `kept` beside them. What `more` holds is read or filled too."""
        codes, (scale, zero) = room(x.shape, task), self._scales(x, task)
        given = {"offset": frame.offset, "balance": frame.balance, "fold": frame.fold, **more}
        self.bound = Bound(task, codes, scale, zero, more=given)
        self.held &= self.bound(x)
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
            **kept,
        )

    def _scales(self, x: Tensor, task: Task) -> tuple[Tensor | None, Tensor | None]:
        """Scales and zeros: calibrated, or room for what the kernel makes."""
        spec = task.spec
        if not spec.scaled:
            return None, None
        if spec.scale == "static":
            assert self.scales is not None
            zero = self.scales.zero(spec, x)
            return self.scales.scale(spec, x).contiguous(), None if zero is None else zero.contiguous()
        shape = spec.granularity.scale_shape(tuple(x.shape))
        scale = torch.empty(shape, dtype=SCALE_TYPES[spec.scale_dtype], device=x.device)
        return scale, None if spec.symmetric else torch.empty_like(scale)


def room(shape: torch.Size, task: Task) -> Tensor:
    """Where the codes of `[B, H, N, D]` will be."""
    b, h, n, d = shape
    spec, codes = task.spec, 32 // task.bits
    if spec.role == "q":
        return torch.empty(b, h, n, -(-d // spec.format.packed), dtype=spec.format.of(task.dtype).stored, device="cpu")
    if spec.role == "k":
        size: tuple[int, ...] = (b, h, -(-n // blocks.LANES), -(-d // codes), blocks.LANES)
    else:
        size = (b, h, -(-n // task.tile), -(-d // blocks.LANES), task.tile // codes, blocks.LANES)
    # a kernel writes what belongs to tokens; beyond the last lie zeros
    full = n % (blocks.LANES if spec.role == "k" else task.tile) == 0
    return (torch.empty if full else torch.zeros)(size, dtype=torch.int32, device="cpu")
