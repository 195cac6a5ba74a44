"""Tensors as a kernel sees them: pointers and strides, one argument each. None where a scheme has no such thing."""

from typing import Any, NamedTuple


class Operand(NamedTuple):
    """Codes `[B, H, N, W]` and scales, with the strides of batch, head and row; the last dimension is contiguous."""

    codes: Any
    batch: Any
    head: Any
    row: Any
    scale: Any
    scale_batch: Any
    scale_head: Any
    scale_row: Any
    offset: Any  # V: the mean [B, H, D]; Q: q . c [B, H, N], which the logits lack
    code_sum: Any  # V: sums over each key tile [B, H, tiles, D]
    weight: Any  # V per token: what P is multiplied by [B, H, N]


class Rows(NamedTuple):
    """A tensor `[B, H, N, D]` that is written."""

    data: Any
    batch: Any
    head: Any
    row: Any
