"""16-bit floats with the range of float32 (bfloat16): stored as they are, without a scale."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    return p.to(tl.bfloat16)


@triton.jit
def quantize_tile_interpreted(x):
    # the interpreter's cast truncates instead of rounding
    bits = x.to(tl.int32, bitcast=True)
    rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


BF16 = register(
    Precision(
        name="bf16",
        bits=16,
        kind="float",
        largest=None,
        stored=torch.bfloat16,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.bfloat16",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_encode="static inline floats encode_p(floats p) { return rounded<7, -126>(p); }",
        cpp_decode="from_bfloat(code)",
        cpp_quantize="to_bfloat(x)",
        triton_quantize=encode_tile,
        triton_quantize_interpreted=quantize_tile_interpreted,
    )
)
