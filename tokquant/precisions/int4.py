"""Signed 4-bit integers, -7 to 7 (-8 to 7 when asymmetric), two in a byte.

A byte holds code + 8, the even element in its low half: bit for bit the `pack_to_int32` of compressed-tensors.
"""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton
from tokquant.precisions.int8 import encode


def pack(codes: Tensor) -> Tensor:
    nibbles = (codes + 8).to(torch.uint8)
    if codes.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(stored: Tensor, size: int) -> Tensor:
    nibbles = torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(-2)[..., :size]
    return nibbles.to(torch.int8) - 8


@triton.jit
def decode_tile(tile):
    # [N, W] bytes -> [N, 2 W] int8
    return tl.interleave((tile & 0xF).to(tl.int8), (tile >> 4).to(tl.int8)) - 8


INT4 = register(
    Precision(
        name="int4",
        bits=4,
        kind="int",
        largest=7,
        stored=torch.uint8,
        packed=2,
        encode=encode,
        decode=Tensor.float,
        pack=pack,
        unpack=unpack,
        compute="tl.int8",
        triton_decode=decode_tile,
    )
)
