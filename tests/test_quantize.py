"""Quantization, code for code against a slow one in numpy that follows the rule as it is written."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from factories import pairwise, qkv, scheme

from tokquant import attention, quantize
from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.quantize import encode, frames
from tokquant.schemes.granularity import parse
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import canonical, in_blocks, tokens_last
from tokquant.transforms import hadamard, mean_over_blocks

GRANULARITIES = [
    "token",
    "tensor",
    "head",
    "channel",
    "block:16",
    "block:64",
    "channel_block:16",
    "channel_block:128",
    "group:16",
]
INTEGERS = {"int8": (8, 127), "int4": (4, 7), "int2": (2, 1)}
# exponents of the smallest and the largest normal number, bits of mantissa, largest
FLOATS = {"fp8_e4m3": (-6, 8, 3, 448.0), "fp8_e5m2": (-14, 15, 2, 57344.0), "fp4_e2m1": (0, 2, 1, 6.0)}
FORMATS = [f"{name}{kind}" for name in INTEGERS for kind in ("", " asymmetric")] + list(FLOATS)


def grid(name):
    """The numbers of a float format that are not negative, in order: the ones of even mantissa have even indices."""
    lowest, highest, bits, largest = FLOATS[name]
    numbers = [m * 2.0 ** (lowest - bits) for m in range(2**bits)]
    numbers += [(1 + m / 2**bits) * 2.0**e for e in range(lowest, highest + 1) for m in range(2**bits)]
    return np.array([number for number in numbers if number <= largest])


def nearest(x, name):
    numbers = grid(name)
    magnitude = np.abs(x.astype(np.float64))
    above = np.searchsorted(numbers, magnitude).clip(1, len(numbers) - 1)
    low, high = magnitude - numbers[above - 1], numbers[above] - magnitude
    lower = (low < high) | ((low == high) & ((above - 1) % 2 == 0))
    return (np.sign(x) * numbers[np.where(lower, above - 1, above)]).astype(np.float32)


def stored(value, kind, up=False):
    value = np.float32(value)
    if kind == "fp16":
        return np.float32(np.float16(value))
    if kind == "fp8_e4m3":
        numbers = grid(kind)
        return np.float32(numbers[np.searchsorted(numbers, value)]) if up else nearest(np.array([value]), kind)[0]
    return value


def naive(x, words, kind):
    """Codes, scales and zeros (arrays) of float32 `x` by loops over the groups."""
    name, rest = words.split()[0], words.split()[1:]
    b, h, n, d = x.shape
    of, _, size = next(word for word in rest if word != "asymmetric").partition(":")
    size = int(size or 0)
    tokens, channels = {
        "token": (1, d), "head": (n, d), "channel": (n, 1), "block": (size, d), "channel_block": (size, 1), "group": (1, size)
    }.get(of, (n, d))  # fmt: skip
    smallest = {"fp32": 2.0**-126, "fp16": 2.0**-14, "fp8_e4m3": 2.0**-6}[kind]
    shape = (1, 1, 1, 1) if of == "tensor" else (b, h, math.ceil(n / tokens), d // channels)
    scales, zeros, codes = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(x.shape, np.float32)
    for place in np.ndindex(*shape):
        i, j, row, column = place
        group = (slice(i, i + 1), slice(j, j + 1), slice(row * tokens, row * tokens + tokens),
                 slice(column * channels, column * channels + channels))  # fmt: skip
        group = (...,) if of == "tensor" else group
        values = x[group]
        if "asymmetric" in rest:
            bits = INTEGERS[name][0]
            zeros[place] = stored(values.min(), kind)
            step = np.float32(values.max() - zeros[place]) / np.float32(2**bits - 1)
            scales[place] = max(stored(step, kind, up=bits == 8) if step > 0 else 0, smallest)
            codes[group] = np.rint((values - zeros[place]) / scales[place]).clip(0, 2**bits - 1)
            continue
        largest = INTEGERS[name][1] if name in INTEGERS else FLOATS[name][3]
        amax = np.abs(values).max()
        scales[place] = max(stored(amax / np.float32(largest) if amax else 1, kind, up=name == "int8"), smallest)
        scaled = (values / scales[place]).clip(-largest, largest)
        codes[group] = np.rint(scaled) if name in INTEGERS else nearest(scaled, name)
    return codes, scales, zeros


def assert_follows_the_rule(quantized, x, words, kind):
    codes, scales, zeros = naive(x, words, kind)
    assert quantized.scale.dtype == SCALE_TYPES[kind]
    assert np.array_equal(quantized.scale.float().numpy(), scales)
    assert np.array_equal(quantized.code_values().numpy(), codes)
    if "asymmetric" in words:
        assert np.array_equal(quantized.zero.float().numpy(), zeros)
    else:
        assert quantized.zero is None


@pytest.mark.parametrize(
    "granularity, precision, kind, dtype, shape",
    pairwise(
        granularity=GRANULARITIES,
        precision=FORMATS,
        kind=list(SCALE_TYPES),
        dtype=[torch.float32, torch.float16, torch.bfloat16],
        shape=[(33, 70, 32, 4, 1, 2), (16, 16, 48, 2, 2, 1), (3, 1, 16, 2, 1, 2), (5, 129, 80, 3, 3, 1)],
    ),
    ids=str,
)
def test_codes_scales_and_zeros_are_those_of_the_rule(granularity, precision, kind, dtype, shape):
    n_q, n_k, d, heads, kv_heads, batch = shape
    q, k, v = qkv(n_q, n_k, d, heads, kv_heads, batch, dtype)
    words = f"{precision} {granularity}"
    symmetric = words.replace(" asymmetric", "")
    made = scheme(f"{symmetric} scale={kind}", f"{words} scale={kind}", f"{words} scale={kind}")
    qq, kq, vq = quantize(q, k, v, made)
    assert_follows_the_rule(kq, k.float().numpy(), words, kind)
    assert_follows_the_rule(vq, v.float().numpy(), words, kind)
    met = q.float()
    if granularity == "channel":  # K's scale per channel is multiplied into Q
        met = met * kq.scale.float().repeat_interleave(heads // kv_heads, dim=1)
    assert_follows_the_rule(qq, met.numpy(), symmetric, kind)


@pytest.mark.parametrize(
    "granularity, shape",
    [("tensor", (1, 1, 1, 1)), ("head", (2, 3, 1, 1)), ("token", (2, 3, 70, 1)), ("channel", (2, 3, 1, 64)),
     ("block:32", (2, 3, 3, 1)), ("block:128", (2, 3, 1, 1)), ("channel_block:32", (2, 3, 3, 64)), ("group:32", (2, 3, 70, 2))],
    ids=lambda value: str(value) if isinstance(value, str) else "x".join(map(str, value)),
)  # fmt: skip
def test_scales_and_zeros_have_the_shape_of_the_table(granularity, shape):
    _, k, _ = quantize(*qkv(5, 70, 64, 3, batch=2), scheme(k=f"int8 {granularity} asymmetric"))
    assert tuple(k.scale.shape) == tuple(k.zero.shape) == shape
    kind, _, size = granularity.partition(":")
    assert parse({kind: int(size)} if size else kind).scale_shape((2, 3, 70, 64)) == shape


VIEWS = {
    "transposed from [B, N, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "the last dimension strided": lambda x: x.mT.contiguous().mT,
    "every other element of a larger one": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "a slice at an offset": lambda x: torch.nn.functional.pad(x, (3, 1, 5, 2))[:, :, 5:-2, 3:-1],
    "one head expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "one token expanded": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
}


@pytest.mark.parametrize("preset", ["int8", "int4", "kv-int4-kivi", "fireq", "int8-fast"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter(view, preset):
    given = [view(x) for x in qkv(130, 130, 32, heads=2, dtype=torch.bfloat16)]
    assert not all(x.is_contiguous() for x in given)
    for a, b in zip(quantize(*given, preset), quantize(*(x.contiguous() for x in given), preset), strict=True):
        assert a.codes.equal(b.codes)
        assert a.scale is b.scale is None or a.scale.equal(b.scale)
        assert a.dequantize().equal(b.dequantize())


@pytest.mark.parametrize("made", ["none", "int8", "int4", "kv-int4-kivi", "fireq", "fp8-rotated"])
def test_the_inputs_are_not_changed(made):
    given = qkv(40, 56, 32, heads=4, kv_heads=2)
    before = [x.clone() for x in given]
    attention(*given, made, causal=True, backend="reference")
    assert all(x.equal(y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_a_group_of_zeros_has_codes_zero_and_scale_one_or_the_smallest_where_it_has_a_zero(precision, kind):
    q, k, v = qkv(8)
    k[:, :, 3] = 0
    _, kq, _ = quantize(q, k, v, scheme(k=f"{precision} token scale={kind}"))
    expected = torch.finfo(SCALE_TYPES[kind]).smallest_normal if "asymmetric" in precision else 1
    assert (kq.scale[:, :, 3].float() == expected).all()
    assert (kq.code_values()[:, :, 3] == 0).all()
    assert (kq.dequantize()[:, :, 3] == 0).all()
    assert (kq.scale[:, :, 2].float() != 1).all()


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", SCALE_TYPES)
@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 2.0**-126, 1e-37, 1e-7], ids=str)
def test_tiny_values_keep_finite_scales_no_smaller_than_the_smallest_normal(precision, kind, tiny):
    q, k, v = qkv(4)
    k = torch.where(k > 0, tiny, -tiny)
    _, kq, _ = quantize(q, k, v, scheme(k=f"{precision} token scale={kind}"))
    assert (kq.scale.float() >= torch.finfo(SCALE_TYPES[kind]).smallest_normal).all()
    back = kq.dequantize()
    assert back.isfinite().all()
    largest = kq.scale.float() * (1 if precision in INTEGERS or "asymmetric" in precision else 2**-3 * kq.spec.format.largest)
    assert ((back - k).abs() <= largest + tiny).all()


def test_an_fp8_scale_of_eight_bit_codes_is_never_smaller_than_the_exact_one():
    k = torch.linspace(0.1, 50000, 4000)[None, None, :, None] * torch.ones(16)
    spec = scheme(k="int8 token scale=fp8_e4m3").k
    exact = k.amax(dim=3, keepdim=True) / torch.tensor(127.0)
    scale = encode(k, k.dtype, spec).scale
    assert (scale.float() >= exact).all()
    normal = exact >= 2**-6
    below = (scale.view(torch.uint8) - 1).view(torch.float8_e4m3fn).float()
    assert (below < exact)[normal].all(), "and the next smaller one would be"
    four = scheme(k="int4 token scale=fp8_e4m3").k
    rounded = encode(k[:, :, :200], k.dtype, four).scale.float()
    assert (rounded < k[:, :, :200, :1] / 7).any(), "a scale of four-bit codes is rounded to the nearest"


@pytest.mark.parametrize(
    "words, value, what",
    [
        ("int8 token scale=fp16", 1e8, "scale"),
        ("int2 head scale=fp8_e4m3", 500.0, "scale"),
        ("int8 token scale=fp8_e4m3", 448.5 * 127, "scale"),
        ("int4 token asymmetric scale=fp8_e4m3", -500.0, "zero"),
        ("int8 token asymmetric scale=fp16", -1e6, "zero"),
    ],
    ids=str,
)
def test_a_scale_that_cannot_hold_its_group_is_an_error(words, value, what):
    q, k, v = qkv(4)
    k[0, 0, 2, :2] = torch.tensor(value)
    with pytest.raises(ValueError, match=rf"k: a {what} of .* does not fit scale_dtype .*; use"):
        quantize(q, k, v, scheme(k=words))


@pytest.mark.parametrize("kind", ["fp16", "fp8_e4m3"])
def test_the_largest_number_of_a_scale_type_is_a_scale_and_a_zero(kind):
    largest = torch.finfo(SCALE_TYPES[kind]).max
    q, k, v = qkv(4)
    k[0, 0, 2, 0], v[0, 0, 2, 0] = 127 * largest, -largest
    _, kq, vq = quantize(q, k, v, scheme(k=f"int8 token scale={kind}", v=f"int4 token asymmetric scale={kind}"))
    assert kq.scale[0, 0, 2].item() == largest
    assert vq.zero[0, 0, 2].item() == -largest


def test_a_group_that_spans_more_than_float32_is_an_error():
    q, k, v = qkv(4)
    k[0, 0, 2, :2] = torch.tensor([-3e38, 3e38])
    with pytest.raises(ValueError, match=r"k: values from -3e\+38 to 3e\+38 span more than float32 holds"):
        quantize(q, k, v, scheme(k="int8 token asymmetric"))


@pytest.mark.parametrize("granularity", ["channel", "channel_block:64", "head", "block:64", "token"])
@pytest.mark.parametrize("value", [0.0, 0.01, -30.0])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_asymmetric_group_of_one_value_is_that_value_in_the_output(precision, value, granularity):
    q, k, v = qkv(20, 192, 32)
    v[..., 0] = value
    if granularity in ("head", "block:64", "token"):
        v[:, :, :64] = value
    made = scheme("int8", "int8", f"{precision} {granularity} asymmetric", "int8 row_block:64")
    out = attention(q, k[:, :, :64], v[:, :, :64], made, backend="reference")
    assert (out[..., 0] - value).abs().max() <= 1e-5 * abs(value) + 1e-6


def test_a_value_beyond_fp16_after_balancing_is_an_error():
    q, k, v = qkv(64, dtype=torch.float16)
    k[0, 0, 0, 0] = 3000
    with pytest.raises(ValueError, match=r"q: a value of .* does not fit fp16; use bfloat16 tensors, or leave out balance"):
        quantize(300 * q, k, v, scheme("fp16", "int8", "fp16", "fp16", balance="rope_pairs"))


def test_a_value_beyond_fp16_is_an_error_where_fp16_stores_it():
    q, k, v = qkv(4)
    v[0, 0, 1, 1] = 7e4
    with pytest.raises(ValueError, match=r"v: a value of 7e.04 does not fit fp16; use precision: bf16"):
        quantize(q, k, v, "int8-fp16")


@pytest.mark.parametrize("precision", ["int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1"])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_static_scales_are_used_as_they_are_and_codes_clamp(precision, granularity):
    q, k, v = qkv(20, d=16, batch=2)
    shape = {"tensor": (1, 1, 1), "head": (2, 1, 1), "channel": (2, 1, 16)}[granularity]
    scale = torch.rand(shape) + 0.5
    words = f"{precision} {granularity} static"
    k[0, 0, 0, 0], k[1, 1, 5, 3] = 1e6, -1e6
    _, kq, _ = quantize(q, k, v, scheme(k=words), scales=LayerScales("layer", {"k_scale": scale}))
    largest = INTEGERS[precision][1] if precision in INTEGERS else FLOATS[precision][3]
    assert kq.code_values()[0, 0, 0, 0] == largest
    assert kq.code_values()[1, 1, 5, 3] == -largest
    expected = (k / scale).clamp(-largest, largest).numpy()
    expected = np.rint(expected) if precision in INTEGERS else nearest(expected, precision)
    assert np.array_equal(kq.code_values().numpy(), expected)


def test_static_scales_with_a_zero_clamp_at_both_ends():
    q, k, v = qkv(20)
    scales = LayerScales("layer", {"v_scale": torch.tensor([[[0.1]], [[0.2]]]), "v_zero": torch.tensor([[[-0.5]], [[0.25]]])})
    _, _, vq = quantize(q, k, v, scheme(v="int4 head asymmetric static"), scales=scales)
    expected = ((v - scales.tensors["v_zero"]) / scales.tensors["v_scale"]).round().clamp(0, 15)
    assert vq.code_values().equal(expected)
    assert {0, 15} <= set(expected.unique().tolist())


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantizing_what_was_dequantized_gives_the_codes_again(precision, granularity):
    spec = scheme(k=f"{precision} {granularity}").k
    x = encode(qkv(70, d=48)[1], torch.float32, spec)
    again = encode(x.dequantize(), torch.float32, spec)
    assert again.codes.view(torch.uint8).equal(x.codes.view(torch.uint8))
    assert torch.allclose(again.scale, x.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", [name for name in FORMATS if name not in FLOATS])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dequantizing_errs_by_half_a_step_at_most(precision, granularity):
    k = qkv(70, d=48)[1]
    x = encode(k, torch.float32, scheme(k=f"{precision} {granularity}").k)
    error = (x.dequantize(torch.float64) - k.double()).abs()
    ulps = 2.0**-22 * k.abs().amax()
    assert (error <= x.spread(x.scale) * 0.5 + ulps).all()
    assert (error > x.spread(x.scale) * 0.4).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dequantizing_gives_the_type_that_is_asked_for_or_the_tensors_own(dtype):
    _, x, _ = quantize(*qkv(20, dtype=dtype), scheme(k="int8 token asymmetric mean"))
    exact = x.code_values().double() * x.scale.double() + x.zero.double() + x.offset.double()
    assert x.dequantize().dtype == dtype
    assert torch.equal(x.dequantize(torch.float64), exact)
    assert torch.equal(x.dequantize(torch.bfloat16), x.dequantize(torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_codes_of_smoothed_keys_are_those_of_the_keys_less_their_rounded_mean(dtype):
    q, k, v = qkv(40, 70, 32, heads=4, kv_heads=2, dtype=dtype)
    _, kq, vq = quantize(q, k, v, scheme(k="int8 token mean", v="int8 channel mean"))
    kept = torch.bfloat16 if dtype == torch.float32 else dtype
    for x, quantized, words in ((k, kq, "int8 token"), (v, vq, "int8 channel")):
        mean = torch.from_numpy(x.float().numpy().astype(np.float64).mean(axis=2, keepdims=True))
        assert quantized.offset.dtype == kept
        assert torch.allclose(quantized.offset.double(), mean, rtol=torch.finfo(kept).eps, atol=1e-7)
        assert not torch.allclose(quantized.offset.double(), mean, rtol=1e-7, atol=0)
        assert_follows_the_rule(quantized, (x.float() - quantized.offset.float()).numpy(), words, "fp32")


def test_a_static_offset_is_subtracted_as_it_is():
    q, k, v = qkv(40, batch=2)
    offset = torch.randn(2, 1, 32).half()
    _, kq, _ = quantize(q, k, v, scheme(k="int8 token static_offset"), scales=LayerScales("layer", {"k_offset": offset}))
    assert kq.offset.equal(offset.expand(2, -1, -1, -1))
    assert_follows_the_rule(kq, (k - offset.float()).numpy(), "int8 token", "fp32")


def test_rotated_codes_are_those_of_the_rotated_tensors():
    q, k, v = qkv(40, d=48)
    qq, kq, vq = quantize(q, k, v, scheme("int8 token", "int4 token mean", "int8 head", rotate="hadamard", rotate_v="hadamard"))
    assert_follows_the_rule(qq, hadamard(q).numpy(), "int8 token", "fp32")
    assert_follows_the_rule(kq, hadamard(k - kq.offset.float()).numpy(), "int4 token", "fp32")
    assert_follows_the_rule(vq, hadamard(v).numpy(), "int8 head", "fp32")


@pytest.mark.parametrize("balance", ["channel", "rope_pairs"])
def test_balanced_codes_are_those_of_keys_times_and_queries_over_the_factor(balance):
    q, k, v = qkv(40, 30, 32, heads=4, kv_heads=2)
    made = scheme("int8 token", "int8 token mean", balance=balance)
    qq, kq, _ = quantize(q, k, v, made)
    _, frame, _ = frames(q, k, v, made)
    assert_follows_the_rule(kq, ((k - kq.offset.float()) * frame.balance).numpy(), "int8 token", "fp32")
    assert_follows_the_rule(qq, (q * (1 / frame.balance).repeat_interleave(2, dim=1)).numpy(), "int8 token", "fp32")


@pytest.mark.parametrize(
    "rule, d, message",
    [({}, 33, "balance: rope_pairs needs an even head_dim, not 33"),
     ({"top_k": 33}, 32, "balance.rope_pairs.top_k: 33 is more than the 32 channels of a head")],
    ids=["odd", "top_k"],
)  # fmt: skip
def test_a_balance_that_does_not_fit_the_head_is_an_error(rule, d, message):
    with pytest.raises(SchemeError, match=message):
        quantize(*qkv(4, d=d), scheme(balance={"rope_pairs": rule}))
    quantize(*qkv(4, d=32), scheme(balance={"rope_pairs": {"top_k": 32}}))


def test_block_means_are_those_of_128_queries_and_the_last_block_is_its_own():
    q, k, v = qkv(300, 40, 32, dtype=torch.float16)
    qq, kq, _ = quantize(q, k, v, scheme("int4 token block_mean", "int4 token mean"))
    means = [q[:, :, start : start + 128].double().mean(dim=2) for start in (0, 128, 256)]
    assert qq.offset.dtype == torch.float16 and qq.offset.shape == (1, 2, 3, 32)
    assert torch.allclose(qq.offset.double(), torch.stack(means, dim=2), rtol=2**-10, atol=1e-6)
    assert qq.offset.equal(mean_over_blocks(q))
    spread = qq.offset.float()[:, :, torch.arange(300) // 128]
    assert_follows_the_rule(qq, (q.float() - spread).numpy(), "int4 token", "fp32")
    assert kq.companion.equal((k.float() - kq.offset.float()).half())


def test_the_queries_carry_their_products_with_the_offset_of_the_keys():
    q, k, v = qkv(10, 20, 32, heads=4, kv_heads=2)
    qq, kq, _ = quantize(q, k, v, scheme("int4 token", "int8 token mean"))
    expected = (q.double() * kq.offset.double().repeat_interleave(2, dim=1)).sum(dim=3, keepdim=True)
    assert torch.allclose(qq.logit_offset.double(), expected, rtol=1e-5, atol=1e-5)
    assert quantize(q, k, v, scheme("int4 token", "int8 token"))[0].logit_offset is None


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8_e4m3"])
def test_queries_carry_the_sums_of_their_codes_where_keys_have_zeros(precision):
    q, k, v = qkv(10, 20)
    qq, _, _ = quantize(q, k, v, scheme(f"{precision} token", "int4 token asymmetric"))
    assert qq.code_sum.equal(qq.code_values().sum(dim=3, keepdim=True))
    assert quantize(q, k, v, scheme(f"{precision} token", "int4 token"))[0].code_sum is None


def test_values_carry_the_sums_of_their_codes_in_each_key_tile_where_p_is_unsigned():
    q, k, v = qkv(10, 300)
    _, _, vq = quantize(q, k, v, scheme(v="int8 channel", p="uint8 row_block:128"), backend="reference")
    codes = vq.codes.long()
    tiles = [codes[:, :, start : start + 128].sum(dim=2) for start in (0, 128, 256)]
    assert vq.code_sum.dtype == torch.int32
    assert vq.code_sum.long().equal(torch.stack(tiles, dim=2))
    assert quantize(q, k, v, scheme(v="int8 channel", p="int8 row_block:128"))[2].code_sum is None


@pytest.mark.parametrize(
    "words, tiles", [("int8 channel", None), ("int8 block:128", [0, 0, 1, 1, 2]), ("int8 channel_block:64", range(5))]
)
def test_what_a_signed_unit_lacks_is_the_sum_of_codes_times_the_zero_of_p_and_the_scale_of_a_block(words, tiles):
    made = scheme(v=words, p="uint8 row_block:64")
    _, _, vq = quantize(*qkv(10, 300), made, backend="reference")
    expected = vq.code_sum * float(made.p.format.code_zero)
    expected = expected if tiles is None else expected * vq.scale[:, :, list(tiles)]
    assert expected.any() and vq.correction.shape == (1, 2, 5, 32) and torch.allclose(vq.correction, expected, rtol=1e-6)
    assert quantize(*qkv(10, 300), scheme(v=words, p="int8 row_block:64"), backend="reference")[2].correction is None


def test_what_a_cuda_graph_would_compute_is_not_kept(monkeypatch):
    _, _, v = quantize(*qkv(10, 300), scheme(v="int8 asymmetric", p="uint8 row_block:64"), backend="reference")
    names = ("origin", "inverse_weight", "origin_over_weight", "correction")
    with monkeypatch.context() as patch:
        patch.setattr("tokquant.tensor.capturing", lambda device: True)
        captured = [getattr(v, name) for name in names]
    for name, made in zip(names, captured, strict=True):
        assert getattr(v, name) is not made and torch.equal(getattr(v, name), made)
        assert getattr(v, name) is getattr(v, name)


@pytest.mark.parametrize("n", [5, 70])
@pytest.mark.parametrize("words", ["int8", "int4 asymmetric", "int2", "fp8_e4m3", "fp4_e2m1 group:16", "fp16"])
def test_codes_in_another_layout_are_the_same_codes(words, n):
    made = scheme("int8", "int8", words, "int8")
    _, _, vq = quantize(*qkv(7, n), made, backend="reference")
    others = [in_blocks(vq, made)]
    if vq.spec.scaled:
        others += [tokens_last(vq), in_blocks(tokens_last(vq), made)]
    for other in others:
        assert other.layout != "canonical" and not torch.equal(other.codes.flatten(), vq.codes.flatten())
        assert torch.equal(other.stored_values(), vq.stored_values())
    assert torch.equal(canonical(in_blocks(vq, made)).codes.view(torch.uint8), vq.codes.view(torch.uint8))


@pytest.mark.parametrize(
    "words, bits",
    [
        ("fp32", 32),
        ("int8 token", 8 + 32 / 64),
        ("int8 token scale=fp16", 8 + 16 / 64),
        ("int4 token asymmetric scale=fp16", 4 + 32 / 64),
        ("int4 token scale=fp8_e4m3", 4 + 8 / 64),
        ("int2 group:32 asymmetric scale=fp16", 2 + 1),
        ("int4 channel_block:32 asymmetric scale=fp16", 4 + 1),
        ("int8 block:128", 8 + 32 / (128 * 64)),
        ("fp4_e2m1 group:16 scale=fp8_e4m3", 4 + 0.5),
    ],
)
def test_bits_and_bytes_are_those_of_what_is_stored(words, bits):
    q, k, v = qkv(256, d=64)
    _, kq, _ = quantize(q, k, v, scheme(k=words))
    assert kq.bits_per_value == bits
    assert kq.nbytes == 2 * 256 * 64 * bits / 8
    assert kq.spec.bits_per_value(64) == bits
    _, smoothed, _ = quantize(q, k, v, scheme(k=f"{words} mean"))
    assert smoothed.nbytes == kq.nbytes + 2 * 64 * 2
    assert smoothed.bits_per_value == bits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_what_is_not_finite_stays_in_its_token(kind, precision, value):
    spec = scheme(k=f"{precision} token scale={kind}").k
    clean = qkv(20)[1]
    dirty = clean.clone()
    dirty[0, 1, 7, 5] = value
    a, b = encode(clean, clean.dtype, spec), encode(dirty, clean.dtype, spec)
    others = torch.ones(1, 2, 20, dtype=torch.bool)
    others[0, 1, 7] = False
    assert a.codes.view(torch.uint8)[others].equal(b.codes.view(torch.uint8)[others])
    assert a.scale[others].float().equal(b.scale[others].float())
    assert not b.dequantize()[0, 1, 7].isfinite().all()
    assert b.dequantize()[others].equal(a.dequantize()[others])


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deep", "pickle"]
)
@pytest.mark.parametrize("name", ["fp8", "fireq", "kv-int4-kivi", "int8"])
def test_operands_are_copied_and_pickled(name, again):
    operands = quantize(*qkv(), name, backend="reference")
    same = [again(x) for x in operands]
    for x, y in zip(operands, same, strict=True):
        assert x.codes.dtype == y.codes.dtype and (x.scale is None or x.scale.dtype == y.scale.dtype)
        assert torch.equal(x.dequantize(), y.dequantize())
    assert torch.equal(attention(*same, name, backend="reference"), attention(*operands, name, backend="reference"))
