"""The template of decoding kernels: attention to paged keys and values, its holes filled for int8 per token; runs as it is.

One program takes queries of the heads that share a head of K and V, as rows of one tile, and a run of keys; `merge` merges the
runs. Arithmetic and names are those of `template`.
"""

from tokquant.kernels.triton.fragments import as_they_are as lay_k
from tokquant.kernels.triton.fragments import as_they_are as lay_q
from tokquant.kernels.triton.fragments import as_they_are as lay_v
from tokquant.kernels.triton.fragments import by_cast as widen_k
from tokquant.kernels.triton.fragments import by_cast as widen_v
from tokquant.kernels.triton.fragments import exact as count
from tokquant.kernels.triton.fragments import in_groups as order_p
from tokquant.kernels.triton.fragments import integer_product as product_k
from tokquant.kernels.triton.fragments import integer_product as product_v
from tokquant.kernels.triton.fragments import log2_of_normal as log2_scale
from tokquant.kernels.triton.fragments import of_channels as spread_k
from tokquant.kernels.triton.fragments import of_groups as spread_v
from tokquant.kernels.triton.fragments import one_page as page_of
from tokquant.kernels.triton.fragments import tile_maximum as row_reference
from tokquant.kernels.triton.fragments import within_page as tokens_at
from tokquant.kernels.triton.parts import hadamard, load_tile, sum_in_lanes, tanh
from tokquant.kernels.triton.scales import in_groups_of_16 as order_v
from tokquant.precisions.base import tl, triton
from tokquant.precisions.int8 import decode_tile as decode_k
from tokquant.precisions.int8 import decode_tile as decode_q
from tokquant.precisions.int8 import decode_tile as decode_v
from tokquant.precisions.int8 import encode_tile as encode_p

