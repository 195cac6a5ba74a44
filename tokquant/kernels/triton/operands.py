"""The named tuples that are arguments of kernels: pointers and strides. A field is None where a kernel does not use it."""

from typing import Any, NamedTuple


class Operand(NamedTuple):
    """Codes `[B, H, N, W]`, scales and zeros, with the strides of batch, head and row; the last dimension is contiguous.

    The other tensors are contiguous float32, unless noted.
    """

    codes: Any
    batch: Any
    head: Any
    row: Any
    scale: Any
    zero: Any  # strides as scale; decoded operands: in the scale's type; else float32, the value of a stored code of 0
    scale_batch: Any
    scale_head: Any
    scale_row: Any
    offset: Any  # Q: block means [B, H, ceil(N / 128), D]; V: the mean [B, H, D]; 16 bit
    code_sum: Any  # Q: over channels [B, H, N]
    correction: Any  # V: to add to each tile's product where P is unsigned [B, H, tiles, D]
    log2_weight: Any  # V per token: log2 of the weight (V's scale) that P is multiplied by [B, H, N]; zeros are divided by it
    inverse_weight: Any  # its inverse
    logit_offset: Any  # Q: q . c [B, H, N], by which logits are too low as K is stored without an offset c
    companion: Any  # K: the keys in the input's type [B, H, N, D], for Q's block means


class Rows(NamedTuple):
    """The output `[B, H, N, D]` and its strides."""

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
    """Extremes of tiles of tokens `[B, H, tiles, columns]`, contiguous float32."""

    highest: Any  # symmetric operands: the highest magnitude
    lowest: Any = None


class Turned(NamedTuple):
    """Parameters of the transforms before quantization; contiguous, for the heads of the tensor."""

    offset: Any = None  # to subtract [B, H, rows, D], one row, or one for each 128 tokens
    balance: Any = None  # [B, H, D] float32
    fold: Any = None  # Q: K's scale per channel [B, H, D] float32
    k_offset: Any = None  # Q: the offset subtracted from K [B, H, D]
    k_origin: Any = None  # Q: the values of K's stored codes of 0 [B, H, D] float32


class Coded(NamedTuple):
    """The outputs of quantization. All but scales and zeros are contiguous."""

    codes: Any = None  # [B, H, N, D / packed], or [B, H, D, N / packed] with N padded to whole groups of 16
    scale: Any = None  # if only extremes are computed: the highest of each tile
    zero: Any = None  # strides as scale; if only extremes are computed: the lowest
    scale_batch: Any = None
    scale_head: Any = None
    scale_row: Any = None
    companion: Any = None  # K minus its offset, in its own type [B, H, N, D]
    logit_offset: Any = None  # Q: [B, H, N] float32
    code_sum: Any = None  # Q: [B, H, N] float32; V: [B, H, tiles, D] int32
    weightless: Any = None  # V per token: whether all values are zero, and the scale is finite [B, H, N] int8
    lost: Any = None  # set to 1 where a value overflows its type


class Table(NamedTuple):
    """The page table and lengths of sequences; or, if they are packed one after another, their starts."""

    table: Any = None  # [B, pages] int32: the page of each PAGE tokens
    row: Any = None  # its stride
    lengths: Any = None  # [B] int32: tokens in pages; when appending, those before the new ones
    counts: Any = None  # [B] int32: tokens to append
    newer: Any = None  # [B] int32: newer tokens that are kept outside of the pages
    starts: Any = None  # [B + 1] int32: first token of each packed sequence, and the total


class Pages(NamedTuple):
    """Codes, scales and zeros of K or V in pages `[pages, H, ...]`, contiguous within a page."""

    codes: Any  # [tokens, W]; V for 8-bit products [W, tokens], tokens permuted in groups of 16
    page: Any  # stride of a page
    sides: Any  # scales, and zeros if asymmetric: [rows, 1 or 2, columns]; a negative scale marks a token of V of all zeros
    sides_page: Any  # stride of a page; zero for static scales
    offset: Any  # V: static [H, D], 16 bit


class Features(NamedTuple):
    """The values of a call's features."""

    left: Any  # keys that a query sees before its own position,
    right: Any  # and after it
    softcap: Any
    sinks: Any  # [H], natural logits
    mask: Any  # [B, H, N_q, N_k]: bytes, nonzero where a query attends to a key; or floats to add
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_column: Any
    q_starts: Any = None  # [B + 1], the first token of each packed sequence, and the total
    k_starts: Any = None
    # ALiBi's slopes [H], a value per key [B, H, N_k], factors of queries [B, H, N_q, R], or dense [B, H, N_q, N_k]; natural
    bias: Any = None
    bias_batch: Any = None
    bias_head: Any = None
    bias_row: Any = None
    bias_column: Any = None
    k_factors: Any = None  # [B, H, N_k, R]
    k_factors_batch: Any = None
    k_factors_head: Any = None
    k_factors_row: Any = None
