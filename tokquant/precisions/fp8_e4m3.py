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
def encode_tile_interpreted(p):
    # the interpreter's cast loses the carry into the next power of two, so p is rounded to a number of the format before it
    normal = p * 1048577.0 - (p * 1048577.0 - p)
    subnormal = (p + 24576.0) - 24576.0
    return tl.where(p < 0.015625, subnormal, normal).to(tl.float8e4nv)


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
    )
)
