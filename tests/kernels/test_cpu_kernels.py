"""Generated C++ kernels, against the emulation and against float64 on the same codes."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import CASES, SCHEMES, bounds, exact_operands, fits, integer_scores, nan_filled, qkv, scheme

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.kernels.cpu import build, launch
from tokquant.kernels.cpu.instructions import INSTRUCTIONS, Instructions
from tokquant.kernels.cpu.launch import run
from tokquant.kernels.cpu.plan import plan
from tokquant.kernels.wanted import Wanted
from tokquant.precisions import PRECISIONS, register
from tokquant.reference import oracle

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

MORE = SCHEMES | {
    "unsigned p on 16-bit v": scheme("int8", "int8", "fp16", "uint8 row_block:64"),
    "small tiles": scheme("int8", "int8", "int8 channel_block:16", "uint8 row_block:16"),
    "quantized normalizer, zeros of v a channel": scheme(
        "int8", "int8", "int8 channel asymmetric", "int8 row_block:256", normalizer="quantized"
    ),
}  # fmt: skip

# a kernel takes a second to build: every scheme and every case once, all of them together where slow tests run
CROSS = [
    pytest.param(s, *case, id=f"{name} | {case_name}", marks=[] if place == number % len(CASES) else pytest.mark.slow)
    for number, (name, s) in enumerate(MORE.items())
    for place, (case_name, case) in enumerate(CASES.items())
    if fits(s, case[0][2])
]


@pytest.fixture(autouse=True)
def used_memory():
    """Memory that kernels ask for holds numbers, large ones, as it does in a process that has run for a while; of glibc."""
    perturb, mallopt = -6, getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(perturb, 1)
    yield
    mallopt(perturb, 0)


def differs(operands, s, given, monkeypatch):
    """What a kernel's result has that it should not, or nothing."""
    monkeypatch.setattr(launch.torch, "empty", nan_filled)  # what is not written would show
    out, lse = tq.attention(*operands, s, return_lse=True, backend="cpu", **given)
    monkeypatch.undo()
    expected, expected_lse = tq.attention(*operands, s, return_lse=True, backend="reference", **given)
    # a code of P may fall on the other side of a tie: one step in a few rows
    reach = operands[2].dequantize().abs().max()
    step = 2**-3 if s.p.precision.startswith("fp8") else 1 / (s.p.format.largest or 1024)
    if not (out - expected).abs().max() <= step * reach:
        return "further from the emulation than a step of P"
    if not (out - expected).abs().mean() <= 2e-5 * reach:
        return "not the emulation's codes of P"
    if not torch.allclose(lse, expected_lse, atol=2e-5 if s.normalizer == "exact" else 2e-3, rtol=1e-5):
        return "another LSE than the emulation's"
    features = features_of(*operands[:2], **given)
    exact, exact_lse = oracle(*exact_operands(*operands), features)
    largest_error, largest_lse_error = bounds(operands, s, features)
    if not bool(((out - exact).abs() <= largest_error).all()):
        return "beyond the bound of float64"
    kept = exact_lse.isfinite()
    return "" if bool(((lse - exact_lse).abs() <= largest_lse_error)[kept].all()) else "an LSE beyond the bound of float64"


@pytest.mark.parametrize(("s", "shape", "given"), CROSS)
def test_kernel_agrees_with_the_emulation_and_with_float64_on_the_same_codes(s, shape, given, monkeypatch):
    operands = tq.quantize(*qkv(*shape), s, backend="cpu")
    assert not differs(operands, s, given, monkeypatch)


