"""Quantizes Q, K and V by kernels, with bitwise the codes and scales that `tokquant.quantize` defines.

A tensor is read once where all tokens of a scale lie in one tile, and twice where a scale spans more of the sequence. Operands
that no kernel takes (`quantize_task.lacking` says why) are quantized by the definition in torch, as are floats that are only
cast.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError
from tokquant.kernels import generate, launch, targets
from tokquant.kernels.quantize_plan import QuantizePlan, extremes, plan, scales_plan
from tokquant.kernels.quantize_task import Task, columns_of, task_of
from tokquant.kernels.triton.operands import Coded, Extremes, Source, Table, Turned
from tokquant.quantize import (
    frame_of_queries,
    frames,
    keys,
    log2_weight,
    of_keys,
    queries,
    tile_sums,
    values,
)
from tokquant.quantize import quantize_operands as define
from tokquant.schemes import QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import needs_query_sums
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, product_values
from tokquant.transforms import Frame


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> launch.Operands:
    """`tokquant.quantize.quantize_operands` by kernels, laid out for attention kernels. Raises the same errors.

    All results are bitwise equal, except `logit_offset`, whose float32 sums have another order.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    run = Run(scheme, scales, q.device)
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
        # some value overflowed its type; the definition raises the error that says which
        qq, kq, vq = define(q, k, v, scheme, scales)
    return (qq, kq, vq) if vq.layout == "tokens_last" else launch.packed((qq, kq, vq), scheme)


