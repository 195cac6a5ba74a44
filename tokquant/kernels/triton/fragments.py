"""What fills the template's holes. Each calls nothing but `tl`, so it can be read, tested and copied alone."""

from tokquant.precisions.base import tl, triton

# --------------------------------------------------------------------------- product_k, product_v


@triton.jit
def integer_product(a, b):
    return tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def float_product(a, b):
    return tl.dot(a, b, input_precision="ieee")


# --------------------------------------------------------------------------- scale_scores: products [M, N] -> logits


@triton.jit
def scale_by_query(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # K has no scale of its own here: it is 16 bit, decoded, or its scale per channel lies in Q
    return s * q_scale[:, None]


@triton.jit
def scale_by_key(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # one scale of K for every GROUP keys, fewer than a tile
    if EDGE:
        scale = tl.load(k_scale + (j // GROUP) * stride, mask=j < n_k, other=0.0)
    else:
        scale = tl.load(k_scale + (j // GROUP) * stride)
    return s * scale.to(tl.float32)[None, :] * q_scale[:, None]


@triton.jit
def scale_by_tile(s, q_scale, k_scale, stride, start, j, n_k, GROUP, EDGE: tl.constexpr):
    # one scale of K covers the whole tile: it costs nothing an element
    scale = tl.load(k_scale + (start // GROUP) * stride).to(tl.float32)
    return s * (q_scale * scale)[:, None]


# --------------------------------------------------------------------------- row_reference: what P is scaled against


@triton.jit
def running_maximum(largest, m):
    # unit: the row's maximum so far
    return m


@triton.jit
def tile_maximum(largest, m):
    # row_block: the row's maximum in this tile, at most 2^64 below the one so far so that nothing overflows
    return tl.maximum(largest, m - 64)
