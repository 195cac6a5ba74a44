"""What C++ kernels unpack before they multiply it: every code of K and V has to arrive as the number that it stands for."""

from dataclasses import replace

import pytest
import torch
from factories import qkv, scheme

import tokquant as tq
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.instructions import INSTRUCTIONS
from tokquant.schemes.placement import place

TOKENS, D = 256, 64

# of K and of V: codes that are looked up, bytes, and fewer bits with a scale for two panels, for one, or for each token
CASES = {
    "signed bytes": ("fp8_e4m3 head", "fp8_e5m2 head"),
    "signed bytes with scales": ("fp8_e5m2 token", "fp8_e4m3 group:16"),
    "bytes": ("int8 token", "int8 channel"),
    "bytes with zeros": ("int8 channel_block:32 asymmetric", "int8 group:32 asymmetric"),
    "tables with zeros": ("int4 channel_block:32 asymmetric", "int4 group:32 asymmetric"),
    "tables of four": ("int2 channel_block:64 asymmetric", "int2 group:64 asymmetric"),
    "tables of floats": ("fp4_e2m1 channel_block:128", "fp4_e2m1 group:32"),
    "a scale for a panel": ("int4 channel_block:16", "int4 group:16"),
    "a scale for each token": ("fp4_e2m1 group:32", "fp4_e2m1 channel"),
}

# each kernel costs a second to build: the slow run has all sets, the other one those with tables, or the fastest
SETS = build.compiler().instructions if build.available() else []
CHOSEN = [pytest.param(name, marks=[] if name in SETS[:1] or INSTRUCTIONS[name].tables else pytest.mark.slow) for name in SETS]


def with_every_code(x: tq.QuantizedTensor) -> tq.QuantizedTensor:
    """Its scales, and codes of all numbers that a code stands for, in another order in each token; of floats one NaN too."""
    values = x.spec.format.values()
    rows = [values[(torch.arange(D) + 7 * n) % len(values)] for n in range(TOKENS)]
    codes = x.spec.format.encode(torch.stack(rows)[None, None])
    if x.spec.role == "v" and x.spec.precision.startswith("fp8"):
        codes.view(torch.uint8)[0, 0, 200, 5] = 0x7F
    return replace(x, codes=x.spec.format.pack(codes))


@pytest.mark.parametrize("instructions", CHOSEN)
@pytest.mark.parametrize("name", CASES)
def test_every_code_is_multiplied_as_what_it_stands_for(name, instructions, monkeypatch):
    monkeypatch.setenv(build.CHOICE, instructions)
    s = scheme("fp16", *CASES[name], "fp16")
    # bfloat16 has products of its own
    dtype = torch.bfloat16 if instructions == "avx512_bf16" else torch.float16
    q, k, v = tq.quantize(*qkv(TOKENS, TOKENS, D, 1, dtype=dtype), s, backend="reference")
    k, v = with_every_code(k), with_every_code(v)
    # each query sees its own key alone
    out, lse = tq.attention(q, k, v, s, causal=True, window=(0, 0), scale=1.0, return_lse=True, backend="cpu")
    q, k, v = (x.dequantize(torch.float32).to(dtype if place(x.spec) == "operand" else torch.float32) for x in (q, k, v))
    products = q.double() * k.double()
    # of the 64 numbers one near a tie may be rounded to the input's type the other way
    most = 1e-5 * products.abs().sum(-1) + torch.finfo(dtype).eps * products.abs().amax(-1)
    assert ((lse - products.sum(-1)).abs() <= most).all()
    torch.testing.assert_close(out, v.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)
