"""The text that an NVIDIA GPU is given, inline assembly included, gives the numbers of the interpreter's own."""

import pytest
import torch
from factories import qkv, scheme
from paged import filled
from ptx import inline

import tokquant as tq
from tokquant.kernels import launch, pages
from tokquant.reference import Features
from tokquant.schemes import preset

PACKED = {
    "int4": preset("int4"),
    "kv-int4": preset("kv-int4"),
    "int4 keys on int4 queries": scheme("int4", "int4", "int4 channel", "int8 row_block:64"),
    "int4 decoded": scheme("fp16", "int4 asymmetric", "int4 group:32 asymmetric", "fp16"),
}
PAGES = {
    "kv-int8": preset("kv-int8"),
    "kv-int4": preset("kv-int4"),
    "kv-int4-kivi": preset("kv-int4-kivi"),
    "int2 a token": scheme("int8", "int2 asymmetric", "int2", "int8 row_block:32"),
    "int4 queries": scheme("int4", "int4", "int4", "uint8 row_block:64"),
}


@pytest.fixture
def for_nvidia(monkeypatch):
    """A call after which plans are those of a GPU; it returns the inline assembly that has run."""

    def switch():
        for module, name in ((launch, "plan"), (pages, "decode_plan")):
            made = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, made=made, **given: made(*a, **given | {"interpreted": False}))
        return inline.allow(monkeypatch)

    return switch


@pytest.mark.parametrize("s", PACKED.values(), ids=PACKED)
def test_attention_on_packed_codes(s, for_nvidia):
    q, k, v = (x.half() for x in qkv(20, 150, 64, 1))
    operands = tq.quantize(q, k, v, s, backend="triton")
    expected = tq.attention(*operands, s, causal=True, backend="triton")
    texts = for_nvidia()
    assert torch.equal(tq.attention(*operands, s, causal=True, backend="triton"), expected) and texts


@pytest.mark.parametrize("s", PAGES.values(), ids=PAGES)
def test_decoding_from_pages(s, for_nvidia):
    [case] = [filled(s, (150, 31), d=32, dtype=torch.float16)]
    expected, lse = case.attend(Features(scale=0.125, causal=True))
    texts = for_nvidia()
    out, other = case.attend(Features(scale=0.125, causal=True))
    assert (out - expected).abs().max() <= 1e-3 * expected.abs().max() and torch.allclose(lse, other, atol=1e-5) and texts
