"""Generated kernels in the interpreter, against the emulation and against float64 on the same codes."""

import itertools
from dataclasses import replace

import pytest
import torch
from factories import (
    CASES,
    SCHEMES,
    bounds,
    exact_operands,
    fits,
    gpu_rounding,
    integer_scores,
    nan_filled,
    pairwise,
    qkv,
    scheme,
)

import tokquant as tq
from tokquant.features import Features
from tokquant.inputs import features_of
from tokquant.kernels import launch
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import plan
from tokquant.precisions.base import tl, triton
from tokquant.reference import oracle
from tokquant.schemes import preset


def marks(number, place):
    """Every scheme meets a third of the cases, and every case a third of the schemes; all where slow tests run, one as PTX."""
    if (number + place) % 3:
        return pytest.mark.slow
    return pytest.mark.ptx if place // 3 == number // 3 % 6 else ()


CROSS = [
    pytest.param(s, *case, id=f"{name} | {case_name}", marks=marks(number, place))
    for number, (name, s) in enumerate(SCHEMES.items())
    for place, (case_name, case) in enumerate(CASES.items())
    if fits(s, case[0][2])
]


@pytest.mark.parametrize(("s", "shape", "given"), CROSS)
def test_kernel_agrees_with_the_emulation_and_with_float64_on_the_same_codes(s, shape, given, monkeypatch):
    operands = tq.quantize(*qkv(*shape), s, backend="triton")
    monkeypatch.setattr(launch.torch, "empty", nan_filled)  # what is not written would show
    out, lse = tq.attention(*operands, s, return_lse=True, backend="triton", **given)
    monkeypatch.undo()
    expected, expected_lse = tq.attention(*operands, s, return_lse=True, backend="reference", **given)
    # a code of P may fall on the other side of a tie: one step in a few rows
    reach = operands[2].dequantize().abs().max()
    step = 2**-3 if s.p.precision.startswith("fp8") else 1 / (s.p.format.largest or 1024)
    more = gpu_rounding(out, s)
    assert (out - expected).abs().max() <= (step + more) * reach
    assert (out - expected).abs().mean() <= (1e-4 + more) * reach
    assert torch.allclose(lse, expected_lse, atol=(2e-5 if s.normalizer == "exact" else 2e-2) + 4 * more, rtol=1e-5)
    features = features_of(*operands[:2], **given)
    exact, exact_lse = oracle(*exact_operands(*operands), features)
    largest_error, largest_lse_error = bounds(operands, s, features)
    assert bool(((out - exact).abs() <= largest_error + more * reach).all())
    assert bool(((lse - exact_lse).abs() <= largest_lse_error + 4 * more)[exact_lse.isfinite()].all())


@pytest.mark.parametrize("n", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("s", [SCHEMES["int8"], SCHEMES["fp8"]], ids=["int8", "fp8"])
def test_v_in_the_layout_of_a_kernel_is_the_same_v(s, n):
    operands = qkv(20, n, 48, 4, 2)
    packed, canonical = (tq.quantize(*operands, s, backend=backend) for backend in ("triton", "reference"))
    assert packed[2].layout == "tokens_last" and packed[2].codes.shape == (1, 2, 48, -(-n // 16) * 16)
    assert torch.equal(packed[2].stored_values(), canonical[2].stored_values())
    assert torch.equal(packed[2].dequantize(), canonical[2].dequantize())
    outs = [tq.attention(*x, s, backend=backend) for x in (packed, canonical) for backend in ("triton", "reference")]
    assert torch.equal(outs[1], outs[3]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("given", [dict(causal=True), dict(window=(20, 9)), {}], ids=["causal", "window", "full"])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 128), (128, 128), (129, 257), (300, 130), (255, 640)])
def test_whole_tiles_and_edges_meet_at_every_length(n_q, n_k, given):
    q, k, v = qkv(n_q, n_k, 32, 1)
    out = tq.attention(q, k, v, "int8-fp16", backend="triton", **given)
    assert torch.allclose(out, tq.attention(q, k, v, "int8-fp16", backend="reference", **given), atol=1e-3)


# the axes of FlashAttention's own tests, every two of whose values meet
LENGTHS = [(1, 1), (1, 239), (3, 799), (127, 512), (113, 203), (128, 217), (108, 256), (256, 512), (512, 256), (1023, 1024)]
AXES = pairwise(
    lengths=LENGTHS,
    name=["int8", "int8-fast", "int8-fp16", "int8-fp8", "int-flash", "fp8", "kv-int8", "kv-int4", "int4", "none"],
    head_dim=[32, 40, 59, 64, 96, 111, 128, 160, 192, 256],
    heads=[(2, 2), (6, 2), (4, 1)],
    given=[{}, dict(causal=True), dict(window=(64, 64)), dict(causal=True, softcap=15.0)],
    dtype=[torch.float16, torch.float32],
)
# a third of them, but no more than two heads of a thousand queries, which run the same lines as fewer
AXES = [
    pytest.param(
        *row, id=f"{row[1]}, {row[0][0]} by {row[0][1]}, head_dim {row[2]}, heads {row[3]}, {row[4] or 'full'}, {row[5]}",
        marks=[] if number % 3 == 0 and (row[0] != LENGTHS[-1] or row[3] == (2, 2)) else pytest.mark.slow,
    )
    for number, row in enumerate(AXES)
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "name", "head_dim", "heads", "given", "dtype"), AXES)
def test_kernels_over_the_axes_of_flash_attention(lengths, name, head_dim, heads, given, dtype):
    s = preset(name)
    operands = tq.quantize(*qkv(*lengths, head_dim, *heads, dtype=dtype), s, backend="triton")
    out, lse = tq.attention(*operands, s, return_lse=True, backend="triton", **given)
    expected, expected_lse = tq.attention(*operands, s, return_lse=True, backend="reference", **given)
    reach = operands[2].dequantize().abs().max()
    step = 2**-3 if s.p.precision.startswith("fp8") else 1 / (s.p.format.largest or 512)
    assert (out - expected).abs().max() <= step * reach
    assert (out.float() - expected.float()).abs().mean() <= 3e-4 * reach
    assert torch.allclose(lse, expected_lse, atol=3e-5 if s.normalizer == "exact" else 2e-2, rtol=1e-5)


