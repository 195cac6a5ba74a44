"""Fragments for the holes of the quantization template, besides those of the precisions. Each calls nothing but `tl`."""

from tokquant.precisions.base import tl, triton

# --------------------------------------------------------------------------- order_tokens: the token stored at a place


@triton.jit
def in_order(place, PACKED: tl.constexpr):
    return place


@triton.jit
def in_groups(place, PACKED: tl.constexpr):
    # the order of `tensor.tokens_last`: tokens 0 1 and 8 9 of a group of 16, then 2 3 and 10 11 ...; an element that holds
    # several tokens has one from each of as many groups
    column = place // PACKED
    column = ((column & 2) << 2) | ((column & 12) >> 1) | (column & 1)
    return place // (16 * PACKED) * (16 * PACKED) + place % PACKED * 16 + column


@triton.jit
def in_groups_of_16(place, PACKED: tl.constexpr):
    # as in_groups, but an element holds channels of one token
    column = place % 16
    return place // 16 * 16 + (((column & 2) << 2) | ((column & 12) >> 1) | (column & 1))


# --------------------------------------------------------------------------- round_scale: before the cast to scale_dtype


@triton.jit
def nearest(x):
    # the cast itself rounds to nearest
    return x


@triton.jit
def within_e4m3(x):
    # some casts saturate; a scale that overflows must not
    return tl.where(x <= 448.0, x, float("nan"))


@triton.jit
def up_to_e4m3(x):
    # round up in e4m3: a scale rounded down by up to 1/16 would clip eight of the 127 levels
    normal = ((x.to(tl.int32, bitcast=True) + 0xFFFFF) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0
    subnormal = tl.where(subnormal < x, subnormal + 0.001953125, subnormal)
    return tl.where(x <= 448.0, tl.where(x < 0.015625, subnormal, normal), float("nan"))


# --------------------------------------------------------------------------- fused: a * b + c, rounded once


@triton.jit
def fused(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def fused_interpreted(a, b, c):
    # tl.fma rounds twice in the interpreter of Triton 3.6. In float64 the product is exact, and the sum is rounded to odd:
    # rounding that to float32, which has fewer than half the bits, is as good as rounding once
    product = a.to(tl.float64) * b.to(tl.float64)
    total = product + c.to(tl.float64)
    part = total - product
    lost = (product - (total - part)) + (c.to(tl.float64) - part)
    bits = total.to(tl.int64, bitcast=True)
    away = tl.where((lost > 0.0) == (total > 0.0), 1, -1)
    bits = tl.where(((lost > 0.0) | (lost < 0.0)) & (bits % 2 == 0), bits + away, bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)
