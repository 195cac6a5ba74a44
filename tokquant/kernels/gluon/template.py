"""Flash attention on Hopper with its holes filled for int8: while a tile's softmax is computed, P V of the tile before runs.

Codes, sums and their order are those of the portable kernel. Tile j begins Q K(j) and P(j - 1) V(j - 1), which tensor cores do
by themselves, waits for the former alone, and adds the latter up when its own P is known: softmax never waits for P V.
"""

import inspect

from tokquant.kernels.gluon import language, parts
from tokquant.kernels.gluon.language import (
    async_copy,
    barrier,
    fence_async_shared,
    tl,
    triton,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tokquant.kernels.gluon.parts import fetch_columns, fetch_floats, fetch_rows, in_words, of_words, stay_behind
from tokquant.kernels.triton.fragments import exact as count
from tokquant.kernels.triton.fragments import in_groups as order_p
from tokquant.kernels.triton.fragments import running_maximum as row_reference
from tokquant.precisions.int8 import encode_tile as encode_p

PARTS = (
    parts.places,
    parts.fetch_rows,
    parts.fetch_columns,
    parts.fetch_floats,
    parts.in_words,
    parts.of_words,
    parts.stay_behind,
)
LANGUAGE = inspect.getsource(language).split('"""')[2].partition("__all__")[0].strip()
"""What a kernel's text begins with."""

D = tl.constexpr(64)  # head_dim
SHARED_HEADS = tl.constexpr(1)  # heads of Q to one of K and V
V_TOKENS = tl.constexpr(16)  # V holds whole groups of so many
TOKENS_FIRST = tl.constexpr(False)  # V has 16 bits and lies as it came,
TOKENS_LAST = tl.constexpr(True)  # or 8, with the tokens of a channel side by side
Q_GROUP = tl.constexpr(1)  # tokens under one scale
K_GROUP = tl.constexpr(1)
V_GROUP = tl.constexpr(1)
Q_TYPE = tl.constexpr(tl.int8)  # what the two products take
K_TYPE = tl.constexpr(tl.int8)
P_TYPE = tl.constexpr(tl.int8)
V_TYPE = tl.constexpr(tl.int8)
LOG2_LARGEST = tl.constexpr(6.988684686772166)  # of P's largest code: P is kept in units of its codes
LOGIT_BASE = tl.constexpr(1.4426950408889634)  # log2(e)
Q_HAS_SCALE = tl.constexpr(True)  # whether there are scales at all
K_HAS_SCALE = tl.constexpr(True)
V_HAS_SCALE = tl.constexpr(True)
Q_SCALED = tl.constexpr(True)
K_PER_KEY = tl.constexpr(True)  # K has several scales in a tile,
K_PER_TILE = tl.constexpr(False)  # or one
V_PER_TILE = tl.constexpr(False)  # where V's scale enters: each tile's product,
V_PER_TOKEN = tl.constexpr(False)  # P,
V_ON_OUTPUT = tl.constexpr(True)  # or the output
V_COLUMN = tl.constexpr(0)  # 1 where V has a scale per channel
V_MEAN = tl.constexpr(False)
UNSIGNED_P = tl.constexpr(False)
RIGHT = tl.constexpr(False)  # whether a query's reach is bounded
LOWERED_LOGITS = tl.constexpr(False)  # K has lost an offset c; logits are lower by scale * q . c
JOINED = tl.constexpr(False)  # whether something is added to the logits
MAY_BE_EMPTY = tl.constexpr(False)  # whether scores of floats may all be -inf
WITH_LSE = tl.constexpr(False)


@triton.jit
def attention(Q, K, V, Out, Lse, F, scale, n_q, n_k, heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    # scores and sums lie in registers as tensor cores leave them, P as they take it; each four warps have rows of their own
    SCORES: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [tl.num_warps(), 1], [16, BLOCK_N, 32])
    P_BITS: tl.constexpr = V.codes.dtype.element_ty.primitive_bitwidth
    SUMS: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [tl.num_warps(), 1], [16, D, 256 // P_BITS])
    TAKEN: tl.constexpr = tl.DotOperandLayout(0, SUMS, 32 // P_BITS)
    ROWS: tl.constexpr = tl.SliceLayout(1, SCORES)
    KEYS: tl.constexpr = tl.SliceLayout(0, SCORES)
    SUM_ROWS: tl.constexpr = tl.SliceLayout(1, SUMS)
    CHANNELS: tl.constexpr = tl.SliceLayout(0, SUMS)

    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if RIGHT:
        # the last queries see most keys: they come first, of some heads of all sequences side by side, and what is short last
        place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        batch = (place // heads).to(tl.int64)
        head = (place % heads).to(tl.int64)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = head // SHARED_HEADS
    first = block * BLOCK_M
    i = first + tl.arange(0, BLOCK_M, layout=ROWS)
    here = i < n_q

    # where this head begins in what has a row for each token, a row for each scale, and so on
    query = batch * heads + head
    kv = batch * (heads // SHARED_HEADS) + kv_head
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
    if UNSIGNED_P:
        v_tile = kv * tl.cdiv(n_k, BLOCK_N)

    # queries; then rings of slots, each for the keys of a tile, the values of the tile before, and what these have beside codes
    q = tl.allocate_shared_memory(Q_TYPE, [BLOCK_M, D], tl.NVMMASharedLayout.get_default_for([BLOCK_M, D], Q_TYPE))
    fetch_rows(q, q_codes + first.to(tl.int64) * Q.row, Q.row, n_q - first)
    K_TILE: tl.constexpr = tl.NVMMASharedLayout.get_default_for([BLOCK_N, D], K_TYPE)
    k_ring = tl.allocate_shared_memory(K_TYPE, [STAGES, BLOCK_N, D], K_TILE)
    if TOKENS_LAST:
        V_TURNED: tl.constexpr = tl.NVMMASharedLayout.get_default_for([D, BLOCK_N], V_TYPE)
        v_ring = tl.allocate_shared_memory(V_TYPE, [STAGES, D, BLOCK_N], V_TURNED)
    if TOKENS_FIRST:
        V_TILE: tl.constexpr = tl.NVMMASharedLayout.get_default_for([BLOCK_N, D], V_TYPE)
        v_ring = tl.allocate_shared_memory(V_TYPE, [STAGES, BLOCK_N, D], V_TILE)
    FLAT: tl.constexpr = tl.SwizzledSharedLayout(1, 1, 1, [0])
    if K_PER_KEY:
        k_scales = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
    if V_PER_TOKEN:
        v_weights = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
        v_inverses = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
    if V_PER_TILE:
        v_scales = tl.allocate_shared_memory(tl.float32, [STAGES, D], FLAT)
    if UNSIGNED_P:
        corrections = tl.allocate_shared_memory(tl.float32, [STAGES, D], FLAT)

    q_scale = tl.full([BLOCK_M], LOGIT_BASE, tl.float32, ROWS) * scale
    if Q_SCALED:
        q_scale *= tl.load(Q.scale + q_group + (i // Q_GROUP) * Q.scale_row, mask=here, other=0.0).to(tl.float32)
    n_v = tl.cdiv(n_k, V_TOKENS) * V_TOKENS

    # keys before `end` are seen by some of these queries, and tiles before `edge` by all: those need no mask
    end = n_k
    edge = n_k // BLOCK_N * BLOCK_N
    if RIGHT:
        # bottom-right: the last query sees the last key
        end = tl.minimum(n_k, tl.minimum(first + BLOCK_M, n_q) + n_k - n_q + F.right)
        edge = tl.minimum(edge, tl.maximum(first + n_k - n_q + F.right + 1, 0) // BLOCK_N * BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32, ROWS)  # the row's maximum so far
    r = tl.zeros([BLOCK_M], tl.float32, ROWS)  # what P and l are relative to, and acc one tile later
    l = tl.zeros([BLOCK_M], tl.float32, ROWS)
    alpha_before = tl.zeros([BLOCK_M], tl.float32, ROWS)
    acc = tl.zeros([BLOCK_M, D], tl.float32, SUMS)
    # P of no tile is zero, and so are its values
    p_before = in_words(tl.zeros([BLOCK_M, BLOCK_N], tl.float32, TAKEN).to(P_TYPE), BLOCK_M, BLOCK_N)
    no_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if tl.int8 == Q_TYPE else tl.float32, SCORES)
    no_sums = tl.zeros([BLOCK_M, D], tl.int32 if tl.int8 == P_TYPE else tl.float32, SUMS)
    for phase in tl.static_range(0, 3):
        # 0: nothing but the first copies; 1: whole tiles; 2: to the right edge
        low = (1 - STAGES) * BLOCK_N
        high = 0
        if phase == 1:
            low = 0
            high = edge
        if phase == 2:
            low = edge
            high = end
        for start in range(low, high, BLOCK_N):
            tile = start // BLOCK_N
            if phase != 0:
                slot = tile % STAGES
                # this tile's slot is filled for all threads, and for tensor cores; that of the tile before has been read by all
                async_copy.wait_group(STAGES - 2)
                barrier()
                fence_async_shared()
                p = tl.convert_layout(of_words(p_before, P_TYPE, BLOCK_M, BLOCK_N), TAKEN)
                s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
                if TOKENS_LAST:
                    pv = warpgroup_mma(p, v_ring.index(slot).permute((1, 0)), no_sums, use_acc=False, is_async=True)
                if TOKENS_FIRST:
                    pv = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)

            # the slot that was read last is filled for a later tile
            slot_ahead = (tile + STAGES - 1) % STAGES
            ahead = start + (STAGES - 1) * BLOCK_N
            behind = ahead - BLOCK_N
            wanted = (behind >= 0) & (behind < end)
            fetch_rows(k_ring.index(slot_ahead), k_codes + tl.cast(ahead, tl.int64) * K.row, K.row, end - ahead)
            if TOKENS_LAST:
                fetch_columns(v_ring.index(slot_ahead), v_codes + behind, V.row, tl.where(wanted, n_v - behind, 0))
            if TOKENS_FIRST:
                v_at = v_codes + tl.cast(behind, tl.int64) * V.row
                fetch_rows(v_ring.index(slot_ahead), v_at, V.row, tl.where(wanted, n_v - behind, 0))
            if K_PER_KEY:
                k_scale_at = K.scale + k_group
                fetch_floats(k_scales.index(slot_ahead), k_scale_at, K.scale_row, K_GROUP, ahead, end - ahead)
            if V_PER_TOKEN:
                fetch_floats(v_weights.index(slot_ahead), V.log2_weight + kv * n_k, 1, 1, ahead, end - ahead)
                fetch_floats(v_inverses.index(slot_ahead), V.inverse_weight + kv * n_k, 1, 1, ahead, end - ahead)
            if V_PER_TILE:
                v_scale_at = V.scale + v_group + (behind // V_GROUP) * V.scale_row
                fetch_floats(v_scales.index(slot_ahead), v_scale_at, V_COLUMN, 1, 0, tl.where(wanted, D, 0))
            if UNSIGNED_P:
                correction_at = V.correction + (v_tile + behind // BLOCK_N) * D
                fetch_floats(corrections.index(slot_ahead), correction_at, 1, 1, 0, tl.where(wanted, D, 0))
            async_copy.commit_group()

            if phase != 0:
                c = q_scale
                if K_PER_TILE:
                    c *= tl.load(K.scale + k_group + (start // K_GROUP) * K.scale_row).to(tl.float32)
                s = warpgroup_mma_wait(1, deps=(s,))  # P V goes on
                if K_PER_KEY:
                    s = s.to(tl.float32) * k_scales.index(slot).load(KEYS)[None, :]
                if V_PER_TOKEN:
                    # V's scale joins the exponent, so that P is rounded with its weight; l takes the weight out again
                    s = s.to(tl.float32) * c[:, None]
                    s += v_weights.index(slot).load(KEYS)[None, :]
                    c = tl.full([BLOCK_M], 1.0, tl.float32, ROWS)
                if phase != 1:
                    j = start + tl.arange(0, BLOCK_N, layout=KEYS)
                    keep = (j < n_k)[None, :]
                    if RIGHT:
                        keep = keep & (j[None, :] <= i[:, None] + (n_k - n_q + F.right))
                    s = tl.where(keep, s.to(tl.float32) * c[:, None], float("-inf"))
                    c = tl.full([BLOCK_M], 1.0, tl.float32, ROWS)

                largest = tl.max(s, 1).to(tl.float32) * c
                m = tl.maximum(m, largest)
                reference = row_reference(largest, m)
                # up by an ulp, so that no rounding gives a code beyond the largest
                reference += tl.abs(reference) * 1.1920928955078125e-07
                if phase != 1 or MAY_BE_EMPTY or JOINED:
                    # a tile with nothing in it moves nothing
                    reference = tl.where(largest == float("-inf"), r, reference)
                alpha = tl.exp2(tl.minimum(r - reference, 65.0))
                r = reference
                p = tl.exp2(s.to(tl.float32) * c[:, None] - (r - LOG2_LARGEST)[:, None])
                counted = count(p, p)
                if V_PER_TOKEN:
                    counted *= v_inverses.index(slot).load(KEYS)[None, :]
                l = l * alpha + tl.sum(counted, 1)

                # P V of the tile before; P is encoded after it, since the registers of the P that it takes must not change
                stay_behind(l)
                pv, p = warpgroup_mma_wait(0, deps=(pv, p))
                codes = tl.convert_layout(order_p(encode_p(p).to(P_TYPE), BLOCK_M, BLOCK_N), TAKEN)
                p_before = in_words(codes, BLOCK_M, BLOCK_N)
                pv = pv.to(tl.float32)
                if V_PER_TILE:
                    pv *= v_scales.index(slot).load(CHANNELS)[None, :]
                if UNSIGNED_P:
                    # what the product of codes that fit a signed unit lacks
                    pv += corrections.index(slot).load(CHANNELS)[None, :]
                if TOKENS_LAST:
                    acc = acc * tl.convert_layout(alpha_before, SUM_ROWS)[:, None] + pv
                if TOKENS_FIRST:
                    # sums of 16 bits are added up where they are
                    acc = pv * tl.convert_layout(alpha, SUM_ROWS)[:, None]
                alpha_before = alpha

    # P V of the last tile
    slot = tl.cdiv(tl.maximum(end, 0), BLOCK_N) % STAGES
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    p = tl.convert_layout(of_words(p_before, P_TYPE, BLOCK_M, BLOCK_N), TAKEN)
    if TOKENS_FIRST:
        acc = warpgroup_mma(p, v_ring.index(slot), acc)
    if TOKENS_LAST:
        pv = warpgroup_mma(p, v_ring.index(slot).permute((1, 0)), no_sums, use_acc=False).to(tl.float32)
    if V_PER_TILE:
        pv *= v_scales.index(slot).load(CHANNELS)[None, :]
    if UNSIGNED_P:
        pv += corrections.index(slot).load(CHANNELS)[None, :]
    if TOKENS_LAST:
        acc = acc * tl.convert_layout(alpha_before, SUM_ROWS)[:, None] + pv

    inverse_total = 1.0 / tl.where(l == 0.0, 1.0, l)
    o = acc * tl.convert_layout(inverse_total, SUM_ROWS)[:, None]
    column = tl.arange(0, D, layout=CHANNELS)
    if V_ON_OUTPUT:
        v_scale = tl.load(V.scale + v_group + column * V_COLUMN).to(tl.float32)
        o *= v_scale[None, :]
    if V_MEAN:
        mean = tl.load(V.offset + kv * D + column).to(tl.float32)
        o += tl.convert_layout(l * inverse_total, SUM_ROWS)[:, None] * mean[None, :]
    # a row that attends to nothing, whatever its tiles hold
    o = tl.where(tl.convert_layout(l == 0.0, SUM_ROWS)[:, None], 0.0, o)
    out_row = first + tl.arange(0, BLOCK_M, layout=SUM_ROWS)
    out_at = out + out_row.to(tl.int64)[:, None] * Out.row + column[None, :]
    tl.store(out_at, o.to(Out.data.dtype.element_ty), mask=(out_row < n_q)[:, None])
    if WITH_LSE:
        row = query * n_q + i
        lowered = tl.zeros([BLOCK_M], tl.float32, ROWS)
        if LOWERED_LOGITS:
            lowered = tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale
        # natural; -inf where a row attends to nothing
        tl.store(Lse + row, (r + tl.log2(l) - LOG2_LARGEST) * 0.6931471805599453 + lowered, mask=here)