D = tl.constexpr(64)  # head_dim
D_TILE = tl.constexpr(64)  # the next power of two
PADDED = tl.constexpr(False)  # D_TILE > D
PAGE = tl.constexpr(128)  # tokens
SHARED_HEADS = tl.constexpr(1)  # heads of Q to one of K and V
LANES = tl.constexpr(32)  # partial sums over keys, added up after the loop
Q_PACKED = tl.constexpr(1)  # codes in a stored element
K_PACKED = tl.constexpr(1)
V_PACKED = tl.constexpr(1)
K_PLANES = tl.constexpr(1)  # channels are decoded in planes: the first of every stored element, then the second ...
V_PLANES = tl.constexpr(1)
K_WIDTH = tl.constexpr(64)  # elements of a token
V_WIDTH = tl.constexpr(64)
V_ROW = tl.constexpr(1)  # elements of a page from one token to the next,
V_COLUMN = tl.constexpr(128)  # and from one element of a token to the next
Q_GROUP = tl.constexpr(1)  # tokens under one scale
K_GROUP = tl.constexpr(1)
V_GROUP = tl.constexpr(1)
Q_CHANNELS = tl.constexpr(64)  # channels under one scale
K_CHANNELS = tl.constexpr(64)
V_CHANNELS = tl.constexpr(64)
K_SIDE = tl.constexpr(1)  # elements of a row of scales and zeros, and of a head's in a page
V_SIDE = tl.constexpr(1)
K_SIDES = tl.constexpr(128)
V_SIDES = tl.constexpr(128)
K_COLUMNS = tl.constexpr(1)  # scales of a row, which its zeros follow
V_COLUMNS = tl.constexpr(1)
Q_TYPE = tl.constexpr(tl.int8)  # types of the products' operands
K_TYPE = tl.constexpr(tl.int8)
P_TYPE = tl.constexpr(tl.int8)
V_TYPE = tl.constexpr(tl.int8)
Q_VIA = tl.constexpr(tl.int8)  # the type in between: integers are converted to fp8 by way of fp16
K_VIA = tl.constexpr(tl.int8)
V_VIA = tl.constexpr(tl.int8)
K_UNIT = tl.constexpr(1.0)  # the value of a decoded 1
V_UNIT = tl.constexpr(1.0)
OUTPUT_UNIT = tl.constexpr(1.0)  # V's, if it is applied to the output
K_HALF = tl.constexpr(0)  # a stored code of 0 is this many steps above an asymmetric operand's zero
V_HALF = tl.constexpr(0)
LOG2_LARGEST = tl.constexpr(6.988684686772166)  # log2 of P's largest code: P is computed in units of its codes
LOGIT_BASE = tl.constexpr(1.4426950408889634)  # log2(e), or 1 where a feature needs natural logits
FIRST_PHASE = tl.constexpr(1)  # 0 where masked tiles precede the full ones
OWN_TYPE = tl.constexpr(tl.float16)  # the tensors' type, which decoded values are rounded to
Q_SCALED = tl.constexpr(True)
Q_DECODED = tl.constexpr(False)  # scales vary along the contracted dimension: apply them before the product
Q_IN_PLANES = tl.constexpr(False)
K_HAS_SCALE = tl.constexpr(True)  # whether it has scales that the kernel reads
V_HAS_SCALE = tl.constexpr(True)
K_ZERO = tl.constexpr(False)
K_STATIC = tl.constexpr(False)  # K has one scale for all keys, applied with Q's,
K_SIDE_OF_TILE = tl.constexpr(False)  # one for the keys of a tile,
K_SIDE_OF_TOKEN = tl.constexpr(True)  # one per key,
K_PAIR_OF_TOKEN = tl.constexpr(False)  # or a scale and a zero per key;
K_DECODED = tl.constexpr(False)  # or they vary along the contracted dimension, and are applied before the product
V_DECODED = tl.constexpr(False)
K_STEP = tl.constexpr(32)  # decoded: tokens of a tile under one scale
V_STEP = tl.constexpr(1)
K_PARTS = tl.constexpr(64)  # decoded: scales of D_TILE channels
V_PARTS = tl.constexpr(2)
K_BY_CHANNEL = tl.constexpr(False)
V_BY_CHANNEL = tl.constexpr(False)
K_ZERO_DECODED = tl.constexpr(False)
V_ZERO_DECODED = tl.constexpr(False)
V_SIDE_OF_TOKEN = tl.constexpr(True)  # V's scale is applied to P, alone
V_PAIR_OF_TOKEN = tl.constexpr(False)  # or with a zero,
V_PER_TOKEN = tl.constexpr(True)
V_PER_TILE = tl.constexpr(False)  # each tile's product,
V_ON_OUTPUT = tl.constexpr(False)  # or the output
V_TILE_ZERO = tl.constexpr(False)
V_OUTPUT_ZERO = tl.constexpr(False)
V_PER_CHANNEL = tl.constexpr(0)  # 1 where V has a scale per channel
V_CLEARED = tl.constexpr(False)  # whether memory beyond the last key may decode to NaN or inf
V_IN_PLANES = tl.constexpr(False)
V_ROTATED = tl.constexpr(False)
V_STAGES = tl.constexpr(0)  # butterfly stages that undo the rotation
V_NORM = tl.constexpr(1.0)
V_MEAN = tl.constexpr(False)
UNSIGNED_P = tl.constexpr(False)
CODE_ZERO = tl.constexpr(0)  # subtracted from unsigned codes of P, to fit signed integers
CLEAR_CHANNELS = tl.constexpr(False)
NEWER = tl.constexpr(False)  # whether newer keys are kept outside of the pages
LEFT = tl.constexpr(False)
RIGHT = tl.constexpr(False)
SOFTCAP = tl.constexpr(False)
LOWERED_SOFTCAP = tl.constexpr(False)  # K is stored without an offset, which is added back before the softcap,
LOWERED_LOGITS = tl.constexpr(False)  # or to the LSE
JOINED = tl.constexpr(False)
MAY_BE_EMPTY = tl.constexpr(False)  # whether all scores of a row may be -inf, as floats can be
ONE_RUN = tl.constexpr(True)  # one program takes all keys, so there is nothing to merge