def quantize_queries(q: Tensor, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """Quantize Q for quantized keys, of which only what all keys share is used (their frame).

    Never waits for the GPU: a value that overflows its type becomes an infinity.
    """
    with launch.on(q.device):
        return Run(scheme, scales, q.device).queries(q, frame_of_queries(q, k, k.frame), k)


@dataclass(frozen=True)
class VarlenBatch:
    """Sequences packed one after another in a tensor `[1, H, T, D]`.

    A value that n tokens share has, for sequence b, which starts at token s, its first place at s // n + b: so the places of
    two sequences never overlap.
    """

    starts: Tensor
    """First token of each sequence, and the total: `[B + 1]` int32 on the device."""
    count: int
    longest: int


class Run:
    """Quantizes the operands of one call by kernels."""

    def __init__(
        self, scheme: QuantScheme, scales: LayerScales | None, device: torch.device, sequences: VarlenBatch | None = None
    ):
        self.scheme = scheme
        self.scales = scales
        self.sequences = sequences
        self.interpreted = launch.interpreted()
        self.target = None if self.interpreted else targets.of(device)
        self.lost: Tensor | None = None
        """A flag on the device, 1 if a value overflowed its type. Read once, after all kernels, to wait for the GPU once."""

    def keys(self, k: Tensor, frame: Frame) -> QuantizedTensor:
        """`tokquant.quantize.keys`, by a kernel where one can."""
        task = self.task("k", k, frame)
        if task is None:
            return replace(keys(k, frame, self.scheme, self.scales), scheme=self.scheme)
        return self._coded(k, frame, task)

    def queries(self, q: Tensor, frame: Frame, k: QuantizedTensor) -> QuantizedTensor:
        """`tokquant.quantize.queries`, by a kernel where one can."""
        turned, k_offset, k_origin = of_keys(q, frame, k)
        task = self.task("q", q, turned, k_offset is not None, k_origin is not None)
        if task is None:
            return replace(queries(q, frame, k, self.scheme, self.scales), scheme=self.scheme)
        qq = self._coded(q, turned, task, k_offset, k_origin)
        if needs_query_sums(self.scheme) and not task.code_sum:
            qq = replace(qq, code_sum=product_values(qq).sum(dim=-1, keepdim=True))
        return qq

    def values(self, v: Tensor, frame: Frame) -> QuantizedTensor:
        """`tokquant.quantize.values`, by a kernel where one can."""
        task = self.task("v", v, frame)
        if task is None:
            return replace(values(v, frame, self.scheme, self.scales), scheme=self.scheme)
        return self._coded(v, frame, task)

    def task(self, role: str, x: Tensor, frame: Frame, *of_keys: bool) -> Task | None:
        """The task of the kernels that quantize `x`; None where the definition in torch quantizes it."""
        how = (self.target, self.interpreted, self.sequences is not None)
        return task_of(self.scheme, role, x.shape[3], x.dtype, frame.steps(), *how, *of_keys)

    def _coded(
        self, x: Tensor, frame: Frame, task: Task, k_offset: Tensor | None = None, k_origin: Tensor | None = None
    ) -> QuantizedTensor:
        """Transform `x` to `frame` and quantize it, with the sums, weights and other extras that the task asks for."""
        spec, (b, h, n, d), made_plan = task.spec, x.shape, plan(task)
        given = Turned(frame.offset, frame.balance, frame.fold, k_offset, k_origin)
        scale, zero = self._scales(x, task, given) if spec.scaled else (None, None)
        lost = self._flag(x) if made_plan.checked else None
        codes = x.new_empty(self._codes_shape(x.shape, task), dtype=spec.format.of(x.dtype).stored)
        logit_offset = x.new_empty((b, h, n, 1), dtype=torch.float32) if task.k_offset or task.k_origin else None
        code_sum = None
        if task.code_sum:
            code_sum = x.new_empty((b, h, n, 1), dtype=torch.float32)
        elif task.sum_tokens:
            code_sum = x.new_empty((b, h, self._rows(n, task.sum_tokens), d), dtype=torch.int32)
        weightless = x.new_empty((b, h, n, 1), dtype=torch.bool) if task.weighted else None
        companion = x.new_empty(x.shape) if task.companion else None
        made = Coded(
            codes=codes,
            scale=scale if task.step == "both" else _floats(scale),
            zero=zero if task.step == "both" else _floats(zero),
            companion=companion,
            logit_offset=logit_offset,
            code_sum=code_sum,
            weightless=None if weightless is None else weightless.view(torch.int8),
            lost=lost,
        )
        _launch(made_plan, *prepare(made_plan, x, given, made, self.sequences))
        if code_sum is not None and task.sum_tokens and task.sum_tokens < self.scheme.key_tile:
            code_sum = tile_sums(code_sum, self.scheme.key_tile // task.sum_tokens)
        return QuantizedTensor(
            codes=codes,
            scale=scale,
            zero=zero,
            frame=frame,
            code_sum=code_sum,
            log2_weight=None if scale is None or weightless is None else log2_weight(scale, weightless),
            logit_offset=logit_offset,
            companion=companion,
            spec=spec,
            scheme=self.scheme,
            shape=x.shape,
            dtype=x.dtype,
            layout="tokens_last" if task.tokens_last else "canonical",
        )

    def _scales(self, x: Tensor, task: Task, given: Turned) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros: calibrated, or computed from extremes, or empty for the quantization kernel to fill."""
        spec = task.spec
        if spec.scale == "static":
            assert self.scales is not None
            return self.scales.scale(spec, x), self.scales.zero(spec, x)
        shape = spec.granularity.scale_shape(tuple(x.shape))
        if self.sequences is not None and not task.weighted:
            shape = (*shape[:2], self._rows(x.shape[2], spec.granularity.cover(WHOLE, x.shape[3])[0]), shape[3])
        scale = x.new_empty(shape, dtype=SCALE_TYPES[spec.scale_dtype])
        zero = None if spec.symmetric else torch.empty_like(scale)
        if task.step == "codes":
            found, tokens = self._extremes(x, task, given)
            made_plan = scales_plan(task)
            made = Coded(scale=scale, zero=zero, lost=self._flag(x) if made_plan.checked else None)
            _launch(made_plan, *prepare_scales(task, tokens, found, made, self.sequences))
        return scale, zero

    def _extremes(self, x: Tensor, task: Task, given: Turned) -> tuple[Extremes, int]:
        """The extremes under each scale within each tile of tokens; and the tokens of a tile."""
        made_plan, (b, h, n, _) = extremes(task), x.shape
        highest = x.new_empty((b, h, self._rows(n, made_plan.tokens), columns_of(task)), dtype=torch.float32)
        lowest = None if task.spec.symmetric else torch.empty_like(highest)
        _launch(made_plan, *prepare(made_plan, x, given, Coded(scale=highest, zero=lowest), self.sequences))
        return Extremes(highest, lowest), made_plan.tokens

    def _codes_shape(self, shape: torch.Size, task: Task) -> tuple[int, ...]:
        """The shape of the codes of `[B, H, N, D]`."""
        b, h, n, d = shape
        packed = task.spec.format.packed
        return (b, h, d, self._rows(n, 16 * packed) * 16) if task.tokens_last else (b, h, n, -(-d // packed))

    def _rows(self, n: int, tokens: int) -> int:
        """Rows to allocate for values that `tokens` of n tokens share."""
        return -(-n // tokens) if self.sequences is None else n // tokens + self.sequences.count

    def _flag(self, x: Tensor) -> Tensor:
        """`lost`, allocated when it is first needed."""
        if self.lost is None:
            self.lost = torch.zeros(1, dtype=torch.int32, device=x.device)
        return self.lost


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _launch(plan: QuantizePlan, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    generate.load(plan)[grid](*arguments, **plan.options())


def prepare(
    plan: QuantizePlan, x: Tensor, given: Turned, made: Coded, sequences: VarlenBatch | None = None
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """Grid and arguments of a kernel that quantizes, or finds the extremes of, `x` `[B, H, N, D]`."""
    b, h, n, _ = x.shape
    longest, table = n, Table()
    if sequences is not None:
        b, longest, table = sequences.count, sequences.longest, Table(starts=sequences.starts)
    codes, scale = made.codes, made.scale
    if codes is not None and codes.element_size() == 1:
        codes = codes.view(torch.uint8)
    # strides are zero along dimensions that share a scale
    batch, head, row = launch.strides(scale)
    made = made._replace(codes=codes, scale_batch=batch, scale_head=head, scale_row=row)
    given = Turned(*(None if each is None else each.contiguous() for each in given))
    grid = launch.grid("q, k, v", -(-longest // plan.tokens), h, b)
    return grid, (Source(x, *launch.steps(x)), given, made, table, n, plan.tokens)


def prepare_scales(
    task: Task, tokens: int, found: Extremes, made: Coded, sequences: VarlenBatch | None = None
) -> tuple[tuple[int], tuple[Any, ...]]:
    """Grid and arguments of the kernel that makes scales from the extremes of tiles of `tokens` tokens."""
    b, h, tiles, _ = found.highest.shape
    granularity = task.spec.granularity
    rows, planes = (b * h * tiles, 1) if granularity.kind == "tensor" else (tiles, b * h)
    group = granularity.size // tokens if granularity.size else rows
    groups, table = -(-rows // group), Table()
    if sequences is not None:
        groups, table = sequences.count, Table(starts=sequences.starts)
    return (planes * groups,), (found, made, table, rows, group, groups, tokens)
