"""The template of quantization kernels, its holes filled for int8 per token; runs as it is.

One program takes a tile of tokens of one head. Results are bitwise those of `tokquant.quantize`: divisions are IEEE's, and
launches disable FMA contraction, as torch rounds a product before it adds.
"""

from tokquant.kernels.triton.parts import group_max, group_max_magnitude, hadamard
from tokquant.kernels.triton.scales import fused
from tokquant.kernels.triton.scales import in_order as order_tokens
from tokquant.kernels.triton.scales import nearest as round_scale
from tokquant.precisions.base import tl, triton
from tokquant.precisions.fp16 import encode_tile as encode_own
from tokquant.precisions.fp32 import encode_tile as encode_scale
from tokquant.precisions.int8 import decode_tile as decode
from tokquant.precisions.int8 import quantize_tile as encode

D = tl.constexpr(64)  # head_dim
D_TILE = tl.constexpr(64)  # the next power of two
OFFSET = tl.constexpr(False)
OFFSET_TOKENS = tl.constexpr(2**30)  # tokens under one offset
COMPANION = tl.constexpr(False)  # also write K minus its offset, in its own type
BALANCED = tl.constexpr(False)
ROTATED = tl.constexpr(False)
STAGES = tl.constexpr(0)  # butterfly stages
NORM = tl.constexpr(1.0)
FOLDED = tl.constexpr(False)  # K's scale per channel is multiplied into Q
LOGITS = tl.constexpr(False)  # also write what Q's logits lack:
K_OFFSET = tl.constexpr(False)  # q times the offset of K,
K_ORIGIN = tl.constexpr(False)  # and times the values of K's codes of 0, per channel
EXTREMES = tl.constexpr(True)  # compute the extremes of each group of the tile
ONLY_EXTREMES = tl.constexpr(False)  # first pass for a scale that covers more than a tile
SCALE_HERE = tl.constexpr(True)  # the scale is computed from these extremes,
SCALE_GIVEN = tl.constexpr(False)  # or loaded
CODES = tl.constexpr(True)
SCALED = tl.constexpr(True)
STATIC = tl.constexpr(False)  # scales are calibrated, so values may be far out of range
SYMMETRIC = tl.constexpr(True)
ASYMMETRIC = tl.constexpr(False)
GROUP_TOKENS = tl.constexpr(1)  # tokens of the tile under one scale
GROUP_CHANNELS = tl.constexpr(64)
SCALE_TOKENS = tl.constexpr(1)  # tokens of the sequence under one scale
SCALE_COLUMNS = tl.constexpr(1)  # scales of a token, one for each group of channels
LARGEST = tl.constexpr(127.0)  # R
LEVELS = tl.constexpr(255.0)  # steps of an asymmetric operand
HALF = tl.constexpr(0)  # a stored code of 0 is this many steps above an asymmetric operand's zero
SCALE_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal number of its type
SCALE_LARGEST = tl.constexpr(3.4028234663852886e38)
CHECK_SCALE = tl.constexpr(False)  # flag scales that overflow their type
CHECK_FP16 = tl.constexpr(False)  # flag values that overflow fp16
PACKED = tl.constexpr(1)  # codes in a stored element
WIDTH = tl.constexpr(64)  # stored elements of a token
RAGGED = tl.constexpr(False)  # the last stored element of a token is not full
LAST = tl.constexpr(255)  # mask of its bits
BYTES = tl.constexpr(True)
CANONICAL = tl.constexpr(True)  # codes are [N, D],
TOKENS_LAST = tl.constexpr(False)  # or [D, N] with N padded to whole groups of 16 elements,
SEQUENCES = tl.constexpr(False)  # (tokens are sequences of different lengths, packed one after another)
SEQUENCE_ROWS = tl.constexpr(1)  # (rows of scales added per sequence; 0 for V per token, where attention reads weights)
PAGED = tl.constexpr(False)  # or in pages, from any token on
PAGE = tl.constexpr(128)  # tokens of a page
PAGE_GROUPS = tl.constexpr(128)  # rows of scales of a page
COUNTED = tl.constexpr(False)  # whether sequences append different numbers of tokens
ROW = tl.constexpr(64)  # elements of a page from one token to the next,
COLUMN = tl.constexpr(1)  # and from one element of a token to the next
VALUES = tl.constexpr(False)  # decode the stored codes, for what follows
VALUE_TYPE = tl.constexpr(tl.int32)  # the type that they are summed in
CODE_SUM = tl.constexpr(False)  # Q: sum them over channels
TILE_SUMS = tl.constexpr(False)  # V: sum them over each SUM_TOKENS tokens
SUM_TOKENS = tl.constexpr(64)
WEIGHTED = tl.constexpr(False)  # V per token: mark tokens that are all zero,
WEIGHT_APART = tl.constexpr(False)  # in a tensor of their own,
WEIGHT_IN_SIGN = tl.constexpr(False)  # or by a negative scale
SCALE_STORED = tl.constexpr(True)  # store the scale unchanged