@triton.jit
def decode(Q, K, V, T, Out, Lse, F, scale, n_q, run, step, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * SHARED_HEADS
    blocks = tl.cdiv(n_q * SHARED_HEADS, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks
    # the queries of the heads that share one of K and V are rows of one tile
    index = first + tl.arange(0, BLOCK_M)
    here = index < n_q * SHARED_HEADS
    i = index // SHARED_HEADS
    head = kv_head * SHARED_HEADS + index % SHARED_HEADS
    row = (batch * heads + head) * n_q + i
    result = row + split.to(tl.int64) * (tl.num_programs(2) * heads * n_q)
    column = tl.arange(0, D_TILE)
    held = column < D
    out_at = Out + result[:, None] * D + column[None, :]
    table = T.table + batch * T.row
    n_k = tl.load(T.lengths + batch)
    ahead = n_k - n_q  # query i stands at key i + ahead
    if NEWER:
        ahead += tl.load(T.newer + batch)

    # keys [begin, end) of this run are visible to some of these queries; tiles in [whole, edge) to all, so they need no mask
    begin = split * run
    if LEFT:
        # the first run begins where the window of the first query does, at a multiple of `step`
        begin += tl.maximum(ahead - F.left, 0) // step * step
    end = tl.minimum(n_k, begin + run)
    whole = begin
    edge = end // BLOCK_N * BLOCK_N
    if RIGHT:
        last = (tl.minimum(first + BLOCK_M, n_q * SHARED_HEADS) - 1) // SHARED_HEADS
        end = tl.minimum(end, last + ahead + F.right + 1)
        edge = tl.minimum(edge, tl.maximum(first // SHARED_HEADS + ahead + F.right + 1, 0) // BLOCK_N * BLOCK_N)
    if LEFT:
        last = (tl.minimum(first + BLOCK_M, n_q * SHARED_HEADS) - 1) // SHARED_HEADS
        begin = tl.maximum(begin, tl.maximum(first // SHARED_HEADS + ahead - F.left, 0) // BLOCK_N * BLOCK_N)
        whole = tl.maximum(whole, tl.cdiv(tl.maximum(last + ahead - F.left, 0), BLOCK_N) * BLOCK_N)
    if begin >= end:
        # nothing to attend
        if ONE_RUN:
            tl.store(out_at, tl.zeros([BLOCK_M, D_TILE], tl.float32), mask=here[:, None] & held[None, :])
        tl.store(Lse + result, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=here)
        return

    # [BLOCK_M, D] queries, and their scale times the softmax's
    k_channel = column % (D_TILE // K_PLANES) * K_PLANES + column // (D_TILE // K_PLANES)
    q_column = tl.arange(0, D_TILE // Q_PACKED)
    if Q_IN_PLANES:
        q_column = k_channel
    q_at = Q.codes + (batch * Q.batch + head * Q.head + i.to(tl.int64) * Q.row)[:, None] + q_column[None, :]
    q = lay_q(decode_q(load_tile(q_at, here, q_column * Q_PACKED < D, True))).to(Q_VIA)
    q_scale = tl.full([BLOCK_M], LOGIT_BASE * K_UNIT, tl.float32) * scale
    if Q_SCALED:
        q_scale_at = Q.scale + batch * Q.scale_batch + head * Q.scale_head + (i // Q_GROUP) * Q.scale_row
        q_scale *= tl.load(q_scale_at, mask=here, other=0.0).to(tl.float32)
    if Q_DECODED:
        q_scale_at = Q.scale + batch * Q.scale_batch + head * Q.scale_head + (i // Q_GROUP) * Q.scale_row
        q_part = (k_channel // Q_CHANNELS)[None, :]
        q_scales = load_tile(q_scale_at[:, None] + q_part, here, k_channel < D, True).to(tl.float32)
        q = (q.to(tl.float32) * q_scales).to(OWN_TYPE)
    if CLEAR_CHANNELS:
        # beyond D a tile of K may hold anything
        q = tl.where((k_channel < D)[None, :], q, 0.0)
    q = q.to(Q_TYPE)
    if K_ZERO:
        q_sum = tl.load(Q.code_sum + row, mask=here, other=0.0) * (1.0 / K_UNIT)

    n = tl.arange(0, BLOCK_N)
    pair = tl.arange(0, 2)
    k_codes = K.codes + kv_head * (PAGE * K_WIDTH)
    v_codes = V.codes + kv_head * (PAGE * V_WIDTH)
    k_column = tl.arange(0, D_TILE // K_PACKED)
    v_column = tl.arange(0, D_TILE // V_PACKED)
    v_channel = column % (D_TILE // V_PLANES) * V_PLANES + column // (D_TILE // V_PLANES)
    if K_HAS_SCALE:
        k_sides = K.sides + kv_head * K_SIDES
    if V_HAS_SCALE:
        v_sides = V.sides + kv_head * V_SIDES
    if K_STATIC:
        q_scale *= tl.load(k_sides).to(tl.float32)
    if K_DECODED:
        k_step = tl.arange(0, BLOCK_N // K_STEP) * K_STEP
        k_part = tl.arange(0, K_PARTS)
    if K_BY_CHANNEL:
        k_part = k_channel
    if V_DECODED:
        v_step = tl.arange(0, BLOCK_N // V_STEP) * V_STEP
        v_part = tl.arange(0, V_PARTS)
    if V_BY_CHANNEL:
        v_part = v_channel

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's running maximum
    r = tl.zeros([BLOCK_M], tl.float32)  # the reference that P, l and acc are scaled to
    l = tl.zeros([BLOCK_M, LANES], tl.float32)
    acc = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    if V_PAIR_OF_TOKEN:
        zeros = tl.zeros([BLOCK_M, LANES], tl.float32)
    for phase in tl.static_range(FIRST_PHASE, 3):
        # 0: masked tiles at the window's left edge; 1: full tiles; 2: masked tiles at the right edge
        low = begin
        high = tl.minimum(whole, end)
        if phase == 1:
            low = whole
            high = edge
        if phase == 2:
            low = tl.maximum(whole, edge)
            high = end
        for start in range(low, high, BLOCK_N):
            j = start + n
            inside = j < n_k
            page = page_of(table, start, j, n_k, PAGE, phase != 1)

            k_at = tokens_at(k_codes + page * K.page, start, n, PAGE, 1, K_WIDTH)
            k = load_tile(k_at[:, None] + k_column[None, :], inside, k_column * K_PACKED < D, PADDED)
            k = widen_k(lay_k(decode_k(k)), K_VIA)
            if K_DECODED:
                token = start + k_step
                k_page = page_of(table, start, token, n_k, PAGE, phase != 1)
                k_side_at = tokens_at(k_sides + k_page * K.sides_page, start, k_step, PAGE, K_GROUP, K_SIDE)
                at = k_side_at[:, None] + k_part[None, :]
                k_scale = load_tile(at, token < n_k, k_part < K_COLUMNS, phase != 1 or PADDED).to(tl.float32)
                k = (k + K_HALF) * spread_k(k_scale, BLOCK_N, K_STEP, D_TILE, K_CHANNELS, K_PLANES)
                if K_ZERO_DECODED:
                    k_zero = load_tile(at + K_COLUMNS, token < n_k, k_part < K_COLUMNS, phase != 1 or PADDED)
                    k += spread_k(k_zero.to(tl.float32), BLOCK_N, K_STEP, D_TILE, K_CHANNELS, K_PLANES)
                k = k.to(OWN_TYPE)
            s = product_k(q, tl.trans(k.to(K_TYPE)))
            c = q_scale
            if K_SIDE_OF_TILE:
                c *= tl.load(k_sides + page * K.sides_page + tl.cast(start, tl.int32) % PAGE // K_GROUP * K_SIDE).to(tl.float32)
            if K_SIDE_OF_TOKEN:
                k_side_at = tokens_at(k_sides + page * K.sides_page, start, n, PAGE, K_GROUP, K_SIDE)
                s = s.to(tl.float32) * tl.load(k_side_at).to(tl.float32)[None, :]
            if K_PAIR_OF_TOKEN:
                k_side_at = tokens_at(k_sides + page * K.sides_page, start, n, PAGE, K_GROUP, K_SIDE)
                k_scale, k_zero = tl.split(tl.load(k_side_at[:, None] + pair[None, :]).to(tl.float32))
                # k_zero + K_HALF * k_scale is the value of a stored code of 0
                s = s.to(tl.float32) * k_scale[None, :] + q_sum[:, None] * (k_zero + K_HALF * k_scale)[None, :]
            if SOFTCAP:
                s = s.to(tl.float32) * c[:, None]
                if LOWERED_SOFTCAP:
                    s += (tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale)[:, None]
                s = F.softcap * tanh(s / F.softcap)
                # log2(e) is applied where the row's maximum is subtracted
                c = tl.full([BLOCK_M], 1.4426950408889634, tl.float32)
            if V_SIDE_OF_TOKEN:
                v_side_at = tokens_at(v_sides + page * V.sides_page, start, n, PAGE, V_GROUP, V_SIDE)
                v_scale = tl.load(v_side_at).to(tl.float32)
            if V_PAIR_OF_TOKEN:
                v_side_at = tokens_at(v_sides + page * V.sides_page, start, n, PAGE, V_GROUP, V_SIDE)
                v_scale, v_zero = tl.split(tl.load(v_side_at[:, None] + pair[None, :]).to(tl.float32))
                if phase != 1:
                    # zero times NaN is NaN: rows that see a token of no finite scale are NaN by it, the others must not be
                    v_zero = tl.where(inside & (tl.abs(v_scale) < float("inf")), v_zero, 0.0)
            if V_PER_TOKEN:
                # V's scale joins the exponent, so that P is rounded with its weight; the weight is taken out of l again
                if phase != 1:
                    v_scale = tl.where(inside, v_scale, 1.0)
                log2_weight = tl.where(v_scale < 0.0, -32.0, log2_scale(tl.abs(v_scale)))
                weight_out = tl.where(log2_weight == log2_weight, tl.exp2(-log2_weight), 0.0)
                s = s.to(tl.float32) * c[:, None] + log2_weight[None, :]
                c = tl.full([BLOCK_M], 1.0, tl.float32)
            if phase != 1:
                keep = inside[None, :]
                if RIGHT:
                    keep = keep & (j[None, :] <= i[:, None] + (ahead + F.right))
                if LEFT:
                    keep = keep & (j[None, :] >= i[:, None] + (ahead - F.left))
                s = tl.where(keep, s.to(tl.float32) * c[:, None], float("-inf"))
                c = tl.full([BLOCK_M], 1.0, tl.float32)

            largest = tl.max(s, 1).to(tl.float32) * c
            m = tl.maximum(m, largest)
            reference = row_reference(largest, m)
            # up by an ulp, so that rounding never gives a code above the largest
            reference += tl.abs(reference) * 1.1920928955078125e-07
            if phase != 1 or MAY_BE_EMPTY or JOINED:
                # a fully masked tile leaves the reference as it is
                reference = tl.where(largest == float("-inf"), r, reference)
            alpha = tl.exp2(tl.minimum(r - reference, 65.0))
            r = reference
            p = tl.exp2(s.to(tl.float32) * c[:, None] - (r - LOG2_LARGEST)[:, None])
            codes = encode_p(p)

            counted = count(p, codes)
            if V_PER_TOKEN:
                counted *= weight_out[None, :]
            l = sum_in_lanes(counted, l * alpha[:, None], BLOCK_M, BLOCK_N, LANES)
            if V_PAIR_OF_TOKEN:
                of_zeros = p * (v_zero * weight_out + V_HALF)[None, :]
                zeros = sum_in_lanes(of_zeros, zeros * alpha[:, None], BLOCK_M, BLOCK_N, LANES)

            v_at = tokens_at(v_codes + page * V.page, start, n, PAGE, 1, V_ROW)
            v_inside = start + order_v(n, 1) < n_k
            v_at = v_at[:, None] + (v_column * V_COLUMN)[None, :]
            v = load_tile(v_at, v_inside, v_column * V_PACKED < D, (phase != 1 and V_CLEARED) or PADDED)
            v = widen_v(lay_v(decode_v(v)), V_VIA)
            if V_DECODED:
                token = start + v_step
                v_page = page_of(table, start, token, n_k, PAGE, phase != 1)
                v_side_at = tokens_at(v_sides + v_page * V.sides_page, start, v_step, PAGE, V_GROUP, V_SIDE)
                at = v_side_at[:, None] + v_part[None, :]
                v_scale = load_tile(at, token < n_k, v_part < V_COLUMNS, phase != 1 or PADDED).to(tl.float32)
                v = (v + V_HALF) * spread_v(v_scale, BLOCK_N, V_STEP, D_TILE, V_CHANNELS, V_PLANES)
                if V_ZERO_DECODED:
                    v_zero = load_tile(at + V_COLUMNS, token < n_k, v_part < V_COLUMNS, phase != 1 or PADDED)
                    v += spread_v(v_zero.to(tl.float32), BLOCK_N, V_STEP, D_TILE, V_CHANNELS, V_PLANES)
                v = v.to(OWN_TYPE)
            v = v.to(V_TYPE)
            pv = product_v(order_p(codes.to(P_TYPE), BLOCK_M, BLOCK_N), v).to(tl.float32)
            if UNSIGNED_P:
                # unsigned codes of P were shifted to fit signed integers: add what the product lacks
                pv += (tl.sum(v.to(tl.int32), 0) * CODE_ZERO).to(tl.float32)[None, :]
            if V_PER_TILE:
                v_block = tl.cast(start, tl.int32) % PAGE // V_GROUP
                v_side_at = v_sides + page * V.sides_page + v_block * V_SIDE + v_channel * V_PER_CHANNEL
                v_scale = tl.load(v_side_at, mask=v_channel < D, other=0.0).to(tl.float32)
                pv *= (v_scale * V_UNIT)[None, :]
            if V_TILE_ZERO:
                v_zero = tl.load(v_side_at + V_COLUMNS, mask=v_channel < D, other=0.0).to(tl.float32)
                pv += tl.sum(p, 1)[:, None] * (v_zero + V_HALF * v_scale)[None, :]
            acc = acc * alpha[:, None] + pv

    l = tl.sum(l, 1)
    lowered = tl.zeros([BLOCK_M], tl.float32)
    if LOWERED_LOGITS:
        lowered = tl.where(l == 0.0, 0.0, tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale)
    inverse_total = 1.0 / tl.where(l == 0.0, 1.0, l)
    o = acc * (inverse_total * OUTPUT_UNIT)[:, None]
    if V_PAIR_OF_TOKEN:
        o += (tl.sum(zeros, 1) * inverse_total)[:, None]
    if V_IN_PLANES:
        o = o.reshape(BLOCK_M, V_PLANES, D_TILE // V_PLANES).permute(0, 2, 1).reshape(BLOCK_M, D_TILE)
    if V_ON_OUTPUT:
        v_side_at = v_sides + column * V_PER_CHANNEL
        v_scale = tl.load(v_side_at, mask=held, other=0.0).to(tl.float32)
        o *= v_scale[None, :]
    if V_OUTPUT_ZERO:
        v_zero = tl.load(v_side_at + V_COLUMNS, mask=held, other=0.0).to(tl.float32)
        o += (l * inverse_total)[:, None] * (v_zero + V_HALF * v_scale)[None, :]
    if V_ROTATED:
        o = hadamard(o, BLOCK_M, D_TILE, V_STAGES) * V_NORM
    if V_MEAN:
        mean = tl.load(V.offset + kv_head * D + column, mask=held, other=0.0).to(tl.float32)
        o += (l * inverse_total)[:, None] * mean[None, :]
    # 0 for a row that attends to nothing, even if V is not finite
    o = tl.where((l == 0.0)[:, None], 0.0, o)
    tl.store(out_at, o, mask=here[:, None] & held[None, :])
    # natural; -inf where a row attends to nothing
    tl.store(Lse + result, (r + tl.log2(l) - LOG2_LARGEST) * 0.6931471805599453 + lowered, mask=here)