@triton.jit
def scores_of_a_tile(q, k, out, DECODE_Q: tl.constexpr, LAY_Q: tl.constexpr, DECODE_K: tl.constexpr, LAY_K: tl.constexpr,
                     PRODUCT: tl.constexpr, N: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr):  # fmt: skip
    i = tl.arange(0, N)
    q_tile = LAY_Q(DECODE_Q(tl.load(q + i[:, None] * Q_WIDTH + tl.arange(0, Q_WIDTH)[None, :])))
    k_tile = LAY_K(DECODE_K(tl.load(k + i[:, None] * K_WIDTH + tl.arange(0, K_WIDTH)[None, :])))
    tl.store(out + i[:, None] * N + i[None, :], PRODUCT(q_tile, tl.trans(k_tile)))


@pytest.mark.parametrize(("a", "b"), list(itertools.product(["int8", "int4", "int2"], repeat=2)), ids=lambda x: x)
def test_integer_scores_of_a_kernel_and_the_emulation_are_equal(a, b):
    s = scheme(a, b, "int8", "int8")
    operands = tq.quantize(*(3 * torch.randn(1, 1, 64, 128) for _ in range(3)), s, backend="reference")
    made = plan(s, head_dim=128, dtype=torch.float32, interpreted=True)
    holes = [made.holes[name] for name in ("decode_q", "lay_q", "decode_k", "lay_k", "product_k")]
    out = torch.full((64, 64), float("nan"))
    q, k = operands[0].codes[0, 0], operands[1].codes[0, 0]
    if made.constants["PLANES"]:
        q = q.reshape(64, -1, operands[1].spec.format.packed).mT.reshape(64, 128).contiguous()
    scores_of_a_tile[(1,)](q, k, out, *holes, 64, q.shape[1], k.shape[1])
    assert torch.equal(out.int(), integer_scores(operands[0], operands[1])[0, 0])


@pytest.mark.parametrize("s", [SCHEMES[name] for name in ("int8", "int-flash", "none")], ids=["int8", "int-flash", "none"])
def test_extreme_logits_stay_finite_and_right(s):
    q = torch.randn(1, 1, 64, 64) * 1e3
    k, v = torch.randn(1, 1, 200, 64) * 1e2, torch.randn(1, 1, 200, 64)
    operands = tq.quantize(q, k, v, s)
    out, lse = tq.attention(*operands, s, return_lse=True, backend="triton")
    expected, _ = tq.attention(*operands, s, return_lse=True, backend="reference")
    assert lse.abs().max() > 1e5 and bool(out.isfinite().all())
    assert (out - expected).abs().max() <= 0.02 * v.abs().max()


