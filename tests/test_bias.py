"""Attention bias: each kind is what it says, in the oracle, the emulation and kernels, and none falls into its known traps."""

import math
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from factories import SLOPES, dense_bias, exact_operands, qkv, scheme, some_factors, some_mask, waves

import tokquant as tq
from tokquant import bias
from tokquant.bias.kinds import STEEPEST
from tokquant.inputs import features_of
from tokquant.kernels.plan import plan
from tokquant.reference import oracle

INF = math.inf
BACKENDS = ["reference", "triton"]
KINDS = {
    "alibi": bias.alibi(SLOPES),
    "alibi of negative slopes": bias.alibi(-SLOPES / 8),
    "key vector": bias.key_vector(some_factors(2, 4, 70)),
    "key vector of all heads": bias.key_vector(some_factors(70)),
    "key vector of a head": bias.key_vector(some_factors(4, 1)),
    "low rank": bias.lowrank(some_factors(2, 4, 50, 5), some_factors(2, 4, 70, 5)),
    "low rank in bf16": bias.lowrank(some_factors(1, 4, 50, 40).bfloat16(), some_factors(2, 1, 70, 40).bfloat16()),
    "dense": bias.dense(some_factors(2, 4, 50, 70)),
    "dense in bf16": bias.dense(waves(50, 70).bfloat16()),
}
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_every_kind_is_the_same_as_its_values_in_an_additive_mask(given):
    q, k, v = qkv(50, 70, 32, 4, 2, 2)
    written = dense_bias(given, 50, 70)
    rest = {"causal": True, "softcap": 3.0, "sinks": SLOPES, "window": (60, None)}
    for mask in (None, waves(50, 70).double(), some_mask(2, 1, 50, 70)):
        added = written if mask is None else written + mask if mask.is_floating_point() else written.masked_fill(~mask, -INF)
        biased = oracle(q, k, v, features_of(q, k, bias=given, mask=mask, **rest))
        masked = oracle(q, k, v, features_of(q, k, mask=added, **rest))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(biased, masked, strict=True))
        operands = tq.quantize(q, k, v, "int8-fp16")
        emulated, expected = (
            tq.attention(*operands, "int8-fp16", backend="reference", **rest, **terms)
            for terms in ({"bias": given, "mask": mask}, {"mask": added})
        )
        assert (emulated - expected).abs().max() < 2e-3


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_every_kind_of_a_kernel_is_that_of_the_emulation(given):
    operands = tq.quantize(*qkv(50, 70, 32, 4, 2, 2), "none")
    out, lse = tq.attention(*operands, "none", bias=given, return_lse=True, backend="triton")
    expected, expected_lse = tq.attention(*operands, "none", bias=given, return_lse=True, backend="reference")
    assert torch.allclose(out, expected, atol=2e-5) and torch.allclose(lse, expected_lse, atol=2e-5)


# --------------------------------------------------------------------------- ALiBi


def test_the_slopes_are_those_of_the_paper():
    assert bias.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert bias.alibi_slopes(1).tolist() == [2.0**-8]
    # the authors' get_slopes(12): those of 8 heads, then every other one of 16
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert torch.equal(bias.alibi_slopes(12), torch.tensor(expected))
    assert all(len(bias.alibi_slopes(n).unique()) == n for n in (3, 5, 6, 7, 20, 40, 100))


@both
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_alibi_weighs_a_key_less_for_each_step_from_its_query(backend, causal):
    q, v = torch.zeros(1, 4, 5, 32), torch.eye(7, 32).expand(1, 4, -1, -1)
    weights = tq.attention(q, v, v, "none", bias=bias.alibi(SLOPES), causal=causal, backend=backend)[..., :7]
    for i in range(5):
        own = i + 2
        seen = range(own + 1) if causal else range(7)
        expected = torch.tensor([math.exp(-0.9 * abs(own - j)) if j in seen else 0 for j in range(7)])
        assert torch.allclose(weights[0, 0, i], expected / expected.sum(), atol=1e-6), "minus the slope times the distance"


@both
def test_alibi_without_causality_is_symmetric(backend):
    q, k, v = qkv(150, 150, 32, 4)
    turned = [x.flip(2) for x in (q, k, v)]
    out, other = (tq.attention(*x, "none", bias=bias.alibi(SLOPES), backend=backend) for x in ((q, k, v), turned))
    assert torch.allclose(out, other.flip(2), atol=1e-5)


