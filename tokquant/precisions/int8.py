"""Signed 8-bit integers, -127 to 127: what integer tensor cores multiply."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    # an integer cannot hold NaN: the group's scale carries it
    return torch.nan_to_num(x, nan=0.0).round().to(torch.int8)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    # adding 1.5 * 2^23 leaves the nearest integer, half to even, in the low bits: no conversion instruction
    return (p + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_tile(x):
    # as above, but a NaN has no code
    return (tl.where(x == x, x, 0.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


INT8 = register(
    Precision(
        name="int8",
        bits=8,
        kind="int",
        largest=127,
        stored=torch.int8,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.int8",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_decode="to_floats(code << 24 >> 24)",
        cpp_encode="static inline floats encode_p(floats p) { return nearest(p); }",
        cpp_quantize="nearest_integers(x)",
        triton_quantize=quantize_tile,
    )
)
