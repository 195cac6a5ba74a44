"""Within torch.autocast, whatever its type and that of the tensors, every number is what it is outside."""

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant import transforms
from tokquant.autocast import joined

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS = tq.HeadSchemes(((1, tq.preset("int8")), (1, tq.preset("kv-int4-kivi"))))
ENDS = torch.tensor([0, 30, 70], dtype=torch.int32)


def attention(scheme, backend):
    return lambda q, k, v: tq.attention(q, k, v, scheme, causal=True, return_lse=True, backend=backend)


def varlen(scheme, backend):
    lengths = dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS, return_lse=True, backend=backend)
    return lambda *given: tq.attention_varlen(*(x[0].transpose(0, 1) for x in given), scheme, **lengths)


def squared_distance(q, k, v):
    factors = tq.bias.squared_distance(q[0, 0, :, :3].float())
    return factors.q_factors, factors.block(slice(0, 70), slice(0, 70), 70, 70, torch.float32)


CALLS = {
    "attention of the reference": attention("int8", "reference"),
    "attention of the reference in floats": attention("none", "reference"),
    "attention of ranges of heads": attention(HEADS, "cpu"),
    "attention of ranges of heads, of the reference": attention(HEADS, "reference"),
    "packed sequences": varlen("int8-fp16", "reference"),
    "packed sequences in one launch": varlen("int8", "triton"),
    "packed sequences of ranges of heads": varlen(HEADS, "cpu"),
    "dequantized ranges of heads": lambda *given: [x.dequantize() for x in tq.quantize(*given, HEADS)],
    "squared distances": squared_distance,
}


def test_a_device_that_torch_has_no_autocast_for_is_left_alone():
    assert joined([torch.ones(2, 3, device="meta")] * 2, dim=1).shape == (2, 6)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_autocast_changes_no_number(call, dtype, autocast, monkeypatch):
    monkeypatch.setattr(transforms, "PIECE", 4000)  # means of large tensors are joined from pieces
    given = qkv(70, heads=4, kv_heads=2, dtype=dtype)
    outside = call(*given)
    with torch.autocast("cpu", dtype=autocast):
        inside = call(*given)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(inside, outside, strict=True))
