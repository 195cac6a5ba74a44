"""How far a tensor can be from the values of its codes, when only the codes are known."""

import math

import torch
from torch import Tensor

from tokquant.errors import UnsupportedError
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor

SCALE_ROUNDING = {"fp32": 2.0**-23, "fp16": 2.0**-10, "fp8_e4m3": 1 / 15}
"""How far rounding a scale may leave the largest value of its group beyond the last code, as a share of that code's value."""


def half_steps(x: QuantizedTensor) -> Tensor:
    """Largest distance of a value from that of its code, float64 `[B, H, N, D]`, in the frame that was quantized.

    That is half of the gap to the code's neighbours in the table of its precision, times the scale. A code at the end of the
    range may also stand for clipped values: with dynamic scales as far as rounding the scale clips, with static ones any.
    Raises UnsupportedError for a precision with too many codes to list.
    """
    values = decoded(x)
    if x.scale is None:
        if x.stored == x.dtype and not x.frame.changes:
            return torch.zeros_like(values)
        steps = rounding_of(values, x.stored)
    else:
        steps = _of_codes(x)
        if place(x.spec) == "operand":
            steps = steps + rounding_of(values, x.dtype)
    # the rounding of the division by the scale, and of float32 in the change of frame
    steps = steps * (1 + 2.0**-20) + 2.0**-22 * values.abs()
    if x.frame.changes:
        reach = values.norm(dim=-1, keepdim=True)
        if x.offset is not None:
            turned = x.frame.apply(torch.zeros(x.shape, device=x.device))
            reach = reach + turned.double().norm(dim=-1, keepdim=True)
        steps = steps + 2.0**-20 * reach
    return steps.nan_to_num(math.inf, posinf=math.inf)


def _of_codes(x: QuantizedTensor) -> Tensor:
    assert x.scale is not None
    spec, precision, scale = x.spec, x.spec.format, x.spread(x.scale).double()
    codes = x.stored_values()
    if spec.symmetric:
        if precision.bits > 8:
            raise UnsupportedError(
                f"{spec.role}: the steps of {precision.name}, of {precision.bits} bits, are unknown; give tensors"
            )
        table = precision.values().to(x.device)
        gaps = torch.nn.functional.pad(table.double().diff(), (1, 1))
        half = torch.maximum(gaps[1:], gaps[:-1]) / 2
        steps = half[torch.searchsorted(table, codes.contiguous()).clamp(max=len(table) - 1)]
        assert precision.largest is not None
        last, reach = codes.abs() >= precision.largest, precision.largest * scale
    else:
        assert x.zero is not None
        counted, zero = x.code_values(), x.spread(x.zero).double().abs()
        steps = torch.full_like(scale, 0.5)
        last, reach = (counted <= 0) | (counted >= precision.levels), precision.levels * scale + zero + 2.0**-9
        if spec.scale_dtype == "fp32":
            reach = reach - 2.0**-9  # fp16 and fp8 zeros have a smallest step
    clipped = reach * SCALE_ROUNDING[spec.scale_dtype] if spec.scale == "dynamic" else torch.full_like(reach, math.inf)
    return steps * scale + torch.where(last, clipped, 0.0)


def decoded(x: QuantizedTensor) -> Tensor:
    """The values of codes in the frame that was quantized, float64; rounded to the input's type where kernels decode to it."""
    return x.scaled_values().to(x.dtype).double() if place(x.spec) == "operand" else x.scaled_values(torch.float64)


def rounding_of(x: Tensor, kind: torch.dtype) -> Tensor:
    """Largest error of a rounding to a floating-point type that resulted in `x`."""
    info = torch.finfo(kind)
    return x.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2
