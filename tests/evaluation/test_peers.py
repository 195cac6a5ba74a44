"""What tokquant is timed beside computes the same attention, or says why it is not there."""

import importlib.machinery
import sys
import types

import pytest
import torch
from factories import qkv
from torch.nn.attention import SDPBackend

from tokquant.evaluation import packages, peers
from tokquant.features import Features
from tokquant.kernels.cpu import build
from tokquant.reference import oracle


@pytest.mark.parametrize(
    ("n_q", "kv_heads", "causal"), [(1, 2, False), (3, 2, False), (3, 2, True), (3, 4, True), (40, 2, True)]
)
def test_every_way_to_ask_torch_gives_the_same_attention(n_q, kv_heads, causal):
    q, k, v = qkv(n_q, 40, 32, heads=4, kv_heads=kv_heads)
    exact, _ = oracle(q, k, v, Features(scale=32**-0.5, causal=causal))
    found = peers.of_torch(q, k, v, causal)
    assert len(found) == (2 if kv_heads == 4 or causal else 4)
    for name, call in found.items():
        tolerance = 1e-5 if "fp32" in name else 0.05
        assert torch.allclose(call().reshape(q.shape).double(), exact, atol=tolerance), name


def test_on_a_gpu_kernels_of_torch_are_named_one_by_one():
    q, k, v = (x.to("meta") for x in qkv(1, 40, 32, heads=4, kv_heads=2))
    kernels = [f"SDPA {kernel} {kind} {form}" for kernel in ("flash", "cudnn", "efficient") for kind in ("fp16", "bf16")
               for form in ("gqa", "folded")]  # fmt: skip
    assert sorted(peers.of_torch(q, k, v, False)) == sorted(kernels)
    with pytest.raises(RuntimeError, match=r"No (available|viable)"):
        peers._by(SDPBackend.CUDNN_ATTENTION, peers.of_torch(*qkv(), False)["SDPA fp32"])


def test_a_missing_package_is_said_and_so_is_one_without_the_kernel(monkeypatch):
    q, k, v = qkv(8)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert peers.attention(q, k, v, False)["torchao int8"] == "not installed"
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    monkeypatch.setattr(packages.importlib, "import_module", lambda name: 1 / 0)
    assert peers.attention(q, k, v, False)["torchao int8"] == "cannot be imported: division by zero"
    monkeypatch.setattr(packages, "lacks", lambda name: "")
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    assert peers.attention(q, k, v, False)["torchao int8"].startswith("0.1 is built without its CPU kernels")


@pytest.mark.parametrize("causal", [False, True])
def test_torchao_is_asked_for_the_same_attention(causal, monkeypatch):
    def op(q, k, v, *, attn_mask, q_scale, q_zp, k_scale, k_zp, v_scale, v_zp, a_scale, a_zp=0, o_scale, o_zp):
        q, k, v = ((x.float() - zero) * step for x, zero, step in ((q, q_zp, q_scale), (k, k_zp, k_scale), (v, v_zp, v_scale)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        assert a_scale == 1 / 255 and a_zp == 0
        return (out / o_scale).round() + o_zp

    signature = "Tensor q, Tensor k, Tensor v, *, Tensor? attn_mask, " + ", ".join(
        f"float {name}_scale, int {name}_zp=0" for name in "qkvao"
    )
    library = torch.library.Library("torchao", "FRAGMENT")
    try:
        library.define(f"qscaled_dot_product({signature}) -> Tensor")
        library.impl("qscaled_dot_product", op, "CPU")
        monkeypatch.setattr(packages, "lacks", lambda name: "")
        q, k, v = qkv(24, heads=4, kv_heads=2)
        codes = peers.attention(q, k, v, causal)["torchao int8"]()
        exact, _ = oracle(q, k, v, Features(scale=32**-0.5, causal=causal))
        assert ((codes - 128) * v.abs().max() / 127 - exact).abs().max() < 0.03 * v.abs().max()
    finally:
        library._destroy()


def attended(q, k, v, is_causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])


def module(monkeypatch, name, **members):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("folder", ["sageattention", "sageattention.triton"], ids=["version 1", "version 2"])
def test_sageattention_is_asked_for_the_same_attention_and_leaves_the_callers_keys(causal, folder, monkeypatch):
    def sageattn(q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "HND"
        k -= k.mean(dim=2, keepdim=True)  # as version 1 does, to the tensor it is given
        return attended(q, k, v, is_causal)

    def forward(q, k, v, q_scale, k_scale, tensor_layout, output_dtype):
        assert tensor_layout == "HND" and output_dtype == torch.float16
        return attended(q * q_scale, k * k_scale, v, causal)

    def quantized(q, k, tensor_layout):
        return q * 2, 0.5, k * 4, 0.25

    module(monkeypatch, "sageattention", sageattn=sageattn)
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in ("sageattention", folder) else None)
    module(monkeypatch, f"{folder}.quant_per_block", per_block_int8=quantized)
    module(monkeypatch, f"{folder}.attn_qk_int8_per_block{'_causal' if causal else ''}", forward=forward)
    q, k, v = qkv(24, heads=4, kv_heads=2, dtype=torch.float16)
    before = k.clone()
    found = packages.sageattention(q, k, v, causal)
    assert list(found) == ["SageAttention of unknown version, kernel", "SageAttention of unknown version, with quantization"]
    for call in found.values():
        assert torch.allclose(call(), attended(q, k, v, causal), atol=4e-3)
    assert torch.equal(k, before)


def test_a_kernel_of_another_version_is_a_row_that_says_why(monkeypatch):
    module(monkeypatch, "sageattention", sageattn=attended)
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name == "sageattention" else None)
    found = packages.sageattention(*qkv(16), False)
    assert "No module named 'sageattention.quant_per_block'" in found["SageAttention of unknown version, kernel"]
    assert packages.xformers(*qkv(16), False) == {"xformers": "not installed"} == packages.split_k(*qkv(16))