@both
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_last_queries_alone_stand_where_they_stood(backend, causal):
    q, k, v = qkv(170, 170, 32, 4)
    given = {"bias": bias.alibi(SLOPES), "causal": causal, "return_lse": True, "backend": backend}
    out, lse = tq.attention(q, k, v, "none", **given)
    last, last_lse = tq.attention(q[:, :, -21:], k, v, "none", **given)
    assert torch.allclose(last, out[:, :, -21:], atol=1e-5) and torch.allclose(last_lse, lse[:, :, -21:], atol=2e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_positions_that_16_bits_cannot_hold_are_exact(backend, dtype, causal):
    n, left = 9001, 40
    if backend == "triton" and dtype == torch.bfloat16:
        s = scheme("int8", "int8", "int8 head", "int8 row_block:128")  # the interpreter has no bf16 products
    else:
        s = tq.preset("int8-fp16")
    q, k, v = qkv(64, n, 32, 4, 1, dtype=dtype)
    operands = tq.quantize(q, k, v, s)
    given = {"causal": causal, "window": (left, left), "return_lse": True}
    alibi = bias.alibi(SLOPES)
    _, lse = tq.attention(*operands, s, bias=alibi, backend=backend, **given)
    i, j = torch.arange(64) + n - 64, torch.arange(n)

    def expected(positions):
        values = -alibi.slopes.double()[:, None, None] * (positions(i)[:, None] - positions(j)).abs()
        features = features_of(*operands[:2], mask=values, causal=causal, window=(left, left))
        return oracle(*exact_operands(*operands), features)[1]

    assert (lse - expected(lambda x: x.double())).abs().max() < 1e-4
    assert (lse - expected(lambda x: x.to(dtype).double())).abs().max() > 0.1, "16-bit positions would show"


@both
def test_steep_slopes_leave_a_query_its_own_key(backend):
    q, k, v = qkv(140, 140, 32, 2)
    steep = bias.alibi(torch.full((2,), STEEPEST))
    out, lse = tq.attention(q, k, v, "none", bias=steep, causal=True, return_lse=True, backend=backend)
    assert torch.allclose(out, v, atol=1e-5)
    assert torch.allclose(lse, (q * k).sum(-1) * 32**-0.5, atol=2e-3)


# --------------------------------------------------------------------------- key vectors and dense values


@both
def test_a_key_of_minus_infinity_is_masked(backend):
    q, k, v = qkv(40, 150, 32)
    values = torch.randn(150)
    gone = some_mask(1, 1, 1, 150)[0, 0, 0]
    out, lse = tq.attention(
        q, k, v, "none", bias=bias.key_vector(values.masked_fill(~gone, -INF)), return_lse=True, backend=backend
    )
    expected, expected_lse = tq.attention(
        q, k, v, "none", bias=bias.key_vector(values), mask=gone, return_lse=True, backend=backend
    )
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(lse, expected_lse, atol=1e-5)
    out, lse = tq.attention(q, k, v, "none", bias=bias.key_vector(torch.full((150,), -INF)), return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()


def strided(x):
    """The same values, with gaps between them."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


STRIDED = {
    "key vector": (bias.key_vector, [torch.randn(1, 4, 150)]),
    "low rank": (bias.lowrank, [some_factors(2, 4, 40, 16), some_factors(1, 4, 150, 16)]),
    "dense": (bias.dense, [torch.randn(2, 4, 40, 150)]),
}


@pytest.mark.parametrize(("make", "tensors"), STRIDED.values(), ids=STRIDED)
def test_tensors_that_are_not_contiguous_are_read_right(make, tensors):
    operands = tq.quantize(*qkv(40, 150, 32, 4, 2, 2), "int8-fp16", backend="triton")
    turned = [x.mT.contiguous().mT for x in tensors]
    shared = [x[:, :1].expand(-1, 4, *x.shape[2:]) for x in tensors]
    whole = [x.contiguous() for x in shared]
    for some, same in ((tensors, [strided(x) for x in tensors]), (tensors, turned), (whole, shared)):
        one, other = (tq.attention(*operands, "int8-fp16", bias=make(*x), backend="triton") for x in (some, same))
        # a compiler may add in another order what lies in another
        assert (one - other).abs().max() <= 1e-5


# --------------------------------------------------------------------------- what is refused, and what it costs

x16 = some_factors(1, 2, 20, 4)
REFUSED = {
    "a list of slopes": (TypeError, lambda: bias.alibi([0.5]), "slopes: a list; give a floating-point tensor"),
    "slopes of integers": (TypeError, lambda: bias.alibi(torch.ones(2).int()), "slopes: torch.int32"),
    "slopes of two dimensions": (ValueError, lambda: bias.alibi(torch.ones(2, 2)), "slopes: shape [2, 2]; give [H_q]"),
    "a slope that is not a number": (ValueError, lambda: bias.alibi(torch.tensor([0.5, math.nan])), "slopes: [0.5, nan]"),
    "a steep slope": (ValueError, lambda: bias.alibi(torch.tensor([65.0])), "at most 64 in magnitude"),
    "no heads": (ValueError, lambda: bias.alibi_slopes(0), "heads: 0 is not a whole number from 1"),
    "a key vector of truths": (TypeError, lambda: bias.key_vector(torch.ones(5) > 0), "values: torch.bool"),
    "a dense list": (TypeError, lambda: bias.dense([[0.0]]), "values: a list"),
    "float32 factors": (TypeError, lambda: bias.lowrank(x16.float(), x16), "q_factors: torch.float32", "a high and a low"),
    "svd to float32": (TypeError, lambda: bias.svd(torch.ones(1, 9, 9), dtype=torch.float32), "dtype: torch.float32 is not"),
    "distances in float32": (TypeError, lambda: bias.squared_distance(torch.eye(3), dtype=torch.float32), "dtype: torch"),
    "text as weight": (TypeError, lambda: bias.squared_distance(torch.eye(3), weight="1"), "weight: '1'; give a number"),
    "text as energy": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), energy="0.9"), "energy: '0.9' is no share"),
    "factors of two types": (TypeError, lambda: bias.lowrank(x16, x16.bfloat16()), "types torch.float16 and torch.bfloat16"),
    "factors of two ranks": (ValueError, lambda: bias.lowrank(x16, x16[..., :3]), "k_factors: rank 3 is not that of"),
    "factors of three dimensions": (ValueError, lambda: bias.lowrank(x16, x16[0]), "k_factors: shape [2, 20, 4]; give [batch"),
    "factors of no columns": (ValueError, lambda: bias.lowrank(x16[..., :0], x16[..., :0]), "q_factors: shape [1, 2, 20, 0]"),
    "svd of a matrix": (ValueError, lambda: bias.svd(torch.ones(5, 5)), "values: shape [5, 5]; give [heads, N_q, N_k]"),
    "svd of minus infinity": (ValueError, lambda: bias.svd(torch.full((1, 5, 5), -INF)), "give what is masked as mask"),
    "an energy of 2": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), energy=2), "energy: 2 is no share"),
    "a rank of 0": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), largest_rank=0), "largest_rank: 0"),
    "svd past float16": (ValueError, lambda: bias.svd(1e12 * torch.ones(1, 90, 90)), "float16; use dtype=torch.bfloat16"),
    "a weight of no head": (ValueError, lambda: bias.squared_distance(torch.eye(3), weight=torch.ones(0)), "weight: a Tensor"),
    "a weight of many digits": (ValueError, lambda: bias.squared_distance(torch.eye(3), weight=10**400), "weight: an integer"),
    "a weight at the end of float64": (ValueError, lambda: bias.squared_distance(7 * torch.eye(3), weight=1e308), "too large"),
    "points in a plane": (ValueError, lambda: bias.squared_distance(torch.ones(5, 2)), "x: shape [5, 2]; give points"),
    "points of infinity": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), torch.full((4, 3), INF)), "y: not all"),
    "points of two batches": (
        ValueError, lambda: bias.squared_distance(torch.ones(2, 5, 3), torch.ones(3, 5, 3)), "y: batch 3 is not that of x, 2"
    ),
    "a weight of NaN": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), weight=math.nan), "weight: nan"),
    "weights of pairs": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), weight=torch.ones(2, 2)), "weight: "),
    "a weight past float16": (ValueError, lambda: bias.squared_distance(torch.eye(3), weight=1e12), "weight: with points"),
    "another kind": (ValueError, lambda: tq.compile("int8", head_dim=64, bias="alibis"), "bias: 'alibis' is not valid"),
    "half a rank": (ValueError, lambda: tq.compile("int8", head_dim=64, bias_rank=0.5), "bias_rank: 0.5 is not a whole"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call", "parts"), [(e, c, p) for e, c, *p in REFUSED.values()], ids=REFUSED)
def test_what_cannot_be_a_bias_is_refused(error, call, parts):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error and all(part in str(raised.value) for part in parts), str(raised.value)


def test_the_tensors_of_a_bias_are_never_changed_and_may_need_a_gradient_elsewhere():
    values = torch.randn(20, 20, requires_grad=True)
    q, k, v = qkv(20, 20, 32)
    for backend in BACKENDS:
        with torch.no_grad():
            before = values.clone()
            tq.attention(q, k, v, "int8", bias=bias.dense(values), softcap=5.0, backend=backend)
            assert torch.equal(values, before) and values.grad is None


def test_a_kernels_title_says_which_bias_it_has():
    for kind, words in {"alibi": "alibi bias", "lowrank": "lowrank bias of rank 24", "key_vector": "key vector bias"}.items():
        assert words in tq.compile("int8", head_dim=64, bias=kind, bias_rank=24).source
    assert "bias" not in repr(plan(tq.preset("int8"), head_dim=64, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_every_kind_on_the_gpu_is_that_of_the_emulation(given):
    moved = replace(given, **{name: x.cuda() for name, x in vars(given).items() if isinstance(x, torch.Tensor)})
    operands = tq.quantize(*(x.half().cuda() for x in qkv(50, 70, 32, 4, 2, 2)), "int8-fp16")
    for causal in (False, True):
        out, expected = (
            tq.attention(*operands, "int8-fp16", bias=moved, causal=causal, backend=backend)
            for backend in ("triton", "reference")
        )
        assert (out - expected).abs().max() < 4e-3 * operands[2].dequantize().abs().max()


# instructions a score in the loop over whole tiles of int8-fast; sm_90, head_dim 128, Triton 3.9; 11.1 without a bias
BUDGETS = {
    "alibi, causal": ({"bias": "alibi", "causal": True}, 14.1),
    "alibi": ({"bias": "alibi"}, 15.1),
    "key vector": ({"bias": "key_vector"}, 12.9),
    "low rank": ({"bias": "lowrank"}, 12.9),
}


@pytest.mark.compiled
@pytest.mark.parametrize(("given", "budget"), BUDGETS.values(), ids=BUDGETS)
def test_a_bias_is_cheap_and_spills_nothing(given, budget):
    kernel = tq.compile("int8-fast", head_dim=128, return_lse=True, **given)
    assert kernel.resources.spill_bytes == 0
    if version("triton").startswith("3.9."):
        assert kernel.resources.instructions_per_score <= budget
    unwanted = {"F2I", "LDL", "STL", "SEL", "ISETP", "I2F"} & {k for k, count in kernel.resources.loop.items() if count > 2}
    assert not unwanted, "whole tiles have no masks and no spills"


COMPILED = {
    "alibi": ("int8", torch.bfloat16, "sm_80"),
    "key_vector": ("kv-int4-kivi", torch.float16, "sm_90"),
    "lowrank": ("none", torch.float32, "sm_90"),
    "dense": ("int8-fp16", torch.bfloat16, "sm_80"),
}


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["alibi", "key_vector", "lowrank"])
def test_a_bias_spills_nothing_in_narrow_heads_either(kind):
    assert tq.compile("int8-fp16", head_dim=64, return_lse=True, bias=kind).resources.spill_bytes == 0


@pytest.mark.compiled
@pytest.mark.parametrize("kind", COMPILED)
def test_every_kind_compiles_with_every_feature(kind):
    name, dtype, target = COMPILED[kind]
    features = dict(mask="additive", softcap=True, sinks=True, return_lse=True, shared_heads=4, bias_rank=24, window=True)
    assert tq.compile(name, head_dim=32, bias=kind, dtype=dtype, target=target, **features).asm["cubin"]
