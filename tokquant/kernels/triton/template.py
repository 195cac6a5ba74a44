"""The template of attention kernels: flash attention with its holes filled for int8, which runs as it is."""

from tokquant.kernels.triton.fragments import as_they_are as lay_k
from tokquant.kernels.triton.fragments import as_they_are as lay_q
from tokquant.kernels.triton.fragments import as_they_are as lay_v
from tokquant.kernels.triton.fragments import by_token as address_v
from tokquant.kernels.triton.fragments import exact as count
from tokquant.kernels.triton.fragments import in_order as order_p
from tokquant.kernels.triton.fragments import integer_product as product_k
from tokquant.kernels.triton.fragments import integer_product as product_v
from tokquant.kernels.triton.fragments import running_maximum as row_reference
from tokquant.kernels.triton.fragments import scale_by_key as scale_scores
from tokquant.kernels.triton.parts import consecutive, hadamard, load_pairs, load_row, load_tile, tanh
from tokquant.precisions.base import tl, triton
from tokquant.precisions.int8 import decode_tile as decode_k
from tokquant.precisions.int8 import decode_tile as decode_q
from tokquant.precisions.int8 import decode_tile as decode_v
from tokquant.precisions.int8 import encode_tile as encode_p

D = tl.constexpr(64)  # head_dim
D_TILE = tl.constexpr(64)  # the next power of two
PADDED = tl.constexpr(False)  # D_TILE > D
SHARED_HEADS = tl.constexpr(1)  # heads of Q to one of K and V
Q_PACKED = tl.constexpr(1)  # codes in a stored element
K_PACKED = tl.constexpr(1)
V_PACKED = tl.constexpr(1)
V_TOKENS = tl.constexpr(1)  # V's tokens are padded to a multiple of this
TOKENS_FIRST = tl.constexpr(True)  # V is [N, D],
TOKENS_LAST = tl.constexpr(False)  # or [D, N]
V_STACKED = tl.constexpr(1)  # tokens in a stored element of V
PLANES = tl.constexpr(False)  # Q is loaded with its channels in the order of K's planes
Q_GROUP = tl.constexpr(1)  # tokens under one scale
K_GROUP = tl.constexpr(1)
V_GROUP = tl.constexpr(1)
Q_CHANNELS = tl.constexpr(64)  # channels under one scale
K_CHANNELS = tl.constexpr(64)
V_CHANNELS = tl.constexpr(64)
Q_TYPE = tl.constexpr(tl.int8)  # types of the products' operands
K_TYPE = tl.constexpr(tl.int8)
P_TYPE = tl.constexpr(tl.int8)
V_TYPE = tl.constexpr(tl.int8)
Q_VIA = tl.constexpr(tl.int8)  # the type in between: integers are converted to fp8 by way of fp16
K_VIA = tl.constexpr(tl.int8)
V_VIA = tl.constexpr(tl.int8)
K_HALF = tl.constexpr(0)  # a stored code of 0 is this many steps above an asymmetric operand's zero
V_HALF = tl.constexpr(0)
LOG2_LARGEST = tl.constexpr(6.988684686772166)  # log2 of P's largest code: P is computed in units of its codes
LOGIT_BASE = tl.constexpr(1.4426950408889634)  # log2(e), or 1 where a feature needs natural logits
FIRST_PHASE = tl.constexpr(1)  # 0 where masked tiles precede the full ones
Q_HAS_SCALE = tl.constexpr(True)  # whether it has scales that the kernel reads
K_HAS_SCALE = tl.constexpr(True)
V_HAS_SCALE = tl.constexpr(True)
Q_SCALED = tl.constexpr(True)
K_SCALED = tl.constexpr(True)
OWN_TYPE = tl.constexpr(tl.float16)  # the tensors' type, which decoded values are rounded to
Q_DECODED = tl.constexpr(False)  # scales vary along the contracted dimension: apply them before the product
K_DECODED = tl.constexpr(False)
V_DECODED = tl.constexpr(False)
K_ZERO = tl.constexpr(False)
K_ZERO_DECODED = tl.constexpr(False)
V_ZERO_DECODED = tl.constexpr(False)
V_PER_TOKEN = tl.constexpr(False)  # V's scale is applied to P,
V_PER_TILE = tl.constexpr(False)  # each tile's product,
V_ON_OUTPUT = tl.constexpr(True)  # or the output
V_TOKEN_ZERO = tl.constexpr(False)
V_TILE_ZERO = tl.constexpr(False)
V_OUTPUT_ZERO = tl.constexpr(False)
V_COLUMN = tl.constexpr(0)  # 1 where V has a scale per channel
V_ROTATED = tl.constexpr(False)
V_STAGES = tl.constexpr(0)  # butterfly stages that undo the rotation
V_NORM = tl.constexpr(1.0)
V_MEAN = tl.constexpr(False)
BLOCK_MEANS = tl.constexpr(False)  # of Q, over 128 queries
UNSIGNED_P = tl.constexpr(False)
CLEAR_TAIL = tl.constexpr(False)
CLEAR_CHANNELS = tl.constexpr(False)
VARLEN = tl.constexpr(False)  # sequences of different lengths, packed one after another
LEFT = tl.constexpr(False)  # whether the keys that a query sees are bounded before it,
RIGHT = tl.constexpr(False)  # and after it, as by causality
SOFTCAP = tl.constexpr(False)
LOWERED_SOFTCAP = tl.constexpr(False)  # K is stored without an offset c, so logits are lower by scale * q . c
LOWERED_LOGITS = tl.constexpr(False)
ADDITIVE_MASK = tl.constexpr(False)
BOOLEAN_MASK = tl.constexpr(False)
ALIBI = tl.constexpr(False)
ALIBI_BOTH = tl.constexpr(False)  # queries see keys on both sides,
ALIBI_PAST = tl.constexpr(False)  # or none after their own
KEY_VECTOR = tl.constexpr(False)
LOWRANK = tl.constexpr(False)
RANK = tl.constexpr(16)
RANK_TILE = tl.constexpr(16)  # the next power of two, from 16
RANK_PADDED = tl.constexpr(False)
DENSE_BIAS = tl.constexpr(False)
NATURAL = tl.constexpr(False)
JOINED = tl.constexpr(False)
MAY_BE_EMPTY = tl.constexpr(False)  # whether all scores of a row may be -inf, as floats can be
SINKS = tl.constexpr(False)
WITH_LSE = tl.constexpr(False)
BESIDE = tl.constexpr(False)  # output and LSE hold attention to other keys, which is merged with