@pytest.mark.parametrize("name", ["none", "int8-fp16", "kv-fp8", "int-flash-half"])
def test_a_tile_of_keys_at_minus_infinity_is_none_of_the_others_concern(name):
    s = scheme("fp16", "fp16", "fp16", "fp16") if name == "kv-fp8" else preset(name)
    q, k, v = torch.full((1, 1, 20, 32), 10.0), torch.randn(1, 1, 300, 32), torch.randn(1, 1, 300, 32)
    if s.k.scaled:
        k[:, :, :128] *= 1e-3
    else:
        k[:, :, :128, 0] = -torch.inf
    out, expected = (tq.attention(q, k, v, s, backend=backend) for backend in ("triton", "reference"))
    assert bool(out.isfinite().all()) and (out - expected).abs().max() < 0.01


@pytest.mark.parametrize("p", ["int8 row_block:32", "uint8 row_block:32", "int8"])
@pytest.mark.parametrize("v", ["int2", "int2 channel_block:32", "int2 head", "int4 block:32"])
def test_packed_values_in_tiles_smaller_than_their_groups_are_read_right(p, v):
    s = scheme("int8", "int8", v, p)
    q, k, values = qkv(20, 150, 64, 2)
    operands = tq.quantize(q, k, values, s, backend="triton")
    out, expected = (tq.attention(*operands, s, backend=backend) for backend in ("triton", "reference"))
    assert (out - expected).abs().mean() < 1e-4


@pytest.mark.parametrize("shape", [(70000, 1, 16), (1, 1, 65536 * 64)])
def test_more_than_a_launch_takes_is_refused(shape):
    call = launch.Call(None, Config(64, 64, 4, 2), (), shape, 1, torch.empty(0), None, torch.float16)
    said = f"q: batch {shape[0]}, 1 heads and {shape[2]} queries; a launch takes at most 65535 blocks of 64 queries, and 65535"
    with pytest.raises(tq.UnsupportedError, match=said):
        _ = call.grid
    assert replace(call, shape=(70000, 1, 64), abreast=7).grid == (7, 1, 10000)


def test_codes_whose_rows_lie_far_apart_are_copied():
    x = torch.empty(1).as_strided((1, 1, 1, 1), (1, 1, 2**23, 1)).expand(1, 1, 3, 1)
    far = torch.zeros(2**23 + 8)[: 2**23 + 8].as_strided((1, 1, 2, 4), (0, 0, 2**23, 1))
    assert launch._rows(far).stride(2) == 4 and launch._rows(x).shape == x.shape


def test_rows_with_nothing_to_attend_are_zero_with_lse_minus_infinity():
    q, k, v = torch.randn(1, 1, 200, 64), torch.randn(1, 1, 70, 64), torch.randn(1, 1, 70, 64) + 5
    q[0, 0, 5:7] = torch.tensor([[torch.inf], [torch.nan]])  # of which nothing is asked
    out, lse = tq.attention(q, k, v, "int8", causal=True, return_lse=True, backend="triton")
    assert torch.equal(out[:, :, :130], torch.zeros(1, 1, 130, 64)) and bool((lse[:, :, :130] == -torch.inf).all())
    assert bool(lse[:, :, 130:].isfinite().all())


@pytest.mark.parametrize("name", ["int8", "int8-fp16", "fp8", "kv-int4", "none"])
def test_a_masked_row_is_zero_whatever_v_holds(name):
    q, k, v = qkv(20, 150, 32)
    v[0, 0, 3, 5] = float("nan")
    mask = torch.ones(20, 150, dtype=torch.bool)
    mask[7] = False
    out, lse = tq.attention(q, k, v, name, mask=mask, return_lse=True, backend="triton")
    assert torch.equal(out[:, :, 7], torch.zeros(1, 2, 32)) and bool((lse[:, :, 7] == -torch.inf).all())


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4"])
def test_a_nan_in_v_per_token_reaches_the_rows_that_see_it_and_no_others(name):
    q, k, v = qkv(40, d=32)
    v[0, 1, 11, 3] = float("nan")
    out = tq.attention(q, k, v, name, causal=True, backend="triton")
    seen = torch.zeros(1, 2, 40, 1, dtype=torch.bool)
    seen[0, 1, 11:] = True
    assert torch.equal(out.isnan(), seen.expand_as(out))


@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e5])
def test_a_softcap_keeps_the_accuracy_of_float32(softcap):
    q, k, v = qkv(20, 150, 32)
    out = tq.attention(q, k, v, "none", softcap=softcap, backend="triton")
    assert (out - tq.attention(q, k, v, "none", softcap=softcap, backend="reference")).abs().max() <= 2e-5


def test_decoded_operands_are_of_the_tensors_own_type_also_beside_float32():
    s = scheme("fp8_e4m3 channel", "fp32", "fp32", "fp32")
    q, k, v = (30 * x.half() for x in qkv(20, 90, 32))
    out, expected = (tq.attention(q, k / 30, v, s, backend=backend) for backend in ("triton", "reference"))
    assert (out - expected).abs().max() <= 1e-3 * v.abs().max()


