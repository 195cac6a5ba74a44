"""What fills the holes of the quantization template beside a precision's own fragments. Each calls nothing but `tl`."""

from tokquant.precisions.base import tl, triton

# --------------------------------------------------------------------------- order_tokens: which token stands at a place


@triton.jit
def in_order(place):
    return place


@triton.jit
def in_groups(place):
    # the order of `tensor.tokens_last`: columns 0 1 and 8 9 of a group, then 2 3 and 10 11 ...
    return (place & -16) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)


# --------------------------------------------------------------------------- round_scale, round_zero: to scale_dtype, as float32
# A scale that its type does not hold comes out infinite or as NaN, which the template sees.


@triton.jit
def as_it_is(x):
    return x


@triton.jit
def zero_in_fp32(x):
    # an infinite zero leaves no scale
    return tl.where(tl.abs(x) == float("inf"), float("nan"), x)


@triton.jit
def in_fp16(x):
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def zero_in_fp16(x):
    return tl.where(tl.abs(x) > 65504.0, float("nan"), x).to(tl.float16).to(tl.float32)


@triton.jit
def in_e4m3(x):
    # the nearest number of the format, half to even; below 2^-6 they lie 2^-9 apart
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    magnitude = tl.where(tl.abs(x) < 0.015625, (tl.abs(x) + 24576.0) - 24576.0, normal)
    return tl.where(tl.abs(x) <= 448.0, tl.where(x < 0.0, -magnitude, magnitude), float("nan"))


@triton.jit
def up_to_e4m3(x):
    # the next number of the format: a scale rounded down by up to 1/16 would clip eight of the 127 levels
    normal = ((x.to(tl.int32, bitcast=True) + 0xFFFFF) & -0x100000).to(tl.float32, bitcast=True)
    nearest = (x + 24576.0) - 24576.0
    subnormal = tl.where(nearest < x, nearest + 0.001953125, nearest)
    return tl.where(x <= 448.0, tl.where(x < 0.015625, subnormal, normal), float("nan"))
