"""How operands lie in memory for vector units of CPUs: in panels of 16 columns, four bytes or one float of each side by side.

A product of `[rows, depth]` and `[depth, columns]` reads the second one from end to end: of each panel first the four bytes
that a 32-bit lane multiplies and sums, then the next four. Columns are K's tokens and V's channels; depth is the other.
"""

import torch
from torch import Tensor

LANES = 16
"""Columns of a panel: 32-bit numbers in the widest register."""
BYTES = 4
"""Of depth that an integer lane takes at once."""


def panels(x: Tensor, deep: int) -> Tensor:
    """`[..., columns, depth] -> [..., panels, steps, 16, deep]`, zeros beyond both ends."""
    *_, columns, depth = x.shape
    x = torch.nn.functional.pad(x, (0, -depth % deep, 0, -columns % LANES))
    return x.unflatten(-1, (-1, deep)).unflatten(-3, (-1, LANES)).transpose(-3, -2).contiguous()


def columns(x: Tensor, count: int, depth: int) -> Tensor:
    """The inverse of `panels`: `[..., count, depth]`."""
    return x.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :count, :depth]


def of_keys(codes: Tensor) -> Tensor:
    """K's codes int8 `[B, H, N, D] -> [B, H, panels, steps + 1, 16, 4]`.

    The last step of a panel is 16 int32 in its bytes: -128 times the sum of each key's codes. Products start from there, as
    the unit multiplies unsigned bytes with signed ones, and Q's codes are held 128 higher.
    """
    sums = codes.sum(dim=-1, dtype=torch.int32) * -128
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % LANES)).view(torch.int8).unflatten(-1, (-1, 1, LANES, BYTES))
    return torch.cat([panels(codes, BYTES), sums], dim=-3)


def of_values(codes: Tensor, tile: int, deep: int) -> Tensor:
    """V's codes or floats `[B, H, N, D] -> [B, H, tiles, panels, tile / deep, 16, deep]`: each tile of keys by itself."""
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % tile))
    return panels(padded.unflatten(2, (-1, tile)).mT, deep)


def codes_of(packed: Tensor, role: str, n: int, d: int) -> Tensor:
    """The int8 codes `[B, H, n, d]` again, from what `of_keys` or `of_values` gave; Q's lie in their own order."""
    if role == "q":
        return packed
    if role == "k":
        return columns(packed[..., :-1, :, :], n, d)
    tile = packed.shape[4] * packed.shape[6]
    return columns(packed, d, tile).mT.flatten(2, 3)[:, :, :n]