def test_calls_of_several_threads_do_not_meet():
    inputs = [qkv(20 + n, 70 + n, 32, 2, batch=1 + n % 2) for n in range(40)]

    def call(operands):
        return [tq.attention(*operands, "int8", causal=True) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for operands, outs in zip(inputs, threads.map(call, inputs), strict=True):
            assert all(torch.equal(out, call(operands)[0]) for out in outs)


@pytest.mark.parametrize("instructions", build.compiler().instructions[1:] if build.available() else [])
@pytest.mark.parametrize("name", ["int8", "small blocks of q and k", "fp8", "kv-int4", "int2 keys and values"])
def test_other_instruction_sets_compute_the_same(name, instructions, monkeypatch):
    monkeypatch.setenv(build.CHOICE, instructions)
    s = SCHEMES[name]
    operands = tq.quantize(*qkv(37, 301, 40, 4, 2, 2), s, backend="cpu")
    assert not differs(operands, s, dict(causal=True), monkeypatch)


@pytest.mark.parametrize("instructions", build.compiler().instructions if build.available() else [])
@pytest.mark.parametrize(
    "name", ["small blocks of q and k", "int4 q and k, v in 4 bits under unsigned p", "int2 keys and values"]
)
def test_the_largest_codes_overflow_nowhere(name, instructions, monkeypatch):
    monkeypatch.setenv(build.CHOICE, instructions)
    s = SCHEMES[name]
    signs = torch.where(torch.arange(301) % 3 == 0, -1.0, 1.0)[:, None]
    operands = tq.quantize(torch.full((1, 2, 9, 128), 0.1), *signs.expand(2, 1, 2, 301, 128), s, backend="cpu")
    assert not differs(operands, s, {}, monkeypatch)


@pytest.mark.parametrize("instructions", ["neon_i8mm", "neon_dotprod"])
@pytest.mark.parametrize("name", ["int8", "int4 q and k, v in 4 bits under unsigned p", "fp8"])
def test_what_is_written_for_arm_computes_the_same(name, instructions, monkeypatch):
    of_tests = Instructions(flags=(f"-I{Path(__file__).parent / 'arm'}",))
    monkeypatch.setitem(INSTRUCTIONS, instructions, of_tests)
    monkeypatch.setattr(build, "instructions", lambda: instructions)
    s = SCHEMES[name]
    operands = tq.quantize(*qkv(37, 301, 40, 4, 2, 2), s, backend="cpu")
    assert not differs(operands, s, dict(causal=True), monkeypatch)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_results_depend_neither_on_threads_nor_on_the_batch(name, monkeypatch):
    operands = qkv(300, 333, 48, 4, 2, 2)
    outs, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(tq.attention(*operands, name, causal=True, return_lse=True, backend="cpu"))
    torch.set_num_threads(before)
    outs.append([torch.cat(x) for x in zip(*(tq.attention(*(x[i : i + 1] for x in operands), name, causal=True, return_lse=True,
                                                          backend="cpu") for i in range(2)), strict=True)])  # fmt: skip
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


@pytest.mark.parametrize("n", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("name", ["int8", "int4 q and k, v in 4 bits under unsigned p", "int2 keys and values"])
def test_operands_in_panels_are_the_same_operands(name, n):
    s = SCHEMES[name]
    packed, canonical = (tq.quantize(*qkv(20, n, 42, 4, 2), s, backend=backend) for backend in ("cpu", "reference"))
    for ours, theirs in zip(packed, canonical, strict=True):
        assert theirs.layout == "canonical" and ours.layout == ("canonical" if ours.spec.role == "q" else "blocks")
        assert torch.equal(ours.stored_values(), theirs.stored_values())
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    outs = [tq.attention(*x, s, backend=backend) for x in (packed, canonical) for backend in ("cpu", "reference")]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


@pytest.mark.parametrize(
    ("name", "bits"), [("int8", 8.25), ("kv-int8", 8.125), ("kv-int4", 4.25), ("kv-int2-kivi", 3), ("fp8", 8)]
)
def test_keys_in_panels_take_the_bits_that_the_scheme_says(name, bits):
    k = tq.quantize(*qkv(1, 256, 128), name, backend="cpu")[1]
    assert k.bits_per_value == pytest.approx(bits, abs=1e-3)
    scales = sum(x.nbytes for x in (k.scale, k.zero) if x is not None)
    assert 8 * (k.codes.nbytes + scales) == k.bits_per_value * k.shape.numel()  # panels pad no whole tiles


@pytest.mark.parametrize("name", ["int8", "kv-int4"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_operands_laid_out_for_another_backend_give_the_same_bits(backend, name):
    laid_out = [tq.quantize(*qkv(20, 70, 32), name, backend=other) for other in ("cpu", "triton")]
    assert laid_out[1][2].layout == "tokens_last"
    assert torch.equal(*(tq.attention(*x, name, backend=backend) for x in laid_out))


@pytest.mark.parametrize("a", ["int8", "int4", "int2"])
def test_integer_scores_of_a_kernel_and_the_emulation_are_equal(a):
    # with V the identity and P unrounded, a row's output is its P, and logits far apart show every score
    s = scheme(a, "int8", "fp32", "fp32")
    q, k = (3 * torch.randn(1, 1, 16, 40) for _ in range(2))
    v = torch.eye(40)[:16][None, None].contiguous()
    q, k, v = tq.quantize(q, k, v, s, backend="cpu")
    out, lse = tq.attention(q, k, v, s, scale=1e-4, return_lse=True, backend="cpu")
    scores = (out[0, 0, :, :16].double().log() + lse[0, 0].double()[:, None]) / 1e-4
    scores = scores / q.scale[0, 0].double() / k.scale[0, 0].double().T
    exact = integer_scores(q, k)[0, 0]
    assert (scores - exact).abs().max() <= 2 + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", ["int8", "int-flash", "none"])
def test_extreme_logits_stay_finite_and_right(name):
    q = torch.randn(1, 1, 64, 64) * 1e3
    k, v = torch.randn(1, 1, 200, 64) * 1e2, torch.randn(1, 1, 200, 64)
    operands = tq.quantize(q, k, v, name, backend="cpu")
    out, lse = tq.attention(*operands, name, return_lse=True, backend="cpu")
    expected, _ = tq.attention(*operands, name, return_lse=True, backend="reference")
    assert lse.abs().max() > 1e5 and bool(out.isfinite().all())
    assert (out - expected).abs().max() <= 0.02 * v.abs().max()


def test_rows_with_nothing_to_attend_are_zero_with_lse_minus_infinity():
    q, k, v = torch.randn(1, 1, 200, 48), torch.randn(1, 1, 70, 48), torch.randn(1, 1, 70, 48) + 5
    q[0, 0, 5:7] = torch.tensor([[torch.inf], [torch.nan]])  # of which nothing is asked
    out, lse = tq.attention(q, k, v, "int8", causal=True, return_lse=True, backend="cpu")
    assert torch.equal(out[:, :, :130], torch.zeros(1, 1, 130, 48)) and bool((lse[:, :, :130] == -torch.inf).all())
    assert bool(lse[:, :, 130:].isfinite().all())


@pytest.mark.parametrize("name", ["int8", "int8-fp16"])
def test_a_key_that_is_masked_takes_nothing_along_whatever_v_holds(name):
    q, k, v = qkv(20, 150, 32)
    v[0, 0, 3, 5] = float("nan")
    mask = torch.ones(20, 150, dtype=torch.bool)
    mask[7] = False
    mask[9, 3] = False
    operands = tq.quantize(q, k, v, name, backend="cpu")
    out, lse = tq.attention(*operands, name, mask=mask, return_lse=True, backend="cpu")
    expected, _ = tq.attention(*operands, name, mask=mask, return_lse=True, backend="reference")
    assert torch.equal(out[:, :, 7], torch.zeros(1, 2, 32)) and bool((lse[:, :, 7] == -torch.inf).all())
    assert torch.equal(out.isnan(), expected.isnan()) and bool(out.isnan().any())


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_a_number_reaches_the_rows_that_see_it_and_no_others(where):
    tensors = dict(zip("qkv", qkv(40, 40, 32), strict=True))
    tensors[where][0, 1, 11, 3] = float("nan")
    s = {"q": tq.preset("int8-fp16"), "k": tq.preset("none"), "v": tq.preset("kv-int4")}[where]
    operands = tq.quantize(**tensors, scheme=s, backend="reference")
    out, expected = (tq.attention(*operands, s, causal=True, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(out.isnan(), expected.isnan()) and 0 < int(out.isnan().sum()) < out.numel()


@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e5])
def test_a_softcap_keeps_the_accuracy_of_float32(softcap):
    q, k, v = qkv(20, 150, 32)
    out = tq.attention(q, k, v, "none", softcap=softcap, backend="cpu")
    assert (out - tq.attention(q, k, v, "none", softcap=softcap, backend="reference")).abs().max() <= 2e-5


def test_strides_of_inputs_and_masks_are_honoured():
    q = torch.randn(2, 100, 4, 64).transpose(1, 2)
    k, v = (torch.randn(1, 2, 90, 128)[..., ::2].expand(2, -1, -1, -1) for _ in range(2))
    for mask in (
        torch.rand(90, 100).T,
        torch.rand(2, 1, 100, 1),
        torch.rand(90, 2)[:, 0],
        torch.rand(2, 4, 100, 180)[..., ::2],
    ):
        out = tq.attention(q, k, v, "int8-fp16", mask=mask, backend="cpu")
        whole = mask.expand(2, 4, 100, 90).contiguous()
        same = tq.attention(q.contiguous(), k.contiguous(), v.contiguous(), "int8-fp16", mask=whole, backend="cpu")
        assert torch.equal(out, same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_have_the_type_of_the_tensors(dtype):
    operands = tq.quantize(*qkv(50, 90, 32, dtype=dtype), "int8-fp16", backend="cpu")
    out, expected = (tq.attention(*operands, "int8-fp16", backend=backend) for backend in ("cpu", "reference"))
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("instructions", ["fastest", "portable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 40])
def test_sixteen_bit_outputs_are_those_of_32_bits_rounded(d, dtype, instructions, monkeypatch):
    if instructions == "portable":
        monkeypatch.setattr(build, "instructions", lambda: instructions)
    q, k, v = qkv(50, d=d, dtype=dtype)
    # large numbers, subnormal ones, and none
    large = 6e4 if dtype == torch.float16 else 3e38
    v[..., 1::4], v[..., 2::4], v[..., 0, 3], v[..., 3, 4] = large, 3e-8, float("nan"), -float("inf")
    seen = []
    monkeypatch.setattr(launch, "run", lambda *given: seen.append(given) or run(*given))
    s = scheme(q="fp32", k="fp32", v="fp32", p="fp32")
    out = tq.attention(q, k, v, s, causal=True, backend="cpu")
    kinds = dict(dtype=dtype, instructions=build.instructions())
    made, wide = plan(s, head_dim=d, wanted=Wanted(right=True), **kinds), torch.empty(q.shape)
    run(made, seen[0][1] | {"out": wide})
    assert out.dtype == dtype and wide.isnan().any() and (wide.abs() > 1e3).any()
    assert torch.equal(out.nan_to_num(7.0), wide.to(dtype).nan_to_num(7.0)) and torch.equal(out.isnan(), wide.isnan())


def test_a_large_head_dim_runs():
    operands = qkv(9, 70, 1100, 1)
    out, expected = (tq.attention(*operands, "int8", backend=backend) for backend in ("cpu", "reference"))
    assert (out - expected).abs().max() <= 1e-3


def test_keys_in_chunks_are_the_emulations_but_for_unit_which_errs_less():
    q, k, v = qkv(8, 5000, 64)
    exact = tq.attention(3 * q, k, v, "none", backend="reference")
    for made, same in ((scheme("int8", "int8", "int8", "int8 row_block:128"), True), (tq.preset("int-flash"), False)):
        outs = [tq.attention(3 * q, k, v, made, backend=backend) for backend in ("cpu", "reference")]
        errors = [(out - exact).abs().sum() for out in outs]
        differ = (outs[0] - outs[1]).abs().mean()
        assert (differ < 1e-5) == same and (errors[0] < 0.9 * errors[1]) != same
        bound = tq.error_bound(3 * q, k, v, made).total
        assert all(bool(((out - exact).abs().amax(dim=-1) <= bound + 1e-5).all()) for out in outs)


def test_a_precision_that_was_replaced_is_the_new_one_in_the_next_kernel():
    s, eight = scheme("int8", "int8", "fp16", "int8"), PRECISIONS["int8"]
    operands = tq.quantize(*qkv(9, 70), s, backend="cpu")
    outs = [tq.attention(*operands, s, backend="cpu")]
    halved = "static inline floats encode_p(floats p) { return nearest(p / 2); }"
    try:
        register(replace(eight, encode=lambda x: eight.encode(x / 2), cpp_encode=halved), replace=True)
        outs += [tq.attention(*operands, s, backend=backend) for backend in ("cpu", "reference")]
    finally:
        register(eight, replace=True)
    assert (outs[1] - outs[2]).abs().mean() < 1e-3 and (outs[1] - outs[0]).abs().mean() > 0.1


def test_what_no_kernel_does_says_so():
    q = torch.randn(1, 1, 32, 64)
    with pytest.raises(tq.UnsupportedError, match=r"row_block 2048 is more than a CPU kernel holds; at most 1024"):
        tq.attention(q, q, q, scheme("int8", "int8", "int8 head", "int8 row_block:2048"), backend="cpu")


def test_sequences_of_their_own_lengths_come_out_as_each_alone():
    q, k, v = (torch.randn(150, 2, 48) for _ in range(3))
    starts = torch.tensor([0, 40, 40, 150], dtype=torch.int32)
    given = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, return_lse=True, backend="cpu")
    out, lse = tq.attention_varlen(q, k, v, "int8", **given)
    for first, end in ((0, 40), (40, 150)):
        own = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
        alone, alone_lse = tq.attention(*own, "int8", causal=True, return_lse=True, backend="cpu")
        assert torch.equal(out[first:end], alone[0].transpose(0, 1))
        assert torch.equal(lse[first:end], alone_lse[0].transpose(0, 1))
