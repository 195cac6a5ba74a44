"""C++ kernels that multiply as bfloat16 what it holds: where they do, against float64, and beside what is not finite."""

import pytest
import torch
from factories import qkv, scheme
from test_cpu_kernels import differs

import tokquant as tq
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.plan import products
from tokquant.precisions import PRECISIONS, Precision, register
from tokquant.schemes import preset

needs_bfloats = pytest.mark.skipif(
    not build.available() or "avx512_bf16" not in build.compiler().instructions, reason="needs AVX512-BF16"
)
SIXTEEN = scheme("fp16", "fp16", "fp16", "fp16")


@pytest.fixture(autouse=True)
def with_bfloats(monkeypatch):
    monkeypatch.setattr(build, "instructions", lambda: "avx512_bf16")


def products_of(s, dtype=torch.float32, instructions="avx512_bf16"):
    return tuple(products(s, role, dtype, instructions) for role in "kv")


@pytest.mark.parametrize(
    ("s", "dtype", "expected"),
    [
        (preset("fp8"), torch.float32, ("bfloats", "bfloats")),
        (preset("fireq"), torch.float16, ("bfloats", "bfloats")),
        (preset("int8"), torch.bfloat16, ("integers", "integers")),
        (preset("int8-fp8"), torch.float32, ("integers", "bfloats")),
        (preset("int8-fp16"), torch.bfloat16, ("integers", "bfloats")),
        (preset("int8-fp16"), torch.float16, ("integers", "floats")),
        (preset("kv-int4-kivi"), torch.bfloat16, ("bfloats", "bfloats")),
        (preset("kv-int4-kivi"), torch.float32, ("floats", "floats")),
        (preset("none"), torch.bfloat16, ("floats", "floats")),
        (SIXTEEN, torch.bfloat16, ("bfloats", "bfloats")),
        (SIXTEEN, torch.float32, ("floats", "floats")),
        (scheme("bf16", "fp8_e5m2 token", "bf16", "uint8"), torch.float32, ("bfloats", "bfloats")),
        (scheme("bf16", "fp16", "fp8_e4m3 head", "fp32"), torch.float32, ("floats", "floats")),
    ],
)
def test_what_bfloat16_holds_is_multiplied_as_such(s, dtype, expected):
    assert products_of(s, dtype) == expected
    assert "bfloats" not in products_of(s, dtype, "avx512_vnni")


WHOLE = {
    "8-bit floats": scheme("fp8_e4m3 token", "fp8_e5m2 block:64", "fp8_e4m3 head", "fp8_e5m2 row_block:128"),
    "16 bits": scheme("bf16", "bf16", "bf16", "bf16"),
    "zeros": scheme("bf16", "int4 token asymmetric", "int4 channel asymmetric", "fp8_e4m3 row_block:64"),
    "integers with floats": scheme("int8 token", "fp4_e2m1 token", "fp4_e2m1 block:64", "uint8 row_block:64"),
    "block means": scheme("fp8_e4m3 token block_mean", "int4 token mean", "int8 token", "bf16"),
}


@needs_bfloats
@pytest.mark.parametrize("shape", [(37, 301, 33, 4, 2, 2), (1, 4501, 33, 4, 1, 1)], ids=["causal", "keys in chunks"])
@pytest.mark.parametrize("name", WHOLE)
def test_kernel_agrees_with_float64_on_the_same_codes(name, shape, monkeypatch):
    s = WHOLE[name]
    assert products_of(s) == ("bfloats", "bfloats")
    operands = tq.quantize(*qkv(*shape), s, backend="cpu")
    assert not differs(operands, s, dict(causal=True), monkeypatch)


@needs_bfloats
@pytest.mark.parametrize(
    ("s", "d"), [(SIXTEEN, 33), (preset("int8-fp16"), 33), (preset("kv-int4-kivi"), 64), (preset("kv-int2-kivi"), 64)]
)
def test_tensors_of_bfloat16_are_attended_to_as_the_emulation_does(s, d):
    operands = tq.quantize(*qkv(37, 301, d, 4, 2, dtype=torch.bfloat16), s, backend="cpu")
    outs = [tq.attention(*operands, s, causal=True, return_lse=True, backend=backend) for backend in ("cpu", "reference")]
    (out, lse), (expected, expected_lse) = outs
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)
    assert (out - expected).abs().max() <= torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (out == expected).float().mean() > 0.9, "most are rounded from the same number"


@needs_bfloats
@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
@pytest.mark.parametrize(("role", "at"), [("q", 7), ("k", 29), ("v", 28), ("v", 29), ("v", 40)])
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(role, at, lost):
    operands = dict(zip("qkv", qkv(41, 41, 33, dtype=torch.bfloat16), strict=True))
    operands[role][0, 1, at, 32] = lost
    coded = tq.quantize(*operands.values(), SIXTEEN, backend="cpu")
    out, expected = (tq.attention(*coded, SIXTEEN, causal=True, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert 0 < int((~out.isfinite()).sum()) < out.numel()


@needs_bfloats
def test_numbers_below_the_least_normal_one_are_zero():
    q, k, v = qkv(9, 40, 32, dtype=torch.bfloat16)
    tiny = torch.finfo(torch.bfloat16).tiny
    out = tq.attention(q, k, torch.full_like(v, tiny / 2), SIXTEEN, backend="cpu")
    assert torch.equal(out, torch.zeros_like(out))
    out = tq.attention(q, k, torch.full_like(v, 2**20 * tiny), SIXTEEN, backend="cpu")
    torch.testing.assert_close(out, torch.full_like(out, 2**20 * tiny), atol=0, rtol=2**-7)


def evenly_spaced(name, lowest):
    """256 numbers, four apart: bfloat16 holds them all if the lowest is a multiple of four."""
    return register(
        Precision(
            name=name,
            bits=8,
            kind="float",
            largest=508,
            stored=torch.uint8,
            roles="kv",
            encode=lambda x: ((x.nan_to_num(0.0) - lowest) / 4).round().clamp(0, 255).to(torch.uint8),
            decode=lambda codes: 4 * codes.float() + lowest,
            compute="tl.float32",
            triton_decode=lambda tile: tile,
        )
    )


@needs_bfloats
@pytest.mark.parametrize(("name", "lowest", "product"), [("held", -512, "bfloats"), ("finer", -511, "floats")])
def test_a_precision_of_ones_own_is_judged_by_its_values(name, lowest, product, monkeypatch):
    evenly_spaced(name, lowest)
    try:
        s = scheme("fp8_e4m3 token", f"{name} token", f"{name} head", "uint8 row_block:64")
        assert products_of(s) == (product, product)
        operands = tq.quantize(*qkv(20, 131, 33), s, backend="cpu")
        assert not differs(operands, s, {}, monkeypatch)
    finally:
        del PRECISIONS[name]
