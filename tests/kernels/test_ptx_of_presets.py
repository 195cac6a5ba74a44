"""What GPUs of each kind are given for every preset, run on a CPU: bfloat16, fp8 and inline assembly as they are there.

And for schemes that compilers are stricter about than the interpreter.
"""

import pytest
import torch
from exact import assert_exact
from factories import nan_filled, qkv, scheme
from ptx import matrices

import tokquant as tq
from tokquant.evaluation.costs import scales_for
from tokquant.kernels import launch
from tokquant.schemes import preset, preset_names

pytestmark = pytest.mark.compiled


def attended(s, monkeypatch, n_q, n_k, d, dtype, **given):
    """Attention by a scheme, into outputs that were NaN."""
    tensors = qkv(n_q, n_k, d, heads=2, kv_heads=1, dtype=dtype)
    operands = launch.packed(tq.quantize(*tensors, s, scales=scales_for(s, *tensors), backend="reference"), s)
    monkeypatch.setattr(launch.torch, "empty", nan_filled)
    out, lse = tq.attention(*operands, s, return_lse=True, backend="triton", **given)
    assert_exact(out, lse, operands, s, **given)


@pytest.mark.parametrize("name", preset_names())
def test_bfloat16_on_an_h100(name, on_ptx, monkeypatch):
    attended(preset(name), monkeypatch, 70, 200, 64, torch.bfloat16, causal=True)
    assert name == "none" or "wgmma" in on_ptx[-1].asm["ptx"]


@pytest.mark.parametrize("name", ["int8", "int8-fast", "int8-fp8", "kv-int4"])
def test_float16_with_a_window_and_128_channels_on_an_h100(name, on_ptx, monkeypatch):
    attended(preset(name), monkeypatch, 130, 300, 128, torch.float16, window=(100, 20))


@pytest.mark.parametrize(
    ("on_ptx", "name"),
    [
        (capability, name)
        for capability in (80, 89)
        for name in preset_names()
        if ("fp8" in str(preset(name).model_dump())) == (capability == 89)
    ],
    indirect=["on_ptx"],
)
def test_float16_on_what_came_before(name, on_ptx, monkeypatch):
    attended(preset(name), monkeypatch, 40, 150, 64, torch.float16, causal=True)
    assert name == "none" or "mma.sync" in on_ptx[-1].asm["ptx"]


STRICT = {
    "int2 values in tiles smaller than their groups": scheme("int8", "int2", "int2", "int8 row_block:32"),
    "fp4 values under fp8 probabilities": scheme("fp8_e4m3", "fp8_e4m3", "fp4_e2m1 channel", "fp8_e4m3"),
    "decoded queries, a scale of V a tile": scheme("int4 group:16", "int8", "int8 channel_block:64", "int8 row_block:64"),
}


@pytest.mark.parametrize("s", STRICT.values(), ids=STRICT)
def test_what_compilers_are_strict_about_runs_on_an_h100(s, on_ptx, monkeypatch):
    attended(s, monkeypatch, 70, 150, 32, torch.float16)


@pytest.mark.parametrize("name", ["int8-fp8", "fp8", "fireq"])
def test_the_few_bits_that_tensor_cores_add_8_bit_floats_with_hardly_add_to_their_error(name, on_ptx, monkeypatch):
    q, k, v = (torch.randn(1, 1, n, 64, dtype=torch.float16) for n in (64, 2048, 2048))
    for values, more in ((v, 2e-3), (v + 5, 0.25)):
        operands = launch.packed(tq.quantize(q, k, values, name, backend="reference"), preset(name))
        exact = torch.softmax(q.double() @ k.double().mT / 8, dim=-1) @ values.double()
        errors = []
        for bits in (13, 40):
            monkeypatch.setattr(matrices, "FRACTION", bits)
            out = tq.attention(*operands, name, backend="triton").double()
            errors.append(((out - exact).abs().sum() / exact.abs().sum()).item())
        assert errors[0] != errors[1] and errors[0] <= (1 + more) * errors[1]
