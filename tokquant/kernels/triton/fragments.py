"""Fragments for the holes of attention templates. Each calls nothing but `tl`, so it can be read, tested and copied alone."""

from tokquant.precisions.base import tl, triton

# --------------------------------------------------------------------------- product_k, product_v


@triton.jit
def integer_product(a, b):
    return tl.dot(a, b, out_dtype=tl.int32)


@triton.jit
def float_product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def kept_product(p, v):
    # a weight of zero takes nothing of what is not finite
    finite = tl.abs(v.to(tl.float32)) < float("inf")
    product = tl.dot(p, tl.where(finite, v, 0.0).to(v.dtype), input_precision="ieee")
    reached = tl.dot((p != 0.0).to(p.dtype), tl.where(finite, 0.0, 1.0).to(v.dtype), input_precision="ieee")
    return tl.where(reached > 0.0, float("nan"), product)


# --------------------------------------------------------------------------- scale_scores: products [M, N] -> t, c
# The logits are t * c[:, None] with c >= 0: c is applied where the row's maximum is subtracted, in one multiply-add, and the
# maximum itself can be taken of t, which may still be integers.


@triton.jit
def scale_by_query(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # K has no scale to apply here: it is 16-bit or decoded, or its scale per channel is part of Q
    return s, q_scale


@triton.jit
def scale_by_key(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # one scale of K for every GROUP keys, fewer than a tile
    if EDGE:
        scale = tl.load(k_scale + (j // GROUP) * stride, mask=j < n_k, other=0.0)
    else:
        scale = tl.load(k_scale + (j // GROUP) * stride)
    return s.to(tl.float32) * scale.to(tl.float32)[None, :], q_scale


@triton.jit
def scale_by_tile(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # one scale of K covers the whole tile: no work per element
    return s, q_scale * tl.load(k_scale + (start // GROUP) * stride).to(tl.float32)


# --------------------------------------------------------------------------- lay_q, lay_k, lay_v: the order of unpacked codes
# A precision decodes a tile [A, B] to [A, B] or, where several codes share an element, to [A, B, P].


@triton.jit
def as_they_are(values):
    return values


@triton.jit
def side_by_side(values):
    # [A, B, P] -> [A, B P]: channels in their own order
    return values.reshape(values.shape[0], values.shape[1] * values.shape[2])


@triton.jit
def side_by_side_ptx(values):
    # side_by_side followed by empty inline PTX: Triton would move a reshape just before an 8-bit product into shared memory,
    # where wgmma has no layout for it ("Illegal shared layout")
    tile = values.reshape(values.shape[0], values.shape[1] * values.shape[2])
    return tl.inline_asm_elementwise("", "=r,0", [tile], dtype=tile.dtype, is_pure=True, pack=4)


@triton.jit
def in_planes(values):
    # [A, B, P] -> [A, P B]: the first code of every element, then the second ...; no data moves between threads
    return values.permute(0, 2, 1).reshape(values.shape[0], values.shape[1] * values.shape[2])


@triton.jit
def tokens_in_planes(values):
    # [A, B, P] -> [A P, B]: the codes of an element are of tokens 16 apart
    planes = values.reshape(values.shape[0] // 16, 16, values.shape[1], values.shape[2]).permute(0, 3, 1, 2)
    return planes.reshape(values.shape[0] * values.shape[2], values.shape[1])


# --------------------------------------------------------------------------- address_v, order_p: the layout of V


@triton.jit
def by_token(v, start, n, column, stride):
    # [N, W]: the channels of a token side by side
    return v + tl.cast(start, tl.int64) * stride + n[:, None] * stride + column[None, :]


@triton.jit
def by_channel(v, start, n, column, stride):
    # [D, N]: the tokens of a channel side by side, as 8-bit tensor cores take them
    return v + start + column.to(tl.int64)[None, :] * stride + n[:, None]


@triton.jit
def in_order(codes, M: tl.constexpr, N: tl.constexpr):
    return codes


@triton.jit
def in_groups(codes, M: tl.constexpr, N: tl.constexpr):
    # V's tokens are permuted in groups of 16, so that P, permuted alike, already has the register layout of the next product
    return codes.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N)


# --------------------------------------------------------------------------- count: what the normalizer sums


@triton.jit
def exact(p, codes):
    # P before rounding
    return p


@triton.jit
def nearest_integers(p, codes):
    # the integers that P is rounded to, without a conversion; keeps NaN
    return (p + 12582912.0) - 12582912.0


@triton.jit
def rounded(p, codes):
    return codes.to(tl.float32)


# --------------------------------------------------------------------------- row_reference: the maximum that P is scaled to


@triton.jit
def running_maximum(largest, m):
    # unit: the row's maximum so far
    return m


@triton.jit
def tile_maximum(largest, m):
    # row_block: the row's maximum in this tile, but at most 2^64 below the running one, so that nothing overflows
    return tl.maximum(largest, m - 64)


# --------------------------------------------------------------------------- widen_k, widen_v: decoded values to another type


@triton.jit
def by_cast(x, TYPE: tl.constexpr):
    return x.to(TYPE)


@triton.jit
def to_float16_ptx(x, TYPE: tl.constexpr):
    # int8 without a conversion: x + 128, which has no sign, as the low byte of a float16 mantissa is 1024 + 128 + x
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, k;
        mov.b32 k, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 $0, t, 0x64646464, 0x4140;
        prmt.b32 $1, t, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, k;
        sub.f16x2 $1, $1, k;
        }""",
        "=r,=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


# --------------------------------------------------------------------------- log2_scale: log2 of V's scales per token


@triton.jit
def log2_of_normal(x):
    return tl.log2(x)


@triton.jit
def log2_of_normal_ptx(x):
    # scales are never subnormal, so flushing those to zero is safe, and faster
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


# --------------------------------------------------------------------------- page_of, tokens_at: addresses of a tile's tokens


@triton.jit
def one_page(table, start, j, n_k, PAGE: tl.constexpr, EDGE: tl.constexpr):
    # all tokens of a tile are in one page
    return tl.load(table + start // PAGE).to(tl.int64)


@triton.jit
def many_pages(table, start, j, n_k, PAGE: tl.constexpr, EDGE: tl.constexpr):
    # a tile spans pages: look up a page for every token; V's tokens are permuted in groups of 16
    if EDGE:
        page = tl.load(table + j // PAGE, mask=j // 16 * 16 < n_k, other=0)
    else:
        page = tl.load(table + j // PAGE)
    return page.to(tl.int64)


@triton.jit
def within_page(page_at, start, n, PAGE: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr):
    # pointers, within a page, to values that GROUP tokens share, STEP apart; all but the sum with `first` is loop-invariant.
    # Without the hint of alignment Triton 3.6 copies V byte by byte
    first = tl.multiple_of(tl.cast(start, tl.int32) % PAGE, 16)
    return page_at + first // GROUP * STEP + n // GROUP * STEP


@triton.jit
def across_pages(page_at, start, n, PAGE: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr):
    return page_at + (start + n) % PAGE // GROUP * STEP


# --------------------------------------------------------------------------- spread_k, spread_v: scales over a tile [N, D]


@triton.jit
def of_channels(scale, N: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, PLANES: tl.constexpr):
    # scales [N / n, D], in the order of the tile's channels
    return tl.broadcast_to(scale[:, None, :], (N // STEP, STEP, D)).reshape(N, D)


@triton.jit
def of_groups(scale, N: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, PLANES: tl.constexpr):
    # scales [N, D / g] for a tile whose channels are in planes: the first of every stored element, then the second ...
    wide = tl.broadcast_to(scale[:, None, :, None], (N, PLANES, D // CHANNELS, CHANNELS // PLANES))
    return wide.reshape(N, D)
