"""8-bit floats with 4 bits of exponent and 3 of mantissa, up to 448: the format for activations."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    return p.to(tl.float8e4nv)


@triton.jit
def encode_tile_interpreted(x):
    # the interpreter's cast loses the carry into the next power of two, so x is rounded to a number of the format before it
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    magnitude = bits.to(tl.float32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    subnormal = ((magnitude + 24576.0) - 24576.0).to(tl.int32, bitcast=True)
    rounded = tl.where(magnitude < 0.015625, subnormal, normal) | (x.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.float8e4nv)


FP8_E4M3 = register(
    Precision(
        name="fp8_e4m3",
        bits=8,
        kind="float",
        largest=448,
        stored=torch.float8_e4m3fn,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.float8e4nv",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        triton_encode_interpreted=encode_tile_interpreted,
        triton_quantize=encode_tile,
        triton_quantize_interpreted=encode_tile_interpreted,
    )
)
