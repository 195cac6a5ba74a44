"""Unsigned 8-bit integers, 0 to 255, for P, which is never negative.

Integer units of GPUs multiply signed bytes, so kernels hold code - 128 and add 128 times the sum of V's codes.
"""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0).round().to(torch.uint8)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    # 1.5 * 2^23 - 128: the low byte of the sum is the nearest integer less 128
    return (p + 12582784.0).to(tl.int32, bitcast=True).to(tl.int8)


UINT8 = register(
    Precision(
        name="uint8",
        bits=8,
        kind="int",
        largest=255,
        stored=torch.uint8,
        roles="p",
        encode=encode,
        decode=Tensor.float,
        compute="tl.int8",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_encode="static inline floats encode_p(floats p) { return nearest(p); }",
        code_zero=128,
    )
)
