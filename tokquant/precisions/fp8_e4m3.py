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
    # the interpreter's cast loses the carry into the next power of two, so the byte is made by hand
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    normal = (((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = (magnitude + 24576.0).to(tl.int32, bitcast=True) - 0x46C00000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F) | (((bits >> 31) & 1) << 7)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def quantize_tile(x):
    # four values, each rounded once. For compute capability 8.9 Triton 3.6 would cast by way of float16 and truncate to that,
    # which turns values just above a tie into ties
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


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
        cpp_decode="from_e4m3(code)",
        cpp_encode="static inline floats encode_p(floats p) { return rounded<3, -6>(p); }",
        triton_encode_interpreted=encode_tile_interpreted,
        cpp_quantize="to_e4m3(x)",
        triton_quantize=quantize_tile,
        triton_quantize_interpreted=encode_tile_interpreted,
    )
)