@triton.jit
def finish(highest, lowest, kept, Y, scale_at):
    # extremes to scales and zeros, stored where `kept`; returns them as rounded to their types, for the codes
    zero = lowest
    if SYMMETRIC:
        exact = tl.where(highest == 0.0, 1.0, tl.div_rn(highest, LARGEST))
    if ASYMMETRIC:
        # a zero that overflows its type becomes NaN
        zero = tl.where(tl.abs(lowest) > SCALE_LARGEST, float("nan"), lowest)
        stored_zero = encode_scale(zero)
        zero = tl.where(zero == zero, stored_zero.to(tl.float32), zero)
        exact = tl.div_rn(highest - zero, LEVELS)
        # if the zero was rounded above the maximum, the scale becomes the smallest
        exact = tl.where(exact < 0.0, 0.0, exact)
    scale = round_scale(exact)
    # the interpreter casts an fp8 NaN to a number
    scale = tl.where(scale == scale, encode_scale(scale).to(tl.float32), scale)
    scale = tl.where(scale < SCALE_SMALLEST, SCALE_SMALLEST, scale)
    if CHECK_SCALE:
        holds = kept & (tl.abs(highest) < float("inf"))
        if SYMMETRIC:
            lost = holds & (exact < float("inf")) & ~(scale < float("inf"))
        if ASYMMETRIC:
            lost = holds & (tl.abs(lowest) < float("inf")) & ~(scale < float("inf"))
        tl.store(Y.lost, 1, mask=tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0)
    if SCALE_STORED:
        tl.store(Y.scale + scale_at, encode_scale(scale), mask=kept)
    if ASYMMETRIC:
        tl.store(Y.zero + scale_at, stored_zero, mask=kept)
    return scale, zero


