"""What tokquant is timed beside computes the same attention, or says why it is not there."""

import pytest
import torch
from factories import qkv
from torch.nn.attention import SDPBackend

from tokquant.evaluation import packages, peers
from tokquant.reference import Features, oracle


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
