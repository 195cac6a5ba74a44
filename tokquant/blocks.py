"""The memory layout of K and V for the vector units of CPUs: panels of 16 columns, with a 32-bit word of each side by side.

A product of `[rows, depth]` and `[depth, columns]` reads its second operand sequentially. For K the columns are tokens and the
depth is channels; for V it is the other way round. A 32-bit word holds consecutive codes of one column along the depth, and 16
words, one for each column, fill a register. In a word, 8-bit codes are the bytes. With fewer bits, the first four codes are in
the lowest bits of the four bytes, the next four in the bits above: shifting and masking a register gives bytes in the order of
8-bit codes.
"""

import torch
from torch import Tensor

from tokquant.precisions import Precision

LANES = 16
"""Columns of a panel: the 32-bit words of the widest register."""


def bits_of(precision: Precision, stored: torch.dtype, as_bytes: bool) -> int:
    """Bits of a code in a panel: as stored, or 8 if it is multiplied as a byte and decoded values need more bits."""
    bits = 8 * stored.itemsize // precision.packed
    if as_bytes and bits < 8:
        values = precision.values()
        return bits if values.min() >= -(2 ** (bits - 1)) and values.max() < 2 ** (bits - 1) else 8
    return bits


def patterns(codes: Tensor, precision: Precision, bits: int, as_bytes: bool, role: str) -> Tensor:
    """Bit patterns of unpacked codes `[..., D]`, as unsigned numbers of `bits` bits in uint8, int16 or int32.

    If a product takes the operand as bytes, a pattern is the decoded integer: for V in two's complement, for K counted from the
    lowest value. The unit multiplies unsigned bytes with signed ones, and P is unsigned. Other codes stay as they are.
    """
    if bits > 8:
        return codes.view(torch.int16 if bits == 16 else torch.int32)
    if as_bytes:
        codes = precision.decode(codes).to(torch.int8)
    raw = codes.view(torch.uint8) & (2**bits - 1)
    return raw ^ 2 ** (bits - 1) if as_bytes and role == "k" else raw


def table(precision: Precision) -> Tensor:
    """The decoded float32 value of each pattern of at most 8 bits, for operands that are not multiplied as bytes."""
    bits = 8 // precision.packed
    stored = torch.arange(256, dtype=torch.uint8, device="cpu").view(precision.stored)
    codes = precision.unpack(stored[:, None], precision.packed).flatten()
    values = torch.zeros(2**bits, dtype=torch.float32, device="cpu")
    values[(codes.view(torch.uint8) & (2**bits - 1)).long()] = precision.decode(codes)
    return values


def decoded(raw: Tensor, precision: Precision, stored: torch.dtype, bits: int, as_bytes: bool, role: str) -> Tensor:
    """The float32 values of patterns that `patterns` made."""
    if bits > 8:
        return raw.view(stored).float()
    if as_bytes:
        low = 2 ** (bits - 1)
        return ((raw if role == "k" else raw ^ low).to(torch.int16) - low).float()
    return table(precision).to(raw.device)[raw.long()]


def of_keys(raw: Tensor, bits: int) -> Tensor:
    """K's patterns in panels: `[B, H, N, D] -> [B, H, ceil(N / 16), words, 16]` int32."""
    return _words(raw, bits)


def of_values(raw: Tensor, bits: int, tile: int) -> Tensor:
    """V's patterns in panels, by key tile: `[B, H, N, D] -> [B, H, ceil(N / tile), ceil(D / 16), words, 16]` int32."""
    padded = torch.nn.functional.pad(raw, (0, 0, 0, -raw.shape[2] % tile))
    return _words(padded.unflatten(2, (-1, tile)).mT, bits)


def keys_of(words: Tensor, bits: int, n: int, d: int) -> Tensor:
    """The inverse of `of_keys`: `[B, H, n, d]`."""
    return _patterns(words, bits)[..., :n, :d]


def values_of(words: Tensor, bits: int, n: int, d: int) -> Tensor:
    """The inverse of `of_values`: `[B, H, n, d]`."""
    return _patterns(words, bits)[..., :d, :].mT.flatten(2, 3)[:, :, :n]


def panels(x: Tensor) -> Tensor:
    """Floats in panels: `[..., columns, depth] -> [..., ceil(columns / 16), depth, 16]`, padded with zeros."""
    return _words(x.float().view(torch.int32), 32).view(torch.float32)


def _words(raw: Tensor, bits: int) -> Tensor:
    """`[..., columns, depth] -> [..., panels, words, 16]`, both dimensions padded with zeros."""
    *_, columns, depth = raw.shape
    raw = torch.nn.functional.pad(raw, (0, -depth % (32 // bits), 0, -columns % LANES))
    if bits < 8:
        planes = raw.unflatten(-1, (-1, 8 // bits, 4)).unbind(-2)
        raw = sum(plane << (bits * place) for place, plane in enumerate(planes)).flatten(-2)
    return raw.contiguous().view(torch.int32).unflatten(-2, (-1, LANES)).mT.contiguous()


def _patterns(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`, with the padding."""
    # clone, since with a single word per column `contiguous` would keep these strides
    columns = words.mT.flatten(-3, -2).clone(memory_format=torch.contiguous_format)
    if bits >= 8:
        return columns.view({8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits])
    lines = columns.view(torch.uint8).unflatten(-1, (-1, 1, 4))
    planes = [(lines >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(planes, dim=-2).flatten(-3)
