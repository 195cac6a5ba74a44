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
    # [N, W] bytes -> [N, W, 2] int8
    return tl.join((tile & 0xF).to(tl.int8), (tile >> 4).to(tl.int8)) - 8


@triton.jit
def decode_tile_ptx(tile):
    # four bytes at a time: as the highest bit of each byte is set, subtracting 8 from it never borrows from the next byte
    low, high = tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        and.b32 t, $2, 0x0F0F0F0F;
        or.b32 t, t, 0x80808080;
        sub.u32 t, t, 0x08080808;
        xor.b32 $0, t, 0x80808080;
        shr.u32 t, $2, 4;
        and.b32 t, t, 0x0F0F0F0F;
        or.b32 t, t, 0x80808080;
        sub.u32 t, t, 0x08080808;
        xor.b32 $1, t, 0x80808080;
        }""",
        "=&r,=&r,r",
        [tile],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )
    return tl.join(low, high)


@triton.jit
def decode_tile_high(tile):
    # a nibble holds code + 8: moved to the high half of a byte, with the sign bit flipped, it is 16 times the code as int8
    return tl.join((tile << 4) ^ 0x80, (tile & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def decode_tile_high_ptx(tile):
    # (a & 0xF0F0F0F0) ^ 0x80808080 of four bytes is one instruction
    low, high = tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        shl.b32 t, $2, 4;
        lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
        }""",
        "=&r,=&r,r",
        [tile],
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )
    return tl.join(low, high)


@triton.jit
def quantize_tile(x):
    # 1.5 * 2^23 + 8: the low bits of the sum are the nearest integer, half to even, and 8; a NaN has no code
    code = (tl.where(x == x, x, 0.0) + 12582920.0).to(tl.int32, bitcast=True) & 0xF
    even, odd = tl.split(code.reshape(code.shape[0], code.shape[1] // 2, 2))
    return (even | (odd << 4)).to(tl.uint8)


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
        cpp_decode="to_floats(code << 28 >> 28)",
        cpp_quantize="nearest_integers(x)",
        triton_quantize=quantize_tile,
        triton_decode_ptx=decode_tile_ptx,
        triton_decode_high=decode_tile_high,
        triton_decode_high_ptx=decode_tile_high_ptx,
    )
)
