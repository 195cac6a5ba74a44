"""32-bit floats, for checks of kernels without rounding: stored as they are, without a scale."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return x.to(torch.float32)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    return p.to(tl.float32)


FP32 = register(
    Precision(
        name="fp32",
        bits=32,
        kind="float",
        largest=None,
        stored=torch.float32,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.float32",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_encode="static inline floats encode_p(floats p) { return p; }",
        cpp_decode="as_floats(code)",
        cpp_quantize="as_ints(x)",
        triton_quantize=encode_tile,
    )
)