@triton.jit
def attention(Q, K, V, Out, Lse, F, scale, n_q, n_k, heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if RIGHT:
        # the longest programs start first, to end together: the last queries, which see most keys, of a group of heads
        place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        batch = (place // heads).to(tl.int64)
        head = (place % heads).to(tl.int64)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = head // SHARED_HEADS
    first = block * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, D_TILE)
    held = column < D

    # where this head begins in each tensor
    query = batch * heads + head
    kv = batch * (heads // SHARED_HEADS) + kv_head
    row = query * n_q + i
    key = kv * n_k
    q_codes = Q.codes + batch * Q.batch + head * Q.head
    k_codes = K.codes + batch * K.batch + kv_head * K.head
    v_codes = V.codes + batch * V.batch + kv_head * V.head
    out = Out.data + batch * Out.batch + head * Out.head
    if Q_HAS_SCALE:
        q_group = batch * Q.scale_batch + head * Q.scale_head
    if K_HAS_SCALE:
        k_group = batch * K.scale_batch + kv_head * K.scale_head
    if V_HAS_SCALE:
        v_group = batch * V.scale_batch + kv_head * V.scale_head
    if BLOCK_MEANS:
        q_block = query * tl.cdiv(n_q, 128)
    if UNSIGNED_P:
        v_tile = kv * tl.cdiv(n_k, BLOCK_N)
    if VARLEN:
        # sequences are packed; values that n tokens share begin at k_start // n + batch, so that those of two never overlap
        sequences = tl.num_programs(2)
        if RIGHT:
            sequences = tl.num_programs(0) * tl.num_programs(2) // heads
        q_start = tl.load(F.q_starts + batch).to(tl.int64)
        k_start = tl.load(F.k_starts + batch).to(tl.int64)
        row = head * n_q + q_start + i
        key = kv_head * n_k + k_start
        q_codes += q_start * Q.row
        k_codes += k_start * K.row
        if TOKENS_FIRST:
            v_codes += k_start * V.row
        if TOKENS_LAST:
            v_codes += (k_start // V_TOKENS + batch) * (V_TOKENS // V_STACKED)
        out += q_start * Out.row
        if Q_HAS_SCALE:
            q_group += (q_start // Q_GROUP + batch) * Q.scale_row
        if K_HAS_SCALE:
            k_group += (k_start // K_GROUP + batch) * K.scale_row
        if V_HAS_SCALE:
            v_group += (k_start // V_GROUP + batch) * V.scale_row
        if BLOCK_MEANS:
            q_block = head * (n_q // 128 + sequences) + q_start // 128 + batch
        if UNSIGNED_P:
            v_tile = kv_head * (n_k // BLOCK_N + sequences) + k_start // BLOCK_N + batch
        n_q = (tl.load(F.q_starts + batch + 1) - q_start).to(tl.int32)
        n_k = (tl.load(F.k_starts + batch + 1) - k_start).to(tl.int32)
        if first >= n_q:
            return
    here = i < n_q

    # [BLOCK_M, D] queries, and their scale times the softmax's
    q_column = tl.arange(0, D_TILE // Q_PACKED)
    if PLANES:
        # K is decoded in planes: the first channel of every stored element, then the second ...
        q_column = column % (D_TILE // K_PACKED) * K_PACKED + column // (D_TILE // K_PACKED)
    q_at = q_codes + i.to(tl.int64)[:, None] * Q.row + q_column[None, :]
    q = lay_q(decode_q(load_tile(q_at, here, q_column * Q_PACKED < D, True))).to(Q_VIA)
    q_scale = tl.full([BLOCK_M], LOGIT_BASE, tl.float32) * scale
    if Q_SCALED:
        q_scale *= tl.load(Q.scale + q_group + (i // Q_GROUP) * Q.scale_row, mask=here, other=0.0).to(tl.float32)
    if Q_DECODED:
        q_scale_at = q_group + (i // Q_GROUP)[:, None] * Q.scale_row + (column // Q_CHANNELS)[None, :]
        q = (q.to(tl.float32) * load_tile(Q.scale + q_scale_at, here, held, True).to(tl.float32)).to(OWN_TYPE)
    if CLEAR_CHANNELS:
        # beyond D a tile of K may hold anything
        q = tl.where(held[None, :], q, 0.0)
    q = q.to(Q_TYPE)
    if K_ZERO:
        q_sum = tl.load(Q.code_sum + row, mask=here, other=0.0)
    if BLOCK_MEANS:
        q_mean = tl.load(Q.offset + (q_block + first // 128) * D + column, mask=held, other=0.0).to(tl.float32)
    if ALIBI:
        slope = tl.load(F.bias + head)
    if KEY_VECTOR:
        key_bias = F.bias + batch * F.bias_batch + head * F.bias_head
        if VARLEN:
            key_bias += k_start
    if LOWRANK:
        factor = tl.arange(0, RANK_TILE)
        q_factors_at = F.bias + batch * F.bias_batch + head * F.bias_head
        q_factors_at += i.to(tl.int64)[:, None] * F.bias_row + factor[None, :]
        if VARLEN:
            q_factors_at += q_start * F.bias_row
        q_factors = load_tile(q_factors_at, here, factor < RANK, True)
    if DENSE_BIAS:
        pair_bias = F.bias + batch * F.bias_batch + head * F.bias_head

    k_scale_at = K.scale
    if K_SCALED:
        k_scale_at += k_group
    n_v = tl.cdiv(n_k, V_TOKENS) * V_TOKENS
    k_column = tl.arange(0, D_TILE // K_PACKED)
    v_column = tl.arange(0, D_TILE // V_PACKED)

    # keys [begin, end) are visible to some of these queries; tiles in [whole, edge) to all, so they need no mask
    begin = 0
    end = n_k
    whole = 0
    edge = n_k // BLOCK_N * BLOCK_N
    if RIGHT:
        # bottom-right: the last query sees the last key
        end = tl.minimum(n_k, tl.minimum(first + BLOCK_M, n_q) + n_k - n_q + F.right)
        edge = tl.minimum(edge, tl.maximum(first + n_k - n_q + F.right + 1, 0) // BLOCK_N * BLOCK_N)
    if LEFT:
        begin = tl.maximum(first + n_k - n_q - F.left, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(first + BLOCK_M - 1 + n_k - n_q - F.left, 0), BLOCK_N) * BLOCK_N

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's running maximum
    r = tl.zeros([BLOCK_M], tl.float32)  # the reference that P, l and acc are scaled to
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    if V_TOKEN_ZERO:
        zeros = tl.zeros([BLOCK_M], tl.float32)
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
            j = start + tl.arange(0, BLOCK_N)
            inside = j < n_k

            k_at = k_codes + tl.cast(start, tl.int64) * K.row + (j - start)[:, None] * K.row + k_column[None, :]
            k = lay_k(decode_k(load_tile(k_at, inside, k_column * K_PACKED < D, phase != 1 or PADDED))).to(K_VIA)
            if K_DECODED:
                at = k_group + (j // K_GROUP)[:, None] * K.scale_row + (column // K_CHANNELS)[None, :]
                k = (k.to(tl.float32) + K_HALF) * load_tile(K.scale + at, inside, held, True).to(tl.float32)
                if K_ZERO_DECODED:
                    k += load_tile(K.zero + at, inside, held, True).to(tl.float32)
                k = k.to(OWN_TYPE)
            s = product_k(q, tl.trans(k.to(K_TYPE)))
            s, c = scale_scores(s, q_scale, k_scale_at, K.scale_row, start, j, n_k, K_GROUP, phase != 1)
            if JOINED:
                # logits are added to, or masked: apply c now
                s = s.to(tl.float32) * c[:, None]
                c = tl.full([BLOCK_M], 1.0, tl.float32)
            if K_ZERO:
                k_zero = load_row(K.zero + k_group + (j // K_GROUP) * K.scale_row, inside, phase != 1)
                s += (q_sum * q_scale)[:, None] * k_zero[None, :]
            if BLOCK_MEANS:
                companion_at = K.companion + (key + j)[:, None] * D + column[None, :]
                companion = load_tile(companion_at, inside, held, True).to(tl.float32)
                s += (tl.sum(companion * q_mean[None, :], 1) * (scale * LOGIT_BASE))[None, :]
            if LOWERED_SOFTCAP:
                s += (tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale)[:, None]
            if SOFTCAP:
                s = F.softcap * tanh(s / F.softcap)
            if ALIBI:
                # positions of keys relative to the block's first query
                ahead = consecutive(start - (first + n_k - n_q), BLOCK_N)
            if ALIBI_BOTH:
                s -= slope * tl.abs((i - first).to(tl.float32)[:, None] - ahead[None, :])
            if ALIBI_PAST:
                # a query's own position is constant along its row, and is applied after the loop
                s += (slope * ahead)[None, :]
            if KEY_VECTOR:
                s += load_row(key_bias + j, inside, phase != 1)[None, :]
            if LOWRANK:
                at = F.k_factors + batch * F.k_factors_batch + head * F.k_factors_head
                at += tl.cast(start, tl.int64) * F.k_factors_row
                if VARLEN:
                    at += k_start * F.k_factors_row
                at += (j - start)[:, None] * F.k_factors_row + factor[None, :]
                k_factors = load_tile(at, inside, factor < RANK, phase != 1 or RANK_PADDED)
                s = tl.dot(q_factors, tl.trans(k_factors), s)
            if DENSE_BIAS:
                bias = load_pairs(pair_bias, F.bias_row, F.bias_column, i, j, first, start, here, inside)
                s += bias.to(tl.float32)
            if ADDITIVE_MASK:
                mask_at = F.mask + batch * F.mask_batch + head * F.mask_head
                mask = load_pairs(mask_at, F.mask_row, F.mask_column, i, j, first, start, here, inside)
                s += mask.to(tl.float32)
            if NATURAL:
                # log2(e) is applied where the row's maximum is subtracted
                c = tl.full([BLOCK_M], 1.4426950408889634, tl.float32)
            if V_PER_TOKEN:
                # V's scale joins the exponent, so that P is rounded with its weight; the weight is taken out of l again
                s = s * c[:, None] + load_row(V.log2_weight + key + j, inside, phase != 1)[None, :]
                c = tl.full([BLOCK_M], 1.0, tl.float32)
            if phase != 1:
                keep = inside[None, :]
                if RIGHT:
                    keep = keep & (j[None, :] <= i[:, None] + (n_k - n_q + F.right))
                if LEFT:
                    keep = keep & (j[None, :] >= i[:, None] + (n_k - n_q - F.left))
                s = tl.where(keep, s.to(tl.float32) * c[:, None], float("-inf"))
                c = tl.full([BLOCK_M], 1.0, tl.float32)
            if BOOLEAN_MASK:
                mask_at = F.mask + batch * F.mask_batch + head * F.mask_head
                mask = load_pairs(mask_at, F.mask_row, F.mask_column, i, j, first, start, here, inside)
                s = tl.where(mask != 0, s, float("-inf"))

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
                counted *= load_row(V.inverse_weight + key + j, inside, phase != 1)[None, :]
            l = l * alpha + tl.sum(counted, 1)

            n = tl.arange(0, BLOCK_N // V_STACKED)
            v_at = address_v(v_codes, start // V_STACKED, n, v_column, V.row)
            v_inside = n < (n_v - start) // V_STACKED
            v = lay_v(decode_v(load_tile(v_at, v_inside, v_column * V_PACKED < D, phase != 1 or PADDED))).to(V_VIA)
            if V_DECODED:
                at = v_group + (j // V_GROUP)[:, None] * V.scale_row + (column // V_CHANNELS)[None, :]
                v = (v.to(tl.float32) + V_HALF) * load_tile(V.scale + at, inside, held, True).to(tl.float32)
                if V_ZERO_DECODED:
                    v += load_tile(V.zero + at, inside, held, True).to(tl.float32)
                v = v.to(OWN_TYPE)
            if CLEAR_TAIL:
                # shifted codes of P are not zero beyond n_k, so V must be, and packed zero bits do not decode to zero
                v = tl.where((j < n_v)[:, None], v, 0)
            pv = product_v(order_p(codes.to(P_TYPE), BLOCK_M, BLOCK_N), v.to(V_TYPE)).to(tl.float32)
            if V_PER_TILE:
                at = v_group + (start // V_GROUP) * V.scale_row + column * V_COLUMN
                v_scale = tl.load(V.scale + at, mask=held, other=0.0).to(tl.float32)
                pv *= v_scale[None, :]
            if UNSIGNED_P:
                # unsigned codes of P were shifted to fit signed integers: add what the product lacks
                correction_at = V.correction + (v_tile + start // BLOCK_N) * D
                pv += tl.load(correction_at + column, mask=held, other=0.0)[None, :]
            if V_TILE_ZERO:
                v_zero = tl.load(V.zero + at, mask=held, other=0.0)
                pv += tl.sum(p, 1)[:, None] * v_zero[None, :]
            if V_TOKEN_ZERO:
                v_zero = load_row(V.zero + key + j, inside, phase != 1)
                zeros = zeros * alpha + tl.sum(p * v_zero[None, :], 1)
            acc = acc * alpha[:, None] + pv

    lowered = tl.zeros([BLOCK_M], tl.float32)
    if LOWERED_LOGITS:
        lowered = tl.where(l == 0.0, 0.0, tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale)
    if ALIBI_PAST:
        lowered -= slope * (i - first).to(tl.float32)
    total = l
    if SINKS:
        # a sink takes part in the softmax's sum and adds nothing to the output
        sink = tl.load(F.sinks + head).to(tl.float32) - lowered
        total += tl.exp2(sink * 1.4426950408889634 - r + LOG2_LARGEST)
    inverse_total = 1.0 / tl.where(l == 0.0, 1.0, total)
    o = acc * inverse_total[:, None]
    if V_TOKEN_ZERO:
        o += (zeros * inverse_total)[:, None]
    if V_ON_OUTPUT:
        at = v_group + column * V_COLUMN
        v_scale = tl.load(V.scale + at, mask=held, other=0.0).to(tl.float32)
        o *= v_scale[None, :]
    if V_OUTPUT_ZERO:
        v_zero = tl.load(V.zero + at, mask=held, other=0.0)
        o += (l * inverse_total)[:, None] * v_zero[None, :]
    if V_ROTATED:
        o = hadamard(o, BLOCK_M, D_TILE, V_STAGES) * V_NORM
    if V_MEAN:
        mean = tl.load(V.offset + kv * D + column, mask=held, other=0.0).to(tl.float32)
        o += (l * inverse_total)[:, None] * mean[None, :]
    # 0 for a row that attends to nothing, even if V is not finite
    o = tl.where((l == 0.0)[:, None], 0.0, o)
    out_at = out + i.to(tl.int64)[:, None] * Out.row + column[None, :]
    if WITH_LSE:
        # natural, without sinks; -inf where a row attends to nothing
        lse = tl.fma(r + tl.log2(l) - LOG2_LARGEST, 0.6931471805599453, lowered)
    if BESIDE:
        other = tl.load(Lse + row, mask=here, other=float("-inf"))
        top = tl.maximum(lse, other)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight, other_weight = tl.exp(lse - top), tl.exp(other - top)
        sum = weight + other_weight
        o = o * weight[:, None] + tl.load(out_at, mask=here[:, None] & held[None, :], other=0.0) * other_weight[:, None]
        o = o / tl.where(sum == 0.0, 1.0, sum)[:, None]
        lse = top + tl.log(sum)
    tl.store(out_at, o.to(Out.data.dtype.element_ty), mask=here[:, None] & held[None, :])
    if WITH_LSE:
        tl.store(Lse + row, lse, mask=here)
