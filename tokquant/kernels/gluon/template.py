"""Flash attention on Hopper, its holes filled for int8: P V of a tile runs while the softmax of the next tile is computed.

Codes, sums and their order are those of the portable kernel. Iteration j starts Q K(j) and P(j - 1) V(j - 1), which tensor
cores compute asynchronously, waits for the former alone, and adds the latter to the sums when P(j) is known: softmax never
waits for P V.

A warpgroup, which is four warps, has 64 queries. In a block of one warpgroup this copies keys and values itself. A block of two
has a third one that only copies: a producer with two consumers, which synchronize at each slot's barriers and nowhere else.
"""

import inspect
from typing import Any, NamedTuple

from tokquant.kernels.gluon import language, parts
from tokquant.kernels.gluon.language import (
    async_copy,
    barrier,
    fence_async_shared,
    mbarrier,
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
"""The imports that a generated kernel begins with."""

D = tl.constexpr(64)  # head_dim
SHARED_HEADS = tl.constexpr(1)  # heads of Q that share one of K and V
V_TOKENS = tl.constexpr(16)  # V's tokens are padded to a multiple of this
TOKENS_FIRST = tl.constexpr(False)  # V has 16 bits and is [N, D],
TOKENS_LAST = tl.constexpr(True)  # or it has 8 and is [D, N]
Q_GROUP = tl.constexpr(1)  # tokens under one scale
K_GROUP = tl.constexpr(1)
V_GROUP = tl.constexpr(1)
Q_TYPE = tl.constexpr(tl.int8)  # types of the products' operands
K_TYPE = tl.constexpr(tl.int8)
P_TYPE = tl.constexpr(tl.int8)
V_TYPE = tl.constexpr(tl.int8)
LOG2_LARGEST = tl.constexpr(6.988684686772166)  # log2 of P's largest code: P is computed in units of its codes
LOGIT_BASE = tl.constexpr(1.4426950408889634)  # log2(e)
Q_HAS_SCALE = tl.constexpr(True)  # whether it has scales that the kernel reads
K_HAS_SCALE = tl.constexpr(True)
V_HAS_SCALE = tl.constexpr(True)
Q_SCALED = tl.constexpr(True)
K_PER_KEY = tl.constexpr(True)  # K has several scales in a tile,
K_PER_TILE = tl.constexpr(False)  # or one
V_PER_TILE = tl.constexpr(False)  # V's scale is applied to each tile's product,
V_PER_TOKEN = tl.constexpr(False)  # to P,
V_ON_OUTPUT = tl.constexpr(True)  # or to the output
V_COLUMN = tl.constexpr(0)  # 1 where V has a scale per channel
V_MEAN = tl.constexpr(False)
UNSIGNED_P = tl.constexpr(False)
RIGHT = tl.constexpr(False)  # whether the keys after a query that it sees are bounded, as by causality
LOWERED_LOGITS = tl.constexpr(False)  # K is stored without an offset c, so logits are lower by scale * q . c
JOINED = tl.constexpr(False)  # whether something is added to the logits
MAY_BE_EMPTY = tl.constexpr(False)  # whether all scores of a row may be -inf, as floats can be
WITH_LSE = tl.constexpr(False)


class Head(NamedTuple):
    """A sequence, a head of Q and its head of K and V, and the index of each head among those of all sequences."""

    batch: Any
    q: Any
    kv: Any
    q_place: Any
    kv_place: Any


class Ring(NamedTuple):
    """A ring buffer of slots in shared memory. A slot has a tile's keys, the values of the tile before, and scales of both."""

    k: Any
    v: Any
    k_scales: Any
    v_weights: Any
    v_inverses: Any
    v_scales: Any
    corrections: Any
    full: Any  # with a producer, an mbarrier for each slot: its copies have arrived,
    free: Any  # and another: both consumers have read it


@triton.jit
def fill(ring, slot, K, V, head, start, n_k, end):
    # begin to copy the keys of the tile at `start` and the values of the tile before; zeros beyond the last key
    BLOCK_N: tl.constexpr = ring.k.shape[1]
    behind = start - BLOCK_N
    wanted = (behind >= 0) & (behind < end)
    values = tl.where(wanted, tl.cdiv(n_k, V_TOKENS) * V_TOKENS - behind, 0)
    channels = tl.where(wanted, D, 0)
    k_codes = K.codes + head.batch * K.batch + head.kv * K.head
    v_codes = V.codes + head.batch * V.batch + head.kv * V.head
    fetch_rows(ring.k.index(slot), k_codes + tl.cast(start, tl.int64) * K.row, K.row, end - start)
    if TOKENS_LAST:
        fetch_columns(ring.v.index(slot), v_codes + behind, V.row, values)
    if TOKENS_FIRST:
        fetch_rows(ring.v.index(slot), v_codes + tl.cast(behind, tl.int64) * V.row, V.row, values)
    if K_PER_KEY:
        k_scale = K.scale + head.batch * K.scale_batch + head.kv * K.scale_head
        fetch_floats(ring.k_scales.index(slot), k_scale, K.scale_row, K_GROUP, start, end - start)
    if V_PER_TOKEN:
        fetch_floats(ring.v_weights.index(slot), V.log2_weight + head.kv_place * n_k, 1, 1, start, end - start)
        fetch_floats(ring.v_inverses.index(slot), V.inverse_weight + head.kv_place * n_k, 1, 1, start, end - start)
    if V_PER_TILE:
        v_scale = V.scale + head.batch * V.scale_batch + head.kv * V.scale_head + (behind // V_GROUP) * V.scale_row
        fetch_floats(ring.v_scales.index(slot), v_scale, V_COLUMN, 1, 0, channels)
    if UNSIGNED_P:
        correction = V.correction + (head.kv_place * tl.cdiv(n_k, BLOCK_N) + behind // BLOCK_N) * D
        fetch_floats(ring.corrections.index(slot), correction, 1, 1, 0, channels)


@triton.jit
def produce(ring, K, V, head, n_k, end):
    # A slot is filled for each tile, and one more for the last values, or with zeros where there are no tiles.
    # `full`: a phase ends when the copies of all 128 threads are there, also of those that had nothing to copy. Tile t waits
    # for phase t // STAGES.
    # `free`: a phase ends when both consumers have read a tile. A slot is filled again after the phase of the tile that it
    # held. Before the first there is none, and a wait for the phase before phase 0 is over at once.
    # Nobody waits forever: consumers read and free every tile, whatever they see of it, and a filling waits only for the tile
    # that its slot held.
    STAGES: tl.constexpr = ring.k.shape[0]
    BLOCK_N: tl.constexpr = ring.k.shape[1]
    for tile in range(0, tl.cdiv(tl.maximum(end, 0), BLOCK_N) + 1):
        slot = tile % STAGES
        mbarrier.wait(ring.free.index(slot), (tile // STAGES - 1) & 1)
        fill(ring, slot, K, V, head, tile * BLOCK_N, n_k, end)
        async_copy.mbarrier_arrive(ring.full.index(slot), increment_count=False)


@triton.jit
def consume(q, ring, Q, K, V, Out, Lse, F, scale, n_q, n_k, head, first, end, COPIES: tl.constexpr):
    # in registers, scores and sums have the layout of tensor cores' results, P that of an operand; each warp has 16 rows
    STAGES: tl.constexpr = ring.k.shape[0]
    BLOCK_N: tl.constexpr = ring.k.shape[1]
    BLOCK_M: tl.constexpr = q.shape[0]
    SCORES: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    P_BITS: tl.constexpr = V.codes.dtype.element_ty.primitive_bitwidth
    SUMS: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 256 // P_BITS])
    TAKEN: tl.constexpr = tl.DotOperandLayout(0, SUMS, 32 // P_BITS)
    ROWS: tl.constexpr = tl.SliceLayout(1, SCORES)
    KEYS: tl.constexpr = tl.SliceLayout(0, SCORES)
    SUM_ROWS: tl.constexpr = tl.SliceLayout(1, SUMS)
    CHANNELS: tl.constexpr = tl.SliceLayout(0, SUMS)

    i = first + tl.arange(0, BLOCK_M, layout=ROWS)
    here = i < n_q
    if Q_HAS_SCALE:
        q_group = head.batch * Q.scale_batch + head.q * Q.scale_head
    if K_HAS_SCALE:
        k_group = head.batch * K.scale_batch + head.kv * K.scale_head
    if V_HAS_SCALE:
        v_group = head.batch * V.scale_batch + head.kv * V.scale_head

    q_codes = Q.codes + head.batch * Q.batch + head.q * Q.head
    fetch_rows(q, q_codes + tl.cast(first, tl.int64) * Q.row, Q.row, n_q - first)
    if COPIES:
        for ahead in tl.static_range(STAGES - 1):
            fill(ring, ahead, K, V, head, ahead * BLOCK_N, n_k, end)
            async_copy.commit_group()
    else:
        async_copy.commit_group()
        async_copy.wait_group(0)
        barrier()
    q_scale = tl.full([BLOCK_M], LOGIT_BASE, tl.float32, ROWS) * scale
    if Q_SCALED:
        q_scale *= tl.load(Q.scale + q_group + (i // Q_GROUP) * Q.scale_row, mask=here, other=0.0).to(tl.float32)

    # tiles before `edge` are visible to all of these queries, so they need no mask. It is never beyond `end`, not even if a
    # consumer has no queries, so all consumers visit and free the same tiles
    edge = n_k // BLOCK_N * BLOCK_N
    if RIGHT:
        edge = tl.minimum(edge, tl.maximum(first + n_k - n_q + F.right + 1, 0) // BLOCK_N * BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32, ROWS)  # the row's running maximum
    r = tl.zeros([BLOCK_M], tl.float32, ROWS)  # the reference that P and l are scaled to, and acc one tile later
    l = tl.zeros([BLOCK_M], tl.float32, ROWS)
    alpha_before = tl.zeros([BLOCK_M], tl.float32, ROWS)
    acc = tl.zeros([BLOCK_M, D], tl.float32, SUMS)
    # before the first tile there is none: its P is zero, and so are its values in the slot
    p_before = in_words(tl.zeros([BLOCK_M, BLOCK_N], tl.float32, TAKEN).to(P_TYPE), BLOCK_M, BLOCK_N)
    no_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if tl.int8 == Q_TYPE else tl.float32, SCORES)
    no_sums = tl.zeros([BLOCK_M, D], tl.int32 if tl.int8 == P_TYPE else tl.float32, SUMS)
    for phase in tl.static_range(1, 3):
        # 1: full tiles; 2: masked tiles at the right edge
        low = 0
        high = edge
        if phase == 2:
            low = edge
            high = end
        for start in range(low, high, BLOCK_N):
            tile = start // BLOCK_N
            slot = tile % STAGES
            if COPIES:
                # after this all threads see this slot filled, and all have read the slot of the tile before
                async_copy.wait_group(STAGES - 2)
                barrier()
            else:
                mbarrier.wait(ring.full.index(slot), tile // STAGES & 1)
            fence_async_shared()  # tensor cores see it filled too
            p = tl.convert_layout(of_words(p_before, P_TYPE, BLOCK_M, BLOCK_N), TAKEN)
            s = warpgroup_mma(q, ring.k.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            if TOKENS_LAST:
                pv = warpgroup_mma(p, ring.v.index(slot).permute((1, 0)), no_sums, use_acc=False, is_async=True)
            if TOKENS_FIRST:
                pv = warpgroup_mma(p, ring.v.index(slot), acc, is_async=True)
            if COPIES:
                # the slot of the tile before is free: fill it for a later tile
                later = tile + STAGES - 1
                fill(ring, later % STAGES, K, V, head, later * BLOCK_N, n_k, end)
                async_copy.commit_group()

            c = q_scale
            if K_PER_TILE:
                c *= tl.load(K.scale + k_group + (start // K_GROUP) * K.scale_row).to(tl.float32)
            s = warpgroup_mma_wait(1, deps=(s,))  # P V goes on
            if K_PER_KEY:
                s = s.to(tl.float32) * ring.k_scales.index(slot).load(KEYS)[None, :]
            if V_PER_TOKEN:
                # V's scale joins the exponent, so that P is rounded with its weight; the weight is taken out of l again
                s = s.to(tl.float32) * c[:, None]
                s += ring.v_weights.index(slot).load(KEYS)[None, :]
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
            # up by an ulp, so that rounding never gives a code above the largest
            reference += tl.abs(reference) * 1.1920928955078125e-07
            if phase != 1 or MAY_BE_EMPTY or JOINED:
                # a fully masked tile leaves the reference as it is
                reference = tl.where(largest == float("-inf"), r, reference)
            alpha = tl.exp2(tl.minimum(r - reference, 65.0))
            r = reference
            p = tl.exp2(s.to(tl.float32) * c[:, None] - (r - LOG2_LARGEST)[:, None])
            counted = count(p, p)
            if V_PER_TOKEN:
                counted *= ring.v_inverses.index(slot).load(KEYS)[None, :]
            l = l * alpha + tl.sum(counted, 1)

            # wait for P V of the tile before. Only then is the new P encoded, as the product reads the old one in registers
            stay_behind(l)
            pv, p = warpgroup_mma_wait(0, deps=(pv, p))
            codes = tl.convert_layout(order_p(encode_p(p).to(P_TYPE), BLOCK_M, BLOCK_N), TAKEN)
            p_before = in_words(codes, BLOCK_M, BLOCK_N)
            pv = pv.to(tl.float32)
            if V_PER_TILE:
                pv *= ring.v_scales.index(slot).load(CHANNELS)[None, :]
            if UNSIGNED_P:
                # unsigned codes of P were shifted to fit signed integers: add what the product lacks
                pv += ring.corrections.index(slot).load(CHANNELS)[None, :]
            if not COPIES:
                # synchronizes these four warps, then counts as one arrival
                mbarrier.arrive(ring.free.index(slot))
            if TOKENS_LAST:
                acc = acc * tl.convert_layout(alpha_before, SUM_ROWS)[:, None] + pv
            if TOKENS_FIRST:
                # a product of 16-bit operands accumulates in registers: pv already includes acc
                acc = pv * tl.convert_layout(alpha, SUM_ROWS)[:, None]
            alpha_before = alpha

    # P V of the last tile
    tile = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    slot = tile % STAGES
    if COPIES:
        async_copy.wait_group(0)
        barrier()
    else:
        mbarrier.wait(ring.full.index(slot), tile // STAGES & 1)
    fence_async_shared()
    p = tl.convert_layout(of_words(p_before, P_TYPE, BLOCK_M, BLOCK_N), TAKEN)
    if TOKENS_FIRST:
        acc = warpgroup_mma(p, ring.v.index(slot), acc)
    if TOKENS_LAST:
        pv = warpgroup_mma(p, ring.v.index(slot).permute((1, 0)), no_sums, use_acc=False).to(tl.float32)
    if V_PER_TILE:
        pv *= ring.v_scales.index(slot).load(CHANNELS)[None, :]
    if UNSIGNED_P:
        pv += ring.corrections.index(slot).load(CHANNELS)[None, :]
    if TOKENS_LAST:
        acc = acc * tl.convert_layout(alpha_before, SUM_ROWS)[:, None] + pv

    inverse_total = 1.0 / tl.where(l == 0.0, 1.0, l)
    o = acc * tl.convert_layout(inverse_total, SUM_ROWS)[:, None]
    column = tl.arange(0, D, layout=CHANNELS)
    if V_ON_OUTPUT:
        v_scale = tl.load(V.scale + v_group + column * V_COLUMN).to(tl.float32)
        o *= v_scale[None, :]
    if V_MEAN:
        mean = tl.load(V.offset + head.kv_place * D + column).to(tl.float32)
        o += tl.convert_layout(l * inverse_total, SUM_ROWS)[:, None] * mean[None, :]
    # 0 for a row that attends to nothing, even if V is not finite
    o = tl.where(tl.convert_layout(l == 0.0, SUM_ROWS)[:, None], 0.0, o)
    out_row = first + tl.arange(0, BLOCK_M, layout=SUM_ROWS)
    out_at = Out.data + head.batch * Out.batch + head.q * Out.head + out_row.to(tl.int64)[:, None] * Out.row + column[None, :]
    tl.store(out_at, o.to(Out.data.dtype.element_ty), mask=(out_row < n_q)[:, None])
    if WITH_LSE:
        row = head.q_place * n_q + i
        lowered = tl.zeros([BLOCK_M], tl.float32, ROWS)
        if LOWERED_LOGITS:
            lowered = tl.where(l == 0.0, 0.0, tl.load(Q.logit_offset + row, mask=here, other=0.0) * scale)
        # natural logarithm; -inf for a row that attends to nothing
        tl.store(Lse + row, tl.fma(r + tl.log2(l) - LOG2_LARGEST, 0.6931471805599453, lowered), mask=here)


@triton.jit
def attention(Q, K, V, Out, Lse, F, scale, n_q, n_k, heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    q_head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if RIGHT:
        # the longest programs start first, to end together: the last queries, which see most keys, of a group of heads
        place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        batch = (place // heads).to(tl.int64)
        q_head = (place % heads).to(tl.int64)
        block = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = q_head // SHARED_HEADS
    head = Head(batch, q_head, kv_head, batch * heads + q_head, batch * (heads // SHARED_HEADS) + kv_head)
    first = block * BLOCK_M
    # keys before `end` are visible to some of these queries
    end = n_k
    if RIGHT:
        # bottom-right: the last query sees the last key
        end = tl.minimum(n_k, tl.minimum(first + BLOCK_M, n_q) + n_k - n_q + F.right)

    q = tl.allocate_shared_memory(Q_TYPE, [BLOCK_M // 64, 64, D], tl.NVMMASharedLayout.get_default_for([64, D], Q_TYPE))
    K_TILE: tl.constexpr = tl.NVMMASharedLayout.get_default_for([BLOCK_N, D], K_TYPE)
    k = tl.allocate_shared_memory(K_TYPE, [STAGES, BLOCK_N, D], K_TILE)
    if TOKENS_LAST:
        V_TURNED: tl.constexpr = tl.NVMMASharedLayout.get_default_for([D, BLOCK_N], V_TYPE)
        v = tl.allocate_shared_memory(V_TYPE, [STAGES, D, BLOCK_N], V_TURNED)
    if TOKENS_FIRST:
        V_TILE: tl.constexpr = tl.NVMMASharedLayout.get_default_for([BLOCK_N, D], V_TYPE)
        v = tl.allocate_shared_memory(V_TYPE, [STAGES, BLOCK_N, D], V_TILE)
    # the compiler removes the allocations that nothing reads or writes
    FLAT: tl.constexpr = tl.SwizzledSharedLayout(1, 1, 1, [0])
    k_scales = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
    v_weights = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
    v_inverses = tl.allocate_shared_memory(tl.float32, [STAGES, BLOCK_N], FLAT)
    v_scales = tl.allocate_shared_memory(tl.float32, [STAGES, D], FLAT)
    corrections = tl.allocate_shared_memory(tl.float32, [STAGES, D], FLAT)
    full = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ring = Ring(k, v, k_scales, v_weights, v_inverses, v_scales, corrections, full, free)

    if BLOCK_M == 64:
        consume(q.index(0), ring, Q, K, V, Out, Lse, F, scale, n_q, n_k, head, first, end, True)
    else:
        for slot in tl.static_range(STAGES):
            mbarrier.init(full.index(slot), 128)
            mbarrier.init(free.index(slot), 2)
        # warp_specialize synchronizes all threads first, so all see these barriers initialized. Three threads, one of each
        # warpgroup, have 504 registers together: 240 for the second, 24 for the third, so 240 are left for the first
        tl.warp_specialize(
            [
                (consume, (q.index(0), ring, Q, K, V, Out, Lse, F, scale, n_q, n_k, head, first, end, False)),
                (consume, (q.index(1), ring, Q, K, V, Out, Lse, F, scale, n_q, n_k, head, first + 64, end, False)),
                (produce, (ring, K, V, head, n_k, end)),
            ],
            worker_num_warps=[4, 4],
            worker_num_regs=[240, 24],
        )


KERNEL = (fill, produce, consume)
"""Functions that are part of the kernel."""
