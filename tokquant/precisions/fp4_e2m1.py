"""4-bit floats with 2 bits of exponent and 1 of mantissa (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two in a byte.

A code is sign, exponent, mantissa from the highest bit (OCP Microscaling Formats, 5.3.3); the even element lies in the
low half of its byte.
"""

import torch
from torch import Tensor

from tokquant.precisions.base import Precision, register, tl, triton

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(x: Tensor) -> Tensor:
    magnitude = torch.nan_to_num(x.abs(), nan=0.0)
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for index in range(1, len(VALUES)):
        middle = (VALUES[index - 1] + VALUES[index]) / 2
        # a tie goes to the even code
        code += ((magnitude >= middle) if index % 2 == 0 else (magnitude > middle)).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def pack(codes: Tensor) -> Tensor:
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(stored: Tensor, size: int) -> Tensor:
    return torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(-2)[..., :size]


@triton.jit
def decode_tile(tile):
    # [N, W] bytes -> [N, W, 2] e4m3: shift the sign, exponent and mantissa, and add 6 to the exponent, whose bias is 6 larger;
    # the one subnormal number, 0.5, is 0x30
    code = tl.join(tile & 0xF, tile >> 4)
    magnitude = code & 7
    byte = tl.where(magnitude > 1, (magnitude << 2) + 48, magnitude * 48)
    return (byte | ((code >> 3) << 7)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def quantize_tile(x):
    # count the midpoints between values that |x| is above, a tie going to the even code; NaN is above none
    magnitude = tl.abs(x)
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    code += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    code |= ((x.to(tl.int32, bitcast=True) >> 31) & 1) << 3
    even, odd = tl.split(code.reshape(code.shape[0], code.shape[1] // 2, 2))
    return (even | (odd << 4)).to(tl.uint8)


FP4_E2M1 = register(
    Precision(
        name="fp4_e2m1",
        bits=4,
        kind="float",
        largest=6,
        stored=torch.uint8,
        packed=2,
        encode=encode,
        decode=decode,
        pack=pack,
        unpack=unpack,
        compute="tl.float8e4nv",
        triton_decode=decode_tile,
        cpp_decode="from_e2m1(code)",
        cpp_quantize="to_e2m1(x)",
        triton_quantize=quantize_tile,
    )
)
