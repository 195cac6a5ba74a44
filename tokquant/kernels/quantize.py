"""Q, K and V to codes by kernels: what `tokquant.quantize` defines, code for code and scale for scale.

Each tensor is read once where the tokens of a scale lie in one tile, twice where a scale spans more of the sequence. An operand
that no kernel takes (`quantize_plan.lacking` says why) is quantized by the definition, and so are floats that are only cast.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError
from tokquant.kernels import generate, launch, targets
from tokquant.kernels.products import takes_tokens_last
from tokquant.kernels.quantize_plan import LONGEST, QuantizePlan, Task, in_one_tile, lacking, plan
from tokquant.kernels.triton.operands import Coded, Source, Table, Turned
from tokquant.quantize import (
    asymmetric_scale,
    check_groups,
    frame_of_queries,
    frames,
    keys,
    log2_weight,
    of_keys,
    queries,
    reduce_groups,
    symmetric_scale,
    tile_sums,
    values,
)
from tokquant.quantize import quantize_operands as define
from tokquant.schemes import Granularity, Operand, QuantScheme
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, met
from tokquant.transforms import Frame


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> launch.Operands:
    """As `tokquant.quantize.quantize_operands`, laid out for attention kernels. Raises what that raises.

    Everything is equal bit for bit, but `logit_offset`, whose float32 sums are taken in another order.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    run = _Run(scheme, scales)
    with launch.on(q.device):
        kq = run.keys(k, k_frame)
        qq = run.queries(q, q_frame, kq)
        vq = run.values(v, v_frame)
    if run.lost is not None and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"scheme: {scheme.name!r} has scales that may not fit their type, which is looked at: no CUDA graph can wait for "
            "that; capture attention on what quantize returned, or use symmetric parts and scale_dtype: fp32"
        )
    if run.lost is not None and bool(run.lost):
        # a type does not hold a value; the definition says which
        qq, kq, vq = define(q, k, v, scheme, scales)
    operands = replace(qq, scheme=scheme), replace(kq, scheme=scheme), replace(vq, scheme=scheme)
    return operands if vq.layout == "tokens_last" else launch.packed(operands, scheme)


