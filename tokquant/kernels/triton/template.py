"""Flash attention with its holes filled for int8: a kernel that runs, and the text of every other."""

from tokquant.kernels.triton.fragments import integer_product as product_k
from tokquant.kernels.triton.fragments import integer_product as product_v
from tokquant.kernels.triton.fragments import running_maximum as row_reference
from tokquant.kernels.triton.fragments import scale_by_key as scale_scores
from tokquant.precisions.base import tl, triton
from tokquant.precisions.int8 import decode_tile as decode_k
from tokquant.precisions.int8 import decode_tile as decode_q
from tokquant.precisions.int8 import decode_tile as decode_v
from tokquant.precisions.int8 import encode_tile as encode_p

D = tl.constexpr(64)  # head_dim
D_TILE = tl.constexpr(64)  # the next power of two
Q_PACKED = tl.constexpr(1)  # codes in a stored element
K_PACKED = tl.constexpr(1)
V_PACKED = tl.constexpr(1)
Q_GROUP = tl.constexpr(1)  # tokens under one scale
K_GROUP = tl.constexpr(1)
V_GROUP = tl.constexpr(1)
Q_TYPE = tl.constexpr(tl.int8)  # what the two products take
K_TYPE = tl.constexpr(tl.int8)
P_TYPE = tl.constexpr(tl.int8)
V_TYPE = tl.constexpr(tl.int8)
Q_VIA = tl.constexpr(tl.int8)  # the type on the way there: integers reach fp8 by fp16
K_VIA = tl.constexpr(tl.int8)
V_VIA = tl.constexpr(tl.int8)
LOG2_LARGEST = tl.constexpr(6.988684686772166)  # of P's largest code: P is kept in units of its codes
CODE_ZERO = tl.constexpr(0)  # what an unsigned code of P has lost to fit a signed unit
SHARED_HEADS = tl.constexpr(1)  # heads of Q to one of K and V
CAUSAL = tl.constexpr(False)
PADDED = tl.constexpr(False)  # D_TILE > D
Q_SCALED = tl.constexpr(True)
K_SCALED = tl.constexpr(True)
V_PER_TOKEN = tl.constexpr(False)  # where V's scale enters: P,
V_PER_TILE = tl.constexpr(False)  # each tile's product,
V_ON_OUTPUT = tl.constexpr(True)  # or the output
V_COLUMN = tl.constexpr(0)  # 1 where V has a scale per channel
V_MEAN = tl.constexpr(False)
UNSIGNED_P = tl.constexpr(False)
CLEAR_TAIL = tl.constexpr(False)
QUANTIZED_NORMALIZER = tl.constexpr(False)
WITH_LSE = tl.constexpr(False)
LOWERED_LOGITS = tl.constexpr(False)  # K has lost an offset c: LSE gets scale * q . c back


