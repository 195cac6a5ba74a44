"""Tensors as a kernel sees them: pointers and strides, one argument each. None where a kernel has no such thing."""

from typing import Any, NamedTuple


class Operand(NamedTuple):
    """Codes `[B, H, N, W]`, scales and zeros, with the strides of batch, head and row; the last dimension is contiguous.

    What follows them is contiguous float32, if not said otherwise.
    """

    codes: Any
    batch: Any
    head: Any
    row: Any
    scale: Any
    zero: Any  # strides as scale; decoded operands: in the scale's type, else float32 and what a stored code of 0 stands for
    scale_batch: Any
    scale_head: Any
    scale_row: Any
    offset: Any  # Q: block means [B, H, ceil(N / 128), D]; V: the mean [B, H, D]; 16 bit
    code_sum: Any  # Q: over channels [B, H, N]
    correction: Any  # V: what each tile's product lacks where P is unsigned [B, H, tiles, D]
    log2_weight: Any  # V per token: of what P is multiplied by [B, H, N], what takes it out again, and zeros less their weight
    inverse_weight: Any
    logit_offset: Any  # Q: q . c [B, H, N], which the logits lack
    companion: Any  # K: the keys in the input's type [B, H, N, D], for Q's block means


class Rows(NamedTuple):
    """A tensor `[B, H, N, D]` that is written."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Source(NamedTuple):
    """A tensor `[B, H, N, D]` that is quantized, and its strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Extremes(NamedTuple):
    """Of tiles of tokens `[B, H, tiles, columns]`, contiguous float32."""

    highest: Any  # symmetric operands: of magnitudes
    lowest: Any = None


class Turned(NamedTuple):
    """What is done to it first; contiguous, for the heads of that tensor."""

    offset: Any = None  # [B, H, rows, D], one or a row for each 128 tokens
    balance: Any = None  # [B, H, D] float32
    fold: Any = None  # Q: K's scale per channel [B, H, D] float32
    k_offset: Any = None  # Q: what K has lost [B, H, D]
    k_origin: Any = None  # Q: what K's stored codes of 0 stand for [B, H, D] float32


class Coded(NamedTuple):
    """What comes of it. All but scales and zeros are contiguous."""

    codes: Any = None  # [B, H, N, D / packed], or [B, H, D, N / packed] with N padded to whole groups of 16
    scale: Any = None  # where only extremes are wanted: the highest of each tile
    zero: Any = None  # strides as scale; there the lowest
    scale_batch: Any = None
    scale_head: Any = None
    scale_row: Any = None
    companion: Any = None  # K: less its offset, in its own type [B, H, N, D]
    logit_offset: Any = None  # Q: [B, H, N] float32
    code_sum: Any = None  # Q: [B, H, N] float32; V: [B, H, tiles, D] int32
    weightless: Any = None  # V per token: whether all codes are zero, of a scale that is a number [B, H, N] int8
    lost: Any = None  # set to 1 where a type does not hold a value


class Table(NamedTuple):
    """Where the tokens of sequences lie in pages."""

    table: Any = None  # [B, pages] int32: the page of each PAGE tokens
    row: Any = None  # its stride
    lengths: Any = None  # [B] int32: tokens of each sequence; where tokens are appended, those before them
    counts: Any = None  # [B] int32: how many are appended
    newer: Any = None  # [B] int32: how many follow elsewhere
    starts: Any = None  # [B + 1] int32: where sequences begin that lie one after another


class Pages(NamedTuple):
    """Codes, scales and zeros of K or V in pages `[pages, H, ...]`, contiguous but for the stride of a page."""

    codes: Any  # K [tokens, W], and V for products of 16 bits; V for those of 8 bits [W, tokens], permuted in groups of 16
    page: Any
    sides: Any  # scales and, where there are zeros, zeros: [rows, 1 or 2, columns]; below zero: a token of V that is all zeros
    sides_page: Any  # zero where they are static
    offset: Any  # V: static [H, D], 16 bit


class Features(NamedTuple):
    """What was asked for beside the operands."""

    left: Any  # keys seen before and after a query's own place
    right: Any
    softcap: Any
    sinks: Any  # [H], natural logits
    mask: Any  # [B, H, N_q, N_k], bytes that are not zero where a pair attends, or floats to add
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_column: Any
    q_starts: Any = None  # [B + 1], where each sequence begins
    k_starts: Any = None
    # slopes [H], a vector of keys [B, H, N_k], factors [B, H, N_q, R] of queries, or floats [B, H, N_q, N_k]; natural logits
    bias: Any = None
    bias_batch: Any = None
    bias_head: Any = None
    bias_row: Any = None
    bias_column: Any = None
    k_factors: Any = None  # [B, H, N_k, R]
    k_factors_batch: Any = None
    k_factors_head: Any = None
    k_factors_row: Any = None
