"""8-bit floats with 5 bits of exponent and 2 of mantissa, up to 57344: more range, one bit less of precision."""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton


def encode(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2)


@triton.jit
def decode_tile(tile):
    return tile


@triton.jit
def encode_tile(p):
    return p.to(tl.float8e5)


@triton.jit
def encode_tile_interpreted(x):
    # the interpreter's cast loses the carry into the next power of two, so the byte is made by hand
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    normal = (((bits & 0x7FFFFFFF) + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - 448
    subnormal = (magnitude + 192.0).to(tl.int32, bitcast=True) - 0x43400000
    code = tl.where(magnitude < 6.103515625e-05, subnormal, normal)
    code = tl.where(x == x, code, 0x7F) | (((bits >> 31) & 1) << 7)
    return code.to(tl.uint8).to(tl.float8e5, bitcast=True)


@triton.jit
def quantize_tile(x):
    # four values, each rounded once. For compute capability 8.9 Triton 3.6 would cast by way of float16 and truncate to that,
    # which turns values just above a tie into ties
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;
        cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x],
        dtype=tl.float8e5,
        is_pure=True,
        pack=4,
    )


FP8_E5M2 = register(
    Precision(
        name="fp8_e5m2",
        bits=8,
        kind="float",
        largest=57344,
        stored=torch.float8_e5m2,
        roles="qkvp",
        encode=encode,
        decode=Tensor.float,
        compute="tl.float8e5",
        triton_decode=decode_tile,
        triton_encode=encode_tile,
        cpp_decode="from_half(code << 8)",
        cpp_encode="static inline floats encode_p(floats p) { return rounded<2, -14>(p); }",
        triton_encode_interpreted=encode_tile_interpreted,
        cpp_quantize="to_e5m2(x)",
        triton_quantize=quantize_tile,
        triton_quantize_interpreted=encode_tile_interpreted,
    )
)