@triton.jit
def attention(Q, K, V, Out, Lse, scale, n_q, n_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // SHARED_HEADS
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, D_TILE)

    # [BLOCK_M, D] queries, and their scale with the softmax's and the change of base to exp2
    q_column = tl.arange(0, D_TILE // Q_PACKED)
    q_at = Q.codes + batch * Q.batch + head * Q.head + i.to(tl.int64)[:, None] * Q.row + q_column[None, :]
    q = tl.load(q_at, mask=(i < n_q)[:, None] & (q_column * Q_PACKED < D)[None, :], other=0.0)
    q = decode_q(q).to(Q_VIA).to(Q_TYPE)
    if PADDED:
        q = tl.where((column < D)[None, :], q, 0.0).to(Q_TYPE)
    q_scale = tl.full([BLOCK_M], 1.4426950408889634, tl.float32) * scale
    if Q_SCALED:
        q_scale_at = Q.scale + batch * Q.scale_batch + head * Q.scale_head + (i // Q_GROUP) * Q.scale_row
        q_scale *= tl.load(q_scale_at, mask=i < n_q, other=0.0).to(tl.float32)

    k_codes = K.codes + batch * K.batch + kv_head * K.head
    v_codes = V.codes + batch * V.batch + kv_head * V.head
    k_scale_at = K.scale
    if K_SCALED:
        k_scale_at += batch * K.scale_batch + kv_head * K.scale_head
    k_column = tl.arange(0, D_TILE // K_PACKED)
    v_column = tl.arange(0, D_TILE // V_PACKED)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's maximum so far
    r = tl.zeros([BLOCK_M], tl.float32)  # what P, l and acc are relative to
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_TILE], tl.float32)
    end = n_k
    if CAUSAL:
        # bottom-right: the last query sees the last key
        end = tl.minimum(n_k, (tl.program_id(0) + 1) * BLOCK_M + n_k - n_q)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < n_k

        k_at = k_codes + j.to(tl.int64)[:, None] * K.row + k_column[None, :]
        k = tl.load(k_at, mask=inside[:, None] & (k_column * K_PACKED < D)[None, :], other=0.0)
        k = decode_k(k).to(K_VIA).to(K_TYPE)
        s = scale_scores(product_k(q, tl.trans(k)), q_scale, k_scale_at, K.scale_row, start, j, n_k, K_GROUP)
        if V_PER_TOKEN:
            # V's scale joins the exponent, so that P is rounded with its weight; l takes the weight out again
            weight_at = V.weight + (batch * (tl.num_programs(1) // SHARED_HEADS) + kv_head) * n_k + j
            v_weight = tl.load(weight_at, mask=inside, other=1.0)
            s += tl.log2(v_weight)[None, :]
        keep = inside[None, :]
        if CAUSAL:
            keep = keep & (j[None, :] <= i[:, None] + (n_k - n_q))
        s = tl.where(keep, s, float("-inf"))

        largest = tl.max(s, 1)
        m = tl.maximum(m, largest)
        reference = row_reference(largest, m)
        # up by an ulp, so that no rounding gives a code beyond the largest; a tile with nothing in it moves nothing
        reference = tl.where(largest == float("-inf"), r, reference + tl.abs(reference) * 1.1920928955078125e-07)
        alpha = tl.exp2(tl.minimum(r - reference, 65.0))
        r = reference
        p = tl.exp2(s - (r - LOG2_LARGEST)[:, None])
        codes = encode_p(p)

        counted = p
        if QUANTIZED_NORMALIZER:
            # integer codes cannot hold NaN, p - p can
            counted = codes.to(tl.float32) + CODE_ZERO + (p - p)
        if V_PER_TOKEN:
            # a weight that is not a number is in p already, where the pair attends
            counted *= tl.where(v_weight < float("inf"), 1.0 / v_weight, 0.0)[None, :]
        l = l * alpha + tl.sum(counted, 1)

        v_at = v_codes + j.to(tl.int64)[:, None] * V.row + v_column[None, :]
        v = tl.load(v_at, mask=inside[:, None] & (v_column * V_PACKED < D)[None, :], other=0.0)
        v = decode_v(v).to(V_VIA).to(V_TYPE)
        if CLEAR_TAIL:
            # an unsigned code beyond n_k is not zero now, so V must be, which packed zero bits are not
            v = tl.where(inside[:, None], v, 0).to(V_TYPE)
        pv = product_v(codes.to(P_TYPE), v)
        if UNSIGNED_P:
            tile = (batch * (tl.num_programs(1) // SHARED_HEADS) + kv_head) * tl.cdiv(n_k, BLOCK_N) + start // BLOCK_N
            code_sum = tl.load(V.code_sum + tile * D + column, mask=column < D, other=0)
            pv += (code_sum * CODE_ZERO).to(tl.float32)[None, :]
        if V_PER_TILE:
            v_scale_at = V.scale + batch * V.scale_batch + kv_head * V.scale_head + (start // V_GROUP) * V.scale_row
            pv *= tl.load(v_scale_at + column * V_COLUMN, mask=column < D, other=0.0).to(tl.float32)[None, :]
        acc = acc * alpha[:, None] + pv

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if V_ON_OUTPUT:
        v_scale_at = V.scale + batch * V.scale_batch + kv_head * V.scale_head
        out *= tl.load(v_scale_at + column * V_COLUMN, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if V_MEAN:
        mean_at = V.offset + (batch * (tl.num_programs(1) // SHARED_HEADS) + kv_head) * D + column
        mean = tl.load(mean_at, mask=column < D, other=0.0).to(tl.float32)
        out += tl.where(l == 0.0, 0.0, 1.0)[:, None] * mean[None, :]
    out_at = Out.data + batch * Out.batch + head * Out.head + i.to(tl.int64)[:, None] * Out.row + column[None, :]
    tl.store(out_at, out.to(Out.data.dtype.element_ty), mask=(i < n_q)[:, None] & (column < D)[None, :])
    if WITH_LSE:
        lse = (r + tl.log2(l) - LOG2_LARGEST) * 0.6931471805599453
        row = (batch * tl.num_programs(1) + head) * n_q + i
        if LOWERED_LOGITS:
            lse += tl.load(Q.offset + row, mask=i < n_q, other=0.0) * scale
        tl.store(Lse + row, lse, mask=i < n_q)
