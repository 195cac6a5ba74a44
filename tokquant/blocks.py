"""How K and V lie in memory for vector units of CPUs: in panels of 16 columns, 32 bits of each side by side.

A product of `[rows, depth]` and `[depth, columns]` reads the second one from end to end. Columns are K's tokens and V's
channels, depth is the other; a word of 32 bits holds what of a column's depth fits into it, and 16 of them, one a column, fill
a register. Codes of 8 bits lie in a word byte by byte. Of those with fewer, the first four lie in the lowest bits of the bytes,
the next four in the bits above: what a register holds is shifted and masked to bytes that lie as codes of 8 bits do.
"""

import torch
from torch import Tensor

from tokquant.precisions import Precision

LANES = 16
"""Columns of a panel: 32-bit numbers in the widest register."""


def bits_of(precision: Precision, stored: torch.dtype, as_bytes: bool) -> int:
    """Bits that a code takes: those it is stored in, or a byte where what it stands for, as a byte, does not fit them."""
    bits = 8 * stored.itemsize // precision.packed
    if as_bytes and bits < 8:
        reach = precision.values()
        return bits if reach.min() >= -(2 ** (bits - 1)) and reach.max() < 2 ** (bits - 1) else 8
    return bits


def patterns(codes: Tensor, precision: Precision, bits: int, as_bytes: bool, role: str) -> Tensor:
    """Codes `[..., D]`, one an element, as unsigned numbers of so many bits, held as uint8, or as int16 or int32.

    What a product takes as bytes is the number itself: V's in two's complement, K's counted from the lowest, as the unit
    multiplies unsigned bytes with signed ones, and P is unsigned. Other codes are taken as they are.
    """
    if bits > 8:
        return codes.view(torch.int16 if bits == 16 else torch.int32)
    if as_bytes:
        codes = precision.decode(codes).to(torch.int8)
    raw = codes.view(torch.uint8) & (2**bits - 1)
    return raw ^ 2 ** (bits - 1) if as_bytes and role == "k" else raw


def table(precision: Precision) -> Tensor:
    """What each pattern of at most 8 bits stands for, float32, where it is not multiplied as a byte."""
    bits = 8 // precision.packed
    stored = torch.arange(256, dtype=torch.uint8, device="cpu").view(precision.stored)
    codes = precision.unpack(stored[:, None], precision.packed).flatten()
    values = torch.zeros(2**bits, dtype=torch.float32, device="cpu")
    values[(codes.view(torch.uint8) & (2**bits - 1)).long()] = precision.decode(codes)
    return values


def decoded(raw: Tensor, precision: Precision, stored: torch.dtype, bits: int, as_bytes: bool, role: str) -> Tensor:
    """The float32 numbers that `patterns` stand for."""
    if bits > 8:
        return raw.view(stored).float()
    if as_bytes:
        low = 2 ** (bits - 1)
        return ((raw if role == "k" else raw ^ low).to(torch.int16) - low).float()
    return table(precision).to(raw.device)[raw.long()]


def of_keys(raw: Tensor, bits: int) -> Tensor:
    """K's patterns `[B, H, N, D] -> [B, H, ceil(N / 16), words, 16]` int32."""
    return _words(raw, bits)


def of_values(raw: Tensor, bits: int, tile: int) -> Tensor:
    """V's patterns `[B, H, N, D] -> [B, H, ceil(N / tile), ceil(D / 16), words, 16]`: each tile of keys by itself."""
    padded = torch.nn.functional.pad(raw, (0, 0, 0, -raw.shape[2] % tile))
    return _words(padded.unflatten(2, (-1, tile)).mT, bits)


def keys_of(words: Tensor, bits: int, n: int, d: int) -> Tensor:
    """The inverse of `of_keys`: `[B, H, n, d]`."""
    return _patterns(words, bits)[..., :n, :d]


def values_of(words: Tensor, bits: int, n: int, d: int) -> Tensor:
    """The inverse of `of_values`: `[B, H, n, d]`."""
    return _patterns(words, bits)[..., :d, :].mT.flatten(2, 3)[:, :, :n]


def panels(x: Tensor) -> Tensor:
    """Floats `[..., columns, depth] -> [..., ceil(columns / 16), depth, 16]`, zeros beyond the end."""
    return _words(x.float().view(torch.int32), 32).view(torch.float32)


def _words(raw: Tensor, bits: int) -> Tensor:
    """`[..., columns, depth] -> [..., panels, words, 16]`, zeros beyond both ends."""
    *_, columns, depth = raw.shape
    raw = torch.nn.functional.pad(raw, (0, -depth % (32 // bits), 0, -columns % LANES))
    if bits < 8:
        planes = raw.unflatten(-1, (-1, 8 // bits, 4)).unbind(-2)
        raw = sum(plane << (bits * place) for place, plane in enumerate(planes)).flatten(-2)
    return raw.contiguous().view(torch.int32).unflatten(-2, (-1, LANES)).mT.contiguous()


def _patterns(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`, with what lies beyond the ends."""
    # a copy: of a single word a column, `contiguous` keeps the strides that it has here
    columns = words.mT.flatten(-3, -2).clone(memory_format=torch.contiguous_format)
    if bits >= 8:
        return columns.view({8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits])
    lines = columns.view(torch.uint8).unflatten(-1, (-1, 1, 4))
    planes = [(lines >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(planes, dim=-2).flatten(-3)
