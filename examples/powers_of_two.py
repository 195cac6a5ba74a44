"""A precision of one's own: powers of two in four bits, 0 and ±1 ... ±64, multiplied on the integer units."""

import torch
import triton
import triton.language as tl

import tokquant as tq
from tokquant.precisions import int4


def encode(x):
    # -7 to 7: the sign, and one more than the exponent of the nearest power of two; a tie goes to the even code
    middles = torch.tensor([0.5, 1.5, 3, 6, 12, 24, 48, 96], device=x.device)
    below, above = (torch.bucketize(x.abs().nan_to_num(), middles, right=right) for right in (False, True))
    return (torch.where(below % 2 == 0, below, above) * x.sign().nan_to_num()).to(torch.int8)


def decode(codes):
    return torch.where(codes == 0, 0.0, torch.exp2(codes.abs().float() - 1) * codes.sign())


@triton.jit
def decode_tile(tile):
    # [N, W] bytes -> [N, W, 2] int8
    code = tl.join((tile & 0xF).to(tl.int8), (tile >> 4).to(tl.int8)) - 8
    power = 1 << tl.maximum(tl.abs(code) - 1, 0)
    return tl.where(code > 0, power, tl.where(code < 0, -power, 0)).to(tl.int8)


tq.register(
    tq.Precision(
        name="pot4",
        bits=4,
        kind="float",
        largest=64,
        stored=torch.uint8,
        packed=2,
        encode=encode,
        decode=decode,
        pack=int4.pack,
        unpack=int4.unpack,
        compute="tl.int8",
        triton_decode=decode_tile,
    )
)
