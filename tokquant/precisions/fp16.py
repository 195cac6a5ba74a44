"""16-bit floats (IEEE half): stored as they are, without a scale."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return x.to(torch.float16)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    return p.to(tl.float16)


FP16 = register(
    Precision(
        name="fp16",
        bits=16,
        kind="float",
        largest=None,
        stored=torch.float16,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.float16",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_encode="static inline floats encode_p(floats p) { return rounded<10, -14>(p); }",
        cpp_decode="from_half(code)",
        cpp_quantize="to_half(x)",
        triton_quantize=encode_tile,
    )
)