@triton.jit
def quantize(X, F, Y, T, n, TOKENS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    plane = batch * tl.num_programs(1) + head
    home = batch  # batch index, or page, that scales and codes are stored at
    first = tl.program_id(0) * TOKENS
    place = tl.arange(0, TOKENS)
    own = n
    if PAGED:
        # tiles are aligned within pages, so the first may begin before the first new token
        start = tl.load(T.lengths + batch)
        if COUNTED:
            n = tl.load(T.counts + batch)
        own = n + start
        first += start // TOKENS * TOKENS
        home = tl.load(T.table + batch * T.row + first // PAGE, mask=first < own, other=0).to(tl.int64)
    if SEQUENCES:
        start = tl.load(T.starts + batch)
        own = tl.load(T.starts + batch + 1) - start
        sequences = tl.num_programs(2)
        if first >= own:
            return
    i = first + order_tokens(place, PACKED)
    here = i < own
    if PAGED:
        here = here & (i >= start)
    row = plane * n + i
    if SEQUENCES:
        row = head * n + start + i
    column = tl.arange(0, D_TILE)
    held = column < D
    there = here[:, None] & held[None, :]

    x_at = X.data + batch * X.batch + head * X.head
    if PAGED:
        x_at -= start.to(tl.int64) * X.row
    if SEQUENCES:
        x_at += start.to(tl.int64) * X.row
    x_at += i.to(tl.int64)[:, None] * X.row + column.to(tl.int64)[None, :] * X.column
    x = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
    y = x
    if OFFSET:
        offset_at = F.offset + (plane * tl.cdiv(n, OFFSET_TOKENS) + first // OFFSET_TOKENS) * D
        y -= tl.load(offset_at + column, mask=held, other=0.0).to(tl.float32)[None, :]
    if COMPANION:
        tl.store(Y.companion + row[:, None] * D + column[None, :], encode_own(y), mask=there)
    if BALANCED:
        y *= tl.load(F.balance + plane * D + column, mask=held, other=0.0)[None, :]
    if ROTATED:
        y = hadamard(y, TOKENS, D_TILE, STAGES) * NORM
    if LOGITS:
        logits = tl.zeros([TOKENS], tl.float32)
    if K_OFFSET:
        k_offset = tl.load(F.k_offset + plane * D + column, mask=held, other=0.0).to(tl.float32)
        logits += tl.sum(x * k_offset[None, :], 1)
    if K_ORIGIN:
        k_origin = tl.load(F.k_origin + plane * D + column, mask=held, other=0.0)
        logits += tl.sum(y * k_origin[None, :], 1)
    if LOGITS:
        tl.store(Y.logit_offset + row, logits, mask=here)
    if FOLDED:
        y *= tl.load(F.fold + plane * D + column, mask=held, other=0.0)[None, :]

    if SCALED:
        # [groups of tokens, groups of channels]
        group = (first + order_tokens(tl.arange(0, TOKENS // GROUP_TOKENS) * GROUP_TOKENS, PACKED)) // SCALE_TOKENS
        part = tl.arange(0, D_TILE // GROUP_CHANNELS)
        kept = (group * SCALE_TOKENS < own)[:, None] & (part < SCALE_COLUMNS)[None, :]
        if PAGED:
            kept = kept & ((group + 1) * SCALE_TOKENS > start)[:, None]
            group = group % PAGE_GROUPS
        if SEQUENCES:
            home = 0
            group += start // SCALE_TOKENS + SEQUENCE_ROWS * batch
        scale_at = home * Y.scale_batch + head * Y.scale_head
        scale_at += group.to(tl.int64)[:, None] * Y.scale_row + part[None, :]
    if EXTREMES:
        if SYMMETRIC:
            highest = group_max_magnitude(y, there, TOKENS, GROUP_TOKENS, D_TILE, GROUP_CHANNELS)
            lowest = highest  # unused
        if ASYMMETRIC:
            highest = group_max(y, there, TOKENS, GROUP_TOKENS, D_TILE, GROUP_CHANNELS)
            lowest = -group_max(-y, there, TOKENS, GROUP_TOKENS, D_TILE, GROUP_CHANNELS)
    if ONLY_EXTREMES:
        tl.store(Y.scale + scale_at, highest, mask=kept)
        if ASYMMETRIC:
            tl.store(Y.zero + scale_at, lowest, mask=kept)
    if SCALE_HERE:
        scale, zero = finish(highest, lowest, kept, Y, scale_at)
    if SCALE_GIVEN:
        scale = tl.load(Y.scale + scale_at, mask=kept, other=1.0)
        if ASYMMETRIC:
            zero = tl.load(Y.zero + scale_at, mask=kept, other=0.0)

    if CODES:
        if SCALED:
            # y / scale, correctly rounded, without a division per element: multiply by the reciprocal, then correct once by the
            # remainder (Brisebarre, Muller and Raina 2004). `unit` keeps the remainder from being subnormal where |y / scale|
            # is 2^-40 or more; y and the reciprocal are negated, so that a zero keeps its sign
            y = y.reshape(TOKENS // GROUP_TOKENS, GROUP_TOKENS, D_TILE // GROUP_CHANNELS, GROUP_CHANNELS)
            unit = tl.where(scale > 4.6e18, 5.421010862427522e-20, tl.where(scale < 2.2e-19, 1.8446744073709552e19, 1.0))
            if ASYMMETRIC:
                y -= zero[:, None, :, None]
            y *= -unit[:, None, :, None]
            divisor = scale * unit
            inverse = tl.broadcast_to(tl.div_rn(-1.0, divisor)[:, None, :, None], y.shape)
            if STATIC:
                # prevents overflow; keeps NaN
                reach = (divisor * 1099511627776.0)[:, None, :, None]
                y = tl.clamp(y, -reach, reach, propagate_nan=tl.PropagateNan.ALL)
            # a finite number divided by an infinite scale is zero
            divisor = tl.broadcast_to(tl.where(divisor < float("inf"), divisor, 0.0)[:, None, :, None], y.shape)
            quotient = y * inverse
            y = fused(fused(quotient, divisor, y), inverse, quotient)
            if SYMMETRIC:
                y = tl.clamp(y, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
            if ASYMMETRIC:
                y = tl.clamp(y, 0.0, LEVELS, propagate_nan=tl.PropagateNan.ALL)
                # round to the nearest integer, half to even, before HALF is subtracted, which could round too
                y = (y + 12582912.0) - 12582912.0 - HALF
            y = y.reshape(TOKENS, D_TILE)
        if CHECK_FP16:
            lost = there & (tl.abs(y) < float("inf")) & (tl.abs(y) >= 65520.0)
            tl.store(Y.lost, 1, mask=tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0)
        if TOKENS_LAST:
            # [elements, D, tokens of an element]; padded with the code of zero
            y = tl.where(here[:, None], y, 0.0).reshape(TOKENS // PACKED, PACKED, D_TILE)
            y = tl.permute(y, 0, 2, 1).reshape(TOKENS // PACKED, D_TILE * PACKED)
        stored = encode(y)
        if VALUES:
            values = decode(stored).to(VALUE_TYPE)
            if TOKENS_LAST:
                values = tl.permute(values.reshape(TOKENS // PACKED, D_TILE, PACKED), 0, 2, 1)
            values = tl.where(there, values.reshape(TOKENS, D_TILE), 0)
        if BYTES:
            stored = stored.to(tl.uint8, bitcast=True)
        if RAGGED:
            last = tl.arange(0, D_TILE // PACKED) == WIDTH - 1
            stored = tl.where(last[None, :], stored & LAST, stored)
        if CANONICAL:
            element = tl.arange(0, D_TILE // PACKED)
            code_at = Y.codes + row[:, None] * WIDTH + element[None, :]
            tl.store(code_at, stored, mask=here[:, None] & (element < WIDTH)[None, :])
        if PAGED:
            element = tl.arange(0, D_TILE // PACKED)
            code_at = Y.codes + (home * tl.num_programs(1) + head) * (PAGE * WIDTH)
            code_at += (first % PAGE + place)[:, None] * ROW + element[None, :] * COLUMN
            tl.store(code_at, stored, mask=here[:, None] & (element < WIDTH)[None, :])
        if TOKENS_LAST:
            elements = tl.cdiv(own, 16 * PACKED) * 16
            element = first // PACKED + tl.arange(0, TOKENS // PACKED)
            code_row = (plane * D + column) * elements
            if SEQUENCES:
                code_row = (head * D + column) * (n // (16 * PACKED) + sequences) * 16 + (start // (16 * PACKED) + batch) * 16
            code_at = Y.codes + code_row[:, None] + element[None, :]
            tl.store(code_at, tl.trans(stored), mask=held[:, None] & (element < elements)[None, :])
        if CODE_SUM:
            tl.store(Y.code_sum + row, tl.sum(values, 1).to(tl.float32), mask=here)
        if TILE_SUMS:
            tile = first // SUM_TOKENS + tl.arange(0, TOKENS // SUM_TOKENS)
            sums = tl.sum(values.reshape(TOKENS // SUM_TOKENS, SUM_TOKENS, D_TILE), 1)
            sum_row = plane * tl.cdiv(own, SUM_TOKENS) + tile
            if SEQUENCES:
                sum_row = head * (n // SUM_TOKENS + sequences) + start // SUM_TOKENS + batch + tile
            sum_at = Y.code_sum + sum_row[:, None] * D + column[None, :]
            tl.store(sum_at, sums, mask=(tile * SUM_TOKENS < own)[:, None] & held[None, :])
        if WEIGHTED:
            something = tl.max((there & (values + HALF != 0)).to(tl.int32), 1)
            # a token with NaN has codes of zero too, but its scale is not finite
            weightless = (something == 0) & (scale.reshape(TOKENS) < float("inf"))
        if WEIGHT_APART:
            tl.store(Y.weightless + row, weightless.to(tl.int8), mask=here)
        if WEIGHT_IN_SIGN:
            weightless = weightless[:, None]
            tl.store(Y.scale + scale_at, encode_scale(tl.where(weightless, -scale, scale)), mask=kept)


KERNEL = (finish,)
"""Functions that are part of the kernel, where it computes scales."""
