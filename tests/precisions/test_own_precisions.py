"""Precisions of one's own that the package's are unlike: codes that leave bits of their byte free, in another order, and values
that 16 bits do not hold."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from factories import qkv, scheme

import tokquant as tq
from tokquant.kernels.cpu import build
from tokquant.kernels.products import product_types
from tokquant.precisions import PRECISIONS, Precision, register
from tokquant.precisions.int8 import encode


def pack(codes):
    # three bits of four, counted from -4
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)) + 4
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def unpack(stored, size):
    return torch.stack([stored & 7, (stored >> 4) & 7], dim=-1).flatten(-2)[..., :size].to(torch.int8) - 4


@triton.jit
def decode_int3(tile):
    return tl.join((tile & 7).to(tl.int8), ((tile >> 4) & 7).to(tl.int8)) - 4


INT3 = Precision(
    name="spare3",
    bits=3,
    kind="int",
    largest=3,
    stored=torch.uint8,
    packed=2,
    encode=encode,
    decode=torch.Tensor.float,
    pack=pack,
    unpack=unpack,
    compute="tl.int8",
    triton_decode=decode_int3,
    cpp_quantize="nearest_integers(x)",
)
"""Four bits hold three."""

INT6 = replace(
    PRECISIONS["int8"],
    name="spare6",
    bits=6,
    largest=31,
    roles="qkv",
    triton_quantize=None,
)
"""Eight bits hold six."""


def third_powers(codes):
    return (codes.float() / 7) ** 3


def nearest_third_power(x):
    values = third_powers(torch.arange(-7, 8))
    return (torch.bucketize(x.nan_to_num().contiguous(), (values[1:] + values[:-1]) / 2) - 7).to(torch.int8)


@triton.jit
def decode_third_powers(tile):
    x = tile.to(tl.float32) / 7
    return x * x * x


CUBES = Precision(
    name="cubes",
    bits=4,
    kind="float",
    largest=1,
    stored=torch.int8,
    encode=nearest_third_power,
    decode=third_powers,
    compute="tl.float32",
    triton_decode=decode_third_powers,
)
"""Values of which float16 rounds most: (c / 7)^3."""


OWN = {precision.name: precision for precision in (INT3, INT6, CUBES)}


@pytest.fixture(params=OWN)
def own(request):
    yield register(OWN[request.param])
    del PRECISIONS[request.param]


def each_way(name):
    """Schemes of one precision in which every operand has it, with zeros where it may have them."""
    zeros = " asymmetric" if PRECISIONS[name].kind == "int" else ""
    return [
        scheme(name, f"{name} token{zeros}", f"{name} token{zeros} scale=fp16", "int8 row_block:32"),
        scheme("int8", f"{name} block:16{zeros}", f"{name} channel_block:32{zeros}", "int8 row_block:32"),
        scheme(f"{name} channel", f"{name} channel{zeros}", f"{name} channel{zeros}", "int8 row_block:32"),
        scheme("fp16", f"{name} channel_block:16{zeros}", f"{name} group:16{zeros}", "fp16 row_block:32"),
    ]


needs_compiler = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")
# a C++ kernel takes seconds to build: of each precision one, the others where slow tests run
ONCE = [("spare3", 0), ("spare6", 1), ("cubes", 3)]
EACH = [
    pytest.param(name, choice, backend, marks=[needs_compiler] if backend == "cpu" else [])
    if backend == "triton" or (name, choice) in ONCE
    else pytest.param(name, choice, backend, marks=[needs_compiler, pytest.mark.slow])
    for name in OWN
    for choice in range(4)
    for backend in ("cpu", "triton")
]


@pytest.mark.parametrize(("own", "choice", "backend"), EACH, indirect=["own"])
def test_kernels_give_what_the_emulation_does(own, choice, backend):
    made = each_way(own.name)[choice]
    operands = qkv(20, 70, 32, heads=4, kv_heads=2)
    codes, expected = (tq.quantize(*operands, made, backend=each) for each in (backend, "reference"))
    for x, y in zip(codes, expected, strict=True):
        assert torch.equal(x.dequantize(), y.dequantize())
    out, right = (tq.attention(*operands, made, causal=True, backend=each) for each in (backend, "reference"))
    # a code of P may fall on the other side of a tie
    assert (out - right).abs().mean() < 2e-5 * right.abs().max() and (out - right).abs().max() < 1e-2 * right.abs().max()


def test_bits_are_those_of_memory(own):
    made = scheme("int8", f"{own.name} token scale=fp16", f"{own.name} token scale=fp16", "int8 row_block:128")
    *_, k, v = tq.quantize(*qkv(64, d=64), made, backend="reference")
    cache = tq.KVCache(made, batch=1, kv_heads=2, head_dim=64, backend="reference")
    assert made.bits_per_value(64)["k"] == k.bits_per_value == v.bits_per_value == cache.bits_per_value
    assert k.bits_per_value == {"spare3": 4.25, "spare6": 8.25, "cubes": 8.25}[own.name]


def test_what_is_computed_in_float32_is_multiplied_in_float32(own):
    made = scheme("int8", own.name, own.name, "int8 row_block:32")
    kind = "tl.int8" if own.compute == "tl.int8" else "tl.float32"
    assert product_types(made, "qk", torch.float16) == {"q": kind, "k": kind}
    # decoded, values are of the input's own type
    assert product_types(scheme("fp16", f"{own.name} group:16"), "qk", torch.float16)["k"] == "tl.float16"
