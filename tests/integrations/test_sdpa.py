"""tokquant.scaled_dot_product_attention means what torch's does: with an exact scheme it gives the same numbers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import tokquant as tq

INF = float("inf")


def x(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def some(*shape):
    """A mask in which row 2 attends to nothing."""
    mask = x(*shape) > -0.2
    mask[..., 2, :] = False
    return mask


Q, K, V = x(2, 4, 6, 16), x(2, 4, 9, 16, seed=1), x(2, 4, 9, 16, seed=2)
CASES = {
    "batches of heads": ((Q, K, V), {}),
    "fewer queries than keys, causal from the top left": ((Q, K, V), {"is_causal": True}),
    "more queries than keys, causal from the top left": ((K, Q, Q), {"is_causal": True}),
    "a boolean mask with an empty row": ((Q, K, V, some(6, 9)), {}),
    "a mask of keys": ((Q, K, V, some(2, 1, 6, 9)[..., :1, :]), {}),
    "a mask of queries": ((Q, K, V, x(6, 1)), {}),
    "floats that mask, with an empty row": ((Q, K, V, torch.where(some(4, 6, 9), x(4, 6, 9), -INF)), {}),
    "a mask and causal": ((Q, K, V, some(6, 9)), {"is_causal": True}),
    "a mask and causal, more queries": ((K, Q, Q, some(9, 6)), {"is_causal": True}),
    "a mask of queries and causal": ((Q, K, V, x(6, 1)), {"is_causal": True}),
    "a scale": ((Q, K, V), {"scale": 0.7}),
    "a scale of zero": ((Q, K, V), {"scale": 0.0}),
    "tokens alone": ((x(6, 16), x(9, 16), x(9, 16)), {}),
    "tokens alone, a mask": ((x(6, 16), x(9, 16), x(9, 16), some(6, 9)), {}),
    "heads alone": ((Q[0], K[0], V[0], some(4, 6, 9)), {}),
    "heads alone, causal": ((Q[0], K[0], V[0]), {"is_causal": True}),
    "keys of all batches": ((Q, K[0], V[:1]), {}),
    "five dimensions that broadcast": ((x(2, 1, 4, 6, 16), x(2, 3, 4, 9, 16), x(1, 1, 4, 9, 16)), {}),
    "five dimensions, a mask of one": ((x(2, 1, 4, 6, 16), x(2, 3, 4, 9, 16), x(2, 3, 4, 9, 16), x(3, 1, 6, 9)), {}),
    "five dimensions, a mask of all": ((x(2, 1, 4, 6, 16), x(2, 3, 4, 9, 16), x(2, 3, 4, 9, 16), x(6, 9)), {}),
    "one head of keys": ((Q, K[:, :1], V[:, :1]), {}),
    "one head of queries": ((Q[:, :1], K, V), {}),
    "one head of keys, four of values": ((Q, K[:, :1], V), {}),
    "heads that share keys": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True, "is_causal": True}),
    "heads alone that share keys": ((Q[0], K[0, :2], V[0, :2]), {"enable_gqa": True}),
    "narrow values": ((Q, K, V[..., :5]), {}),
    "wide values": ((Q[..., :6], K[..., :6], V), {}),
    "no queries": ((Q[:, :, :0], K, V), {}),
    "no keys": ((Q, K[:, :, :0], V[:, :, :0]), {}),
    "no queries, a mask": ((Q[:, :, :0], K, V, some(2, 1, 6, 9)[:, :, :0]), {}),
    "no keys, a mask": ((Q, K[:, :, :0], V[:, :, :0], x(2, 4, 6, 1)), {}),
    "float16": ((Q.half(), K.half(), V.half()), {}),
    "bfloat16": ((Q.bfloat16(), K.bfloat16(), V.bfloat16(), some(6, 9)), {}),
}


def torchs(q, k, v, mask=None, *, is_causal=False, **how):
    if mask is not None and is_causal:  # torch 2.15 refuses the two together
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -INF)
        is_causal = False
    return torch_attention(q, k, v, mask, is_causal=is_causal, **how)


@pytest.mark.parametrize(("operands", "how"), CASES.values(), ids=CASES)
def test_an_exact_scheme_gives_torchs_numbers(operands, how):
    kept = [each.clone() for each in operands]
    made = tq.scaled_dot_product_attention(*operands, **how, scheme="none", backend="reference")
    expected = torchs(*operands, **how)
    near = 1e-5 if operands[0].dtype == torch.float32 else torch.finfo(operands[0].dtype).eps
    torch.testing.assert_close(made, expected, atol=near, rtol=near)
    assert all(torch.equal(before, after) for before, after in zip(kept, operands, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("types", ["float32 float32 bfloat16", "float16 bfloat16 float32", "float32 float32 float32"])
def test_within_autocast_operands_take_its_type_as_they_do_in_torch(types, dtype):
    given = [x.to(getattr(torch, kind)) for x, kind in zip((Q, K, V), types.split(), strict=True)]
    cast = [x.to(dtype) for x in given]
    with torch.autocast("cpu", dtype):
        found, torchs = tq.scaled_dot_product_attention(*given, scheme="int8"), torch_attention(*given)
        with tq.quantized_sdpa("int8"):
            assert torch.equal(torch_attention(*given), found)
    assert found.dtype == torchs.dtype == dtype
    assert torch.equal(found, tq.scaled_dot_product_attention(*cast, scheme="int8"))


def test_within_autocast_float64_stays_what_it_is_and_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"torch\.float64 is not supported"):
        tq.scaled_dot_product_attention(Q.double(), K.double(), V.double())


def test_it_is_attention_by_the_scheme():
    made = tq.scaled_dot_product_attention(Q, Q, Q, is_causal=True, scheme="int4", backend="reference")
    assert torch.equal(made, tq.attention(Q, Q, Q, "int4", causal=True, backend="reference"))
    assert not torch.equal(made, torch_attention(Q, Q, Q, is_causal=True))


def test_a_map_takes_the_layer():
    schemes = tq.SchemeMap((("a", tq.preset("int8")), ("b", tq.preset("int4"))))
    made = tq.scaled_dot_product_attention(Q, K, V, scheme=schemes, layer="b", backend="reference")
    assert torch.equal(made, tq.scaled_dot_product_attention(Q, K, V, scheme="int4", backend="reference"))


def test_keys_that_no_query_sees_are_not_quantized():
    k, v = K.clone(), V.clone()
    k[:, :, 6:], v[:, :, 6:] = 1e4, float("nan")
    seen, unseen = (tq.scaled_dot_product_attention(Q, *keys, is_causal=True, backend="reference") for keys in ((K, V), (k, v)))
    assert torch.equal(seen, unseen)


def test_channels_of_zeros_leave_the_codes_of_the_others_alone():
    v = V[..., :8]
    made = tq.scaled_dot_product_attention(Q, K, v, backend="reference")
    padded = torch.cat([v, torch.zeros_like(v)], dim=-1)
    assert torch.equal(made, tq.attention(Q, K, padded, "int8", backend="reference")[..., :8])


def test_a_row_masked_by_the_lowest_float_is_empty_where_torch_gives_the_mean():
    mask = torch.zeros(6, 9)
    mask[2] = torch.finfo(torch.float32).min
    made = tq.scaled_dot_product_attention(Q, K, V, mask, scheme="none", backend="reference")
    expected = torch_attention(Q, K, V, mask)
    torch.testing.assert_close(expected[:, :, 2], V.mean(dim=2))
    assert not made[:, :, 2].any()
    torch.testing.assert_close(made[:, :, 3:], expected[:, :, 3:])


BAD = {
    "dropout": (tq.UnsupportedError, {"dropout_p": 0.1}, "dropout_p: 0.1; quantized attention has no dropout"),
    "a list": (TypeError, {"key": [1.0]}, "key: a list; give a torch.Tensor"),
    "one dimension": (ValueError, {"query": x(16)}, r"query: shape \[16\]; give"),
    "a gradient": (RuntimeError, {"value": x(2, 4, 9, 16).requires_grad_()}, "value: requires grad"),
    "float64": (TypeError, {"query": Q.double(), "key": K.double(), "value": V.double()}, "torch.float64 is not supported"),
    "differing types": (TypeError, {"key": K.half()}, "types torch.float32, torch.float16"),
    "other channels": (ValueError, {"key": K[..., :8]}, "key: 8 channels, and query has 16"),
    "other tokens": (ValueError, {"value": V[:, :, :8]}, "value: 8 tokens, and key has 9"),
    "other heads": (ValueError, {"key": K[:, :2], "value": V[:, :2]}, "key: 2 heads, .* enable_gqa=True"),
    "heads that do not divide": (
        ValueError,
        {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
        "key: 3 heads do not divide the 4 of query",
    ),
    "keys and values of other heads": (
        ValueError,
        {"key": K[:, :2], "enable_gqa": True},
        "value: 4 heads, and key has 2; give as many",
    ),
    "a word for a bool": (TypeError, {"is_causal": "no"}, "is_causal: 'no' is not a bool"),
    "other batches": (ValueError, {"key": x(3, 4, 9, 16)}, r"before heads, \[2\], \[3\], \[2\], do not broadcast"),
    "a mask too large": (ValueError, {"attn_mask": torch.zeros(3, 1, 6, 9)}, r"attn_mask: shape \[3, 1, 6, 9\] does not"),
    "a mask of integers": (TypeError, {"attn_mask": torch.zeros(6, 9).int()}, "torch.int32 is no mask"),
    "a list as mask": (TypeError, {"attn_mask": [True]}, "attn_mask: a list"),
    "an unknown scheme": (tq.SchemeError, {"scheme": "int88"}, "did you mean 'int8'"),
    "scales that are missing": (tq.ScalesError, {"scheme": "kv-fp8"}, "needs k_scale, v_scale"),
}


@pytest.mark.parametrize(("error", "changes", "text"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_by_name(error, changes, text):
    with pytest.raises(error, match=text):
        tq.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, **changes})


def test_it_compiles_as_one_operator():
    mask = some(6, 9)
    call = lambda q: tq.scaled_dot_product_attention(q, K, V, mask, is_causal=True, backend="reference")  # noqa: E731
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(Q), call(Q))
