"""Signed 2-bit integers, -1 to 1 (-2 to 1 when asymmetric), four in a byte: code + 2, the first in the lowest bits."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton
from tokquant.precisions.int8 import encode


def pack(codes: Tensor) -> Tensor:
    pairs = torch.nn.functional.pad((codes + 2).to(torch.uint8), (0, -codes.shape[-1] % 4))
    return pairs[..., 0::4] | (pairs[..., 1::4] << 2) | (pairs[..., 2::4] << 4) | (pairs[..., 3::4] << 6)


def unpack(stored: Tensor, size: int) -> Tensor:
    pairs = torch.stack([(stored >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)[..., :size]
    return pairs.to(torch.int8) - 2


@triton.jit
def decode_tile(tile):
    # [N, W] bytes -> [N, W, 4] int8
    even = tl.join((tile & 3).to(tl.int8), ((tile >> 4) & 3).to(tl.int8))
    odd = tl.join(((tile >> 2) & 3).to(tl.int8), (tile >> 6).to(tl.int8))
    return tl.join(even, odd).reshape(tile.shape[0], tile.shape[1], 4) - 2


@triton.jit
def decode_tile_high(tile):
    # a field holds code + 2: moved to the highest bits of a byte, with the sign bit flipped, it is 64 times the code as int8
    even = tl.join(tile << 6, (tile << 2) & 0xC0)
    odd = tl.join((tile << 4) & 0xC0, tile & 0xC0)
    return (tl.join(even, odd).reshape(tile.shape[0], tile.shape[1], 4) ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def decode_tile_high_ptx(tile):
    # (a & 0xC0C0C0C0) ^ 0x80808080 of four bytes is one instruction
    first, second, third, fourth = tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        shl.b32 t, $4, 6;
        lop3.b32 $0, t, 0xC0C0C0C0, 0x80808080, 0x6A;
        shl.b32 t, $4, 4;
        lop3.b32 $1, t, 0xC0C0C0C0, 0x80808080, 0x6A;
        shl.b32 t, $4, 2;
        lop3.b32 $2, t, 0xC0C0C0C0, 0x80808080, 0x6A;
        lop3.b32 $3, $4, 0xC0C0C0C0, 0x80808080, 0x6A;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [tile],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(tile.shape[0], tile.shape[1], 4)


@triton.jit
def quantize_tile(x):
    # 1.5 * 2^23 + 2: the low bits of the sum are the nearest integer, half to even, and 2; a NaN has no code
    code = (tl.where(x == x, x, 0.0) + 12582914.0).to(tl.int32, bitcast=True) & 3
    even, odd = tl.split(code.reshape(code.shape[0], code.shape[1] // 2, 2))
    first, third = tl.split(even.reshape(code.shape[0], code.shape[1] // 4, 2))
    second, fourth = tl.split(odd.reshape(code.shape[0], code.shape[1] // 4, 2))
    return (first | (second << 2) | (third << 4) | (fourth << 6)).to(tl.uint8)


INT2 = register(
    Precision(
        name="int2",
        bits=2,
        kind="int",
        largest=1,
        stored=torch.uint8,
        packed=4,
        encode=encode,
        decode=Tensor.float,
        pack=pack,
        unpack=unpack,
        compute="tl.int8",
        triton_decode=decode_tile,
        cpp_decode="to_floats(code << 30 >> 30)",
        cpp_quantize="nearest_integers(x)",
        triton_quantize=quantize_tile,
        triton_decode_high=decode_tile_high,
        triton_decode_high_ptx=decode_tile_high_ptx,
    )
)