def test_an_unsigned_p_on_a_decoded_v_is_refused():
    q = torch.randn(1, 1, 64, 32)
    with pytest.raises(tq.UnsupportedError, match="P of uint8 needs an integer V"):
        tq.attention(q, q, q, scheme("int8", "int8", "int8 group:16", "uint8 row_block:64"), backend="triton")


@pytest.mark.parametrize("name", ["int8", "int8-fast", "int-flash", "kv-int8", "int8-fp16"])
def test_mass_on_half_of_the_keys_is_kept_within_the_step_of_p(name):
    s = preset(name).model_copy(update={"v": preset(name).v.model_copy(update={"smooth": "none"})})
    q, k = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 512, 64)
    v = torch.zeros(1, 1, 512, 64)
    v[:, :, torch.randperm(512)[:256]] = 1
    operands = tq.quantize(q, k, v, s)
    mass, _ = oracle(*(x.dequantize(torch.float64) for x in operands), Features(scale=0.125))
    out = tq.attention(*operands, s, backend="triton")
    # half a step of P for each key, relative to the largest probability of the row
    logits = operands[0].dequantize() @ operands[1].dequantize().mT * 0.125
    largest = logits.softmax(-1).amax(-1, keepdim=True)
    step = 1 / (s.p.format.largest or 2**11)
    assert bool(((out - mass).abs() <= 0.5 * step * largest * 512 + 1e-3).all())


def test_a_hot_key_does_not_cost_the_tail_in_row_block():
    q, k, v = torch.ones(1, 1, 16, 64), torch.zeros(1, 1, 1024, 64), torch.zeros(1, 1, 1024, 64)
    k[:, :, 3] = 6 / 8  # exp(6) times each of the others, which together weigh more than twice as much
    v[:, :, 128:] = 1
    s = scheme("int8", "int8", "int8 channel_block:128", "uint8 row_block:128")
    tail = 896 / (1023 + torch.tensor(6.0).exp())
    assert (tq.attention(q, k, v, s, backend="triton") - tail).abs().max() < 0.01
    lost = tq.attention(q, k, v, preset("int-flash"), backend="triton")
    assert (lost - tail).abs().max() > 0.5, "against the running maximum the tail rounds to nothing"


def test_strided_and_broadcast_inputs_equal_contiguous_ones():
    q = torch.randn(2, 100, 4, 64).transpose(1, 2)
    k, v = (torch.randn(1, 2, 90, 128)[..., ::2].expand(2, -1, -1, -1) for _ in range(2))
    s = preset("int8-fp16")
    out = tq.attention(q, k, v, s, backend="triton")
    assert torch.equal(out, tq.attention(q.contiguous(), k.contiguous(), v.contiguous(), s, backend="triton"))


def test_codes_that_are_not_contiguous_are_read_right():
    from dataclasses import replace

    operands = tq.quantize(*(torch.randn(1, 2, 80, 64) for _ in range(3)), "int8")
    moved = [replace(x, codes=x.codes.transpose(1, 2).contiguous().transpose(1, 2)) for x in operands]
    assert not moved[0].codes.is_contiguous()
    assert torch.equal(tq.attention(*moved, "int8", backend="triton"), tq.attention(*operands, "int8", backend="triton"))


def test_what_no_kernel_does_says_so():
    q = torch.randn(1, 1, 32, 64)
    with pytest.raises(tq.UnsupportedError, match=r"key tile of 16 .*row_block 32 to 256.*backend='reference'"):
        tq.attention(q, q, q, scheme("int8", "int8", "int8 head", "int8 row_block:16"), backend="triton")
    with pytest.raises(tq.UnsupportedError, match="uint8 needs an integer V"):
        tq.attention(q, q, q, scheme("int8", "int8", "fp16", "uint8"), backend="triton")
    with pytest.raises(tq.UnsupportedError, match="interpreter multiplies bf16 wrongly"):
        tq.attention(*[q.bfloat16()] * 3, "int8-fp16", backend="triton")


def test_without_gpu_and_interpreter_triton_says_what_to_do(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    q = torch.randn(1, 1, 32, 64)
    with pytest.raises(tq.UnsupportedError, match="TRITON_INTERPRET=1"):
        tq.attention(q, q, q, "int8", backend="triton")


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_kernel_on_the_gpu_equals_the_emulation(s):
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    operands = tq.quantize(q, k, v, s)
    out = tq.attention(*operands, s, backend="triton")
    expected = tq.attention(*operands, s, backend="reference")
    exact, _ = oracle(*(x.dequantize(torch.float64) for x in operands), Features(scale=0.125))
    assert (out - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2e-3