@pytest.mark.slow
@pytest.mark.skipif(not build.available(), reason="inductor needs a C++ compiler")
def test_flex_attention_is_asked_for_the_same_attention():
    for n_q, kv_heads, causal in ((256, 4, True), (1, 2, False)):
        q, k, v = qkv(n_q, 256, 64, 4, kv_heads, dtype=torch.float16)
        [call] = peers.flex(q, k, v, causal).values()
        with torch.no_grad():
            assert torch.allclose(call(), attended(q, k, v, causal), atol=4e-3)


def test_a_package_that_fails_is_in_nobodys_way(monkeypatch):
    monkeypatch.setattr(packages, "sageattention", lambda *given: 1 / 0)
    found = peers.attention(*(x.to("meta") for x in qkv(16)), False)
    assert found["SageAttention"] == "ZeroDivisionError: division by zero" and found["xformers"] == "not installed"
    assert callable(found["SDPA flash fp16"]) and callable(found["FlexAttention fp16"])
    assert {"FlexAttention fp16", "xformers"} < peers.decode(*(x.to("meta") for x in qkv(1, 16)), False).keys()


@pytest.fixture
def xformers(monkeypatch):
    """Attention with xformers' layouts, its int4 among them, in torch."""

    class FwOp:
        pass

    def unpacked(x):
        sides, packed = x[..., :1].contiguous().view(torch.float16), x[..., 1:].contiguous().view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return codes * sides[..., :1] + sides[..., 1:]

    def forward(q, k, v, mask=None, op=None):
        assert op in (None, FwOp) and q.dtype == torch.float16
        if k.dtype == torch.int32:
            k, v = unpacked(k), unpacked(v)
        if q.dim() == 5:
            assert k.shape[2:4] == q.shape[2:4] and k.stride(3) in (0, k.shape[4])
            q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attended(q, k, v, mask is not None).transpose(1, 2)

    triton_splitk = types.SimpleNamespace(FwOp=FwOp)
    for name in ("xformers", "xformers.ops"):
        module(monkeypatch, name)
    module(monkeypatch, "xformers.ops.fmha", memory_efficient_attention_forward=forward, triton_splitk=triton_splitk)
    module(monkeypatch, "xformers.ops.fmha.attn_bias", LowerTriangularFromBottomRightMask=object)


@pytest.mark.parametrize(("kv_heads", "causal"), [(4, True), (4, False), (2, False)])
def test_xformers_is_asked_for_the_same_attention(kv_heads, causal, xformers):
    q, k, v = qkv(24, d=32, heads=4, kv_heads=kv_heads, dtype=torch.float16)
    [call] = packages.xformers(q, k, v, causal).values()
    assert torch.allclose(call().transpose(1, 2), attended(q, k, v, causal), atol=2e-3)


def test_xformers_decodes_in_16_bits_and_in_its_own_four(xformers):
    q, k, v = qkv(1, 40, d=32, heads=4, kv_heads=2, dtype=torch.float16)
    half, int4 = packages.split_k(q, k, v).values()
    exact = attended(q, k, v, False)
    assert torch.allclose(half().transpose(1, 2), exact, atol=2e-3)
    assert 0.005 < (int4().transpose(1, 2) - exact).norm() / exact.norm() < 0.15
