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
    )
)