def quantize_queries(q: Tensor, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """Q in codes, for keys in codes of which only what all share is looked at. Nothing is waited for: a value that its type
    does not hold becomes an infinity."""
    with launch.on(q.device):
        qq = _Run(scheme, scales).queries(q, frame_of_queries(q, k, k.frame), k)
    return replace(qq, scheme=scheme)


class _Run:
    """The kernels of one call."""

    def __init__(self, scheme: QuantScheme, scales: LayerScales | None):
        self.scheme = scheme
        self.scales = scales
        self.lost: Tensor | None = None
        """1 where a type does not hold a value. It is looked at once, after all kernels, so that a GPU is waited for once."""

    def keys(self, k: Tensor, frame: Frame) -> QuantizedTensor:
        if _left_to_torch(k, frame, self.scheme.k):
            return keys(k, frame, self.scheme, self.scales)
        companion = k.new_empty(k.shape) if self.scheme.q.smooth == "block_mean" else None
        return replace(
            self._coded(k, frame, self.scheme.k, made=Coded(companion=companion), given=Turned()), companion=companion
        )

    def queries(self, q: Tensor, frame: Frame, k: QuantizedTensor) -> QuantizedTensor:
        spec, (turned, k_offset, k_origin) = self.scheme.q, of_keys(q, frame, k)
        if _left_to_torch(q, turned, spec):
            return queries(q, frame, k, self.scheme, self.scales)
        column = (*q.shape[:3], 1)
        lowered = k_offset is not None or k_origin is not None
        logit_offset = q.new_empty(column, dtype=torch.float32) if lowered else None
        # the sum of integers is one in any order
        in_kernel = needs_query_sums(self.scheme) and spec.format.compute == "tl.int8" and place(spec) == "scores"
        code_sum = q.new_empty(column, dtype=torch.float32) if in_kernel else None
        made = Coded(logit_offset=logit_offset, code_sum=code_sum)
        qq = self._coded(q, turned, spec, given=Turned(k_offset=k_offset, k_origin=k_origin), made=made)
        if needs_query_sums(self.scheme) and not in_kernel:
            code_sum = met(qq).sum(dim=-1, keepdim=True)
        return replace(qq, logit_offset=logit_offset, code_sum=code_sum)

    def values(self, v: Tensor, frame: Frame) -> QuantizedTensor:
        spec = self.scheme.v
        b, h, n, d = v.shape
        tokens_last = takes_tokens_last(self.scheme, v.dtype)
        sum_tokens = min(self.scheme.key_tile, LONGEST) if needs_code_sums(self.scheme) else 0
        if _left_to_torch(v, frame, spec, tokens_last=tokens_last, sum_tokens=sum_tokens):
            return values(v, frame, self.scheme, self.scales)
        made = Coded()
        if sum_tokens:
            made = made._replace(code_sum=v.new_empty(b, h, -(-n // sum_tokens), d, dtype=torch.int32))
        if place(spec) == "p":
            made = made._replace(something=v.new_empty(b, h, n, 1, dtype=torch.int8))
        vq = self._coded(v, frame, spec, made=made, given=Turned(), sum_tokens=sum_tokens, tokens_last=tokens_last)
        if made.code_sum is not None:
            vq = replace(vq, code_sum=tile_sums(made.code_sum, self.scheme.key_tile // sum_tokens))
        if made.something is not None:
            assert vq.scale is not None
            vq = replace(vq, log2_weight=log2_weight(vq.scale, made.something == 0))
        return vq

    def _coded(
        self,
        x: Tensor,
        frame: Frame,
        spec: Operand,
        *,
        made: Coded,
        given: Turned,
        sum_tokens: int = 0,
        tokens_last: bool = False,
    ) -> QuantizedTensor:
        """`x` in `frame` and in codes. What `made` holds is filled too, with the help of what `given` holds."""
        if spec.scaled:
            check_groups(spec, x)
        task = Task(
            spec=spec,
            head_dim=x.shape[3],
            dtype=x.dtype,
            step="both" if in_one_tile(spec) else "codes",
            **frame.steps(),
            k_offset=given.k_offset is not None,
            k_origin=given.k_origin is not None,
            companion=made.companion is not None,
            code_sum=made.code_sum is not None and spec.role == "q",
            sum_tokens=sum_tokens,
            weighted=made.something is not None,
            tokens_last=tokens_last,
            interpreted=launch.interpreted(),
        )
        given = given._replace(offset=frame.offset, balance=frame.balance, fold=frame.fold)
        scale, zero = self._scales(x, task, given) if spec.scaled else (None, None)
        codes, made_plan = _room(x, spec, tokens_last), plan(task)
        if made_plan.checked and self.lost is None:
            self.lost = torch.zeros(1, dtype=torch.int32, device=x.device)
        made = made._replace(codes=codes, lost=self.lost)
        if task.step == "both":
            made = made._replace(scale=scale, zero=zero)
        elif scale is not None:
            made = made._replace(scale=_floats(scale), zero=_floats(zero))
        _start(made_plan, x, given, made)
        return QuantizedTensor(
            codes=codes,
            scale=scale,
            zero=zero,
            frame=frame,
            spec=spec,
            shape=x.shape,
            dtype=x.dtype,
            layout="tokens_last" if tokens_last else "canonical",
        )

    def _scales(self, x: Tensor, task: Task, given: Turned) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros: calibrated, or made of extremes, or room for what the kernel makes."""
        spec = task.spec
        if spec.scale == "static":
            assert self.scales is not None
            return self.scales.scale(spec, x), self.scales.zero(spec, x)
        if task.step == "both":
            scale = x.new_empty(spec.granularity.scale_shape(tuple(x.shape)), dtype=SCALE_TYPES[spec.scale_dtype])
            return scale, None if spec.symmetric else torch.empty_like(scale)
        first = plan(replace(task, step="extremes"))
        tiles = _of_tiles(spec, first.tokens)
        b, h, n, _ = x.shape
        columns = spec.granularity.scale_shape(tuple(x.shape))[3]
        highest = x.new_empty(b, h, -(-n // first.tokens), columns, dtype=torch.float32)
        lowest = None if spec.symmetric else torch.empty_like(highest)
        _start(first, x, given, Coded(scale=highest, zero=lowest))
        largest = reduce_groups(highest, tiles, torch.amax)
        if lowest is None:
            return symmetric_scale(largest, spec), None
        return asymmetric_scale(reduce_groups(lowest, tiles, torch.amin), largest, spec)


def _left_to_torch(x: Tensor, frame: Frame, spec: Operand, **layout: Any) -> bool:
    """Whether the definition quantizes this operand: nothing is to be done but a cast, or no kernel does it."""
    target = None if launch.interpreted() else targets.of(x.device)
    return (not spec.scaled and not frame.turns) or lacking(spec, x.shape[3], target, **layout) is not None


def _of_tiles(spec: Operand, tokens: int) -> Operand:
    """The operand as it is for a tensor that has one row for so many tokens."""
    granularity = spec.granularity
    if granularity.size:
        granularity = Granularity(granularity.kind, granularity.size // tokens)
    return spec.model_copy(update={"granularity": granularity})


def _room(x: Tensor, spec: Operand, tokens_last: bool) -> Tensor:
    """Where the codes of `x` will be."""
    b, h, n, d = x.shape
    precision = spec.format
    group = 16 * precision.packed
    shape = (b, h, d, -(-n // group) * 16) if tokens_last else (b, h, n, -(-d // precision.packed))
    return x.new_empty(shape, dtype=precision.of(x.dtype).stored)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _start(plan: QuantizePlan, x: Tensor, given: Turned, made: Coded) -> None:
    grid, arguments = prepare(plan, x, given, made)
    generate.load(plan)[grid](*arguments, **plan.options())


def prepare(plan: QuantizePlan, x: Tensor, given: Turned, made: Coded) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Grid and arguments of a kernel that takes `[B, H, N, D]`."""
    b, h, n, _ = x.shape
    if made.scale is not None:
        # a stride of zero where all share one
        batch, head, row, _ = made.scale.expand(b, h, -1, -1).stride()
        made = made._replace(scale_batch=batch, scale_head=head, scale_row=row)
    if made.codes is not None and made.codes.element_size() == 1:
        made = made._replace(codes=made.codes.view(torch.uint8))
    given = Turned(*(None if each is None else each.contiguous() for each in given))
    grid = launch.grid("q, k, v", -(-n // plan.tokens), h, b)
    return grid, (Source(x, *x.stride()), given, made, Table(), n, plan.tokens)
