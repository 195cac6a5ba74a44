"""Certificates hold: no error of any backend is above its bound, whatever the scheme, the features and the numbers are."""

import math
import random
from dataclasses import replace

import pytest
import torch
from factories import INF, SLOPES, Largest, qkv, scheme

import tokquant as tq
from tokquant import bias
from tokquant.calibration.scales import needed
from tokquant.evaluation.bound import certificate, float32, operands
from tokquant.evaluation.bound.half_steps import decoded, half_steps
from tokquant.inputs import features_of
from tokquant.reference import SCORES_AT_ONCE, oracle

QUERIES = ["int8", "int8 tensor", "int4 head", "fp8_e4m3 channel", "int8 block:16 scale=fp16", "int8 channel_block:32", "fp16",
           "fp4_e2m1 group:16 scale=fp8_e4m3", "int4 block_mean", "int8 scale=fp8_e4m3", "fp32", "int2", "int8 head static",
           "fp8_e4m3 tensor static", "fp8_e5m2"]  # fmt: skip
KEYS = ["int8 mean", "int4 asymmetric scale=fp16", "int8 head", "int8 channel asymmetric", "int4 channel mean", "int8",
        "int8 block:32 mean", "int4 block:64 asymmetric mean", "int2 channel_block:32 asymmetric", "fp8_e4m3 tensor",
        "int4 group:16 mean scale=fp8_e4m3", "fp32 mean", "fp16", "int2", "int8 head static", "int4 channel static asymmetric",
        "fp8_e4m3 tensor static", "fp4_e2m1", "int8 asymmetric scale=fp8_e4m3"]  # fmt: skip
VALUES = ["int8", "int4 asymmetric scale=fp16", "int8 tensor asymmetric", "fp8_e4m3 head", "int8 channel mean",
          "int8 block:128", "int8 channel_block:128 mean", "int4 channel_block:256 asymmetric", "int4 group:16 asymmetric",
          "fp32", "bf16 mean", "fp4_e2m1 scale=fp8_e4m3", "int8 head asymmetric mean", "int2", "int2 group:16 asymmetric",
          "int8 head static", "int8 channel static asymmetric", "fp8_e4m3 head static", "fp8_e5m2 channel"]  # fmt: skip
PROBABILITIES = ["fp32", "fp32 row_block:64", "uint8 row_block:64", "int8 row_block:128", "int8 unit", "uint8 unit",
                 "fp8_e4m3 unit", "fp8_e4m3 row_block:32", "fp16 unit", "bf16 row_block:128", "fp8_e5m2 unit"]  # fmt: skip


def some_scheme(chance: random.Random) -> tq.QuantScheme:
    """Any scheme that the grammar accepts."""
    while True:
        try:
            return scheme(
                *map(chance.choice, (QUERIES, KEYS, VALUES, PROBABILITIES)),
                rotate=chance.choice(["none", "none", "hadamard"]), rotate_v=chance.choice(["none", "none", "hadamard"]),
                balance=chance.choice(["none", "none", "channel", "rope_pairs"]),
                normalizer=chance.choice(["exact", "exact", "quantized"]),
            )  # fmt: skip
        except tq.SchemeError:
            continue


def some_tensors(chance: random.Random, q, k, v):
    """Normal ones, made hard in one or two ways."""
    n, middle = k.shape[2], k.shape[2] // 2
    for _ in range(chance.choice([0, 1, 1, 2])):
        match chance.randrange(13):
            case 0:  # outliers: a channel, as of real keys
                q[..., 1] *= 8
                k[..., 1] += 30
            case 1:  # a token
                k[:, :, middle] *= 20
                v[:, :, middle] *= 40
            case 2:  # tiny scales
                q, k, v = q * 1e-3, k * 1e-3, v * 1e-4
            case 3:  # near-ties
                k = k[:, :, :1] + 1e-3 * k
            case 4:  # exact ties
                k = k[:, :, :1].expand_as(k).clone()
            case 5:  # one hot key and a long tail that has all the values
                k[:, :, 0] = q.mean(dim=(1, 2))[:, None] * 40
                v[:, :, 0] = 0
            case 6:
                v = torch.full_like(v, 1.7)
            case 7:  # huge logits
                q, k = q * chance.choice([5, 30]), k * chance.choice([1, 10])
            case 8:  # the indicator of half the keys
                v = (torch.arange(n)[:, None] < middle).to(v.dtype).expand_as(v).clone()
            case 9:
                q, k, v = q * 0, k, v
            case 10:  # tokens of all magnitudes
                v = v * torch.exp(2 * torch.randn(*v.shape[:3], 1))
                k = k * torch.exp(torch.randn(*k.shape[:3], 1))
            case 11:  # a tail whose values make up for its weights
                q[..., 0], k[..., 0] = q.shape[3] ** 0.5, 0
                k[:, :, middle:, 0] = -8
                v[:, :, middle:] *= math.exp(8)
            case 12:
                v[:, :, ::3] = 0
    return q, k, v


def some_features(chance: random.Random, heads: int, n_q: int, n_k: int) -> dict:
    """Each of them now and then."""
    given: dict = {}
    if chance.random() < 0.3:
        given["causal"] = True
    if chance.random() < 0.2:
        given["window"] = chance.choice([(9, 0), (40, 11), (None, 3), (5, None)])
    if chance.random() < 0.25:
        kept = torch.rand(n_q, n_k) > 0.4
        floats = torch.where(kept, 2 * torch.randn(n_q, n_k), chance.choice([-INF, -1e4, -1e9]))
        given["mask"] = kept if chance.random() < 0.5 else floats
    if chance.random() < 0.2:
        given["softcap"] = chance.choice([0.5, 5.0, 30.0])
    if chance.random() < 0.25:
        given["sinks"] = torch.randn(heads) * chance.choice([1, 6])
    if chance.random() < 0.2:
        given["scale"] = chance.choice([0.01, 0.5, -0.2, 1.0])
    if chance.random() < 0.2:
        given["bias"] = chance.choice([
            lambda: bias.alibi(SLOPES[:heads]),
            lambda: bias.key_vector(torch.randn(n_k)),
            lambda: bias.lowrank(torch.randn(1, 1, n_q, 5).half(), torch.randn(1, heads, n_k, 5).half()),
            lambda: bias.dense(3 * torch.randn(n_q, n_k)),
        ])()  # fmt: skip
    return given


def some_case(seed: int):
    """Tensors, a scheme, its scales and features. Scales are of other tensors, so that static ones clip."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    made = some_scheme(chance)
    d, n_q, n_k = chance.choice([16, 32, 64]), chance.choice([1, 7, 20]), chance.choice([1, 17, 60, 140, 200])
    dtype = chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    q, k, v = torch.randn(1, 2, n_q, d), *(torch.randn(1, 1, n_k, d) + torch.randn(d) for _ in range(2))
    calibrator = tq.Calibrator(made) if needed(made) else None
    if calibrator is not None:
        calibrator.observe("layer", q * chance.choice([0.4, 1, 3]), k, v * chance.choice([0.3, 1]))
    q, k, v = (x.to(dtype) for x in some_tensors(chance, q, k, v))
    scales = calibrator.scales()["layer"] if calibrator else None
    return q, k, v, made, scales, some_features(chance, 2, n_q, n_k)


def errors_over_bounds(seed: int, backend: str = "reference") -> torch.Tensor | None:
    """Errors of each row over the bounds of tensors and of codes `[2, B, H, N]`, 0 where nothing is off or nothing
    is guaranteed; None for a refused case."""
    q, k, v, made, scales, given = some_case(seed)
    try:
        codes = tq.quantize(q, k, v, made, scales=scales, backend=backend)
    except ValueError:
        return None  # what does not fit a type of scales
    out = tq.attention(*codes, made, **given, backend=backend).double()
    exact, _ = oracle(q, k, v, features_of(q, k, **given))
    error = (out - exact).abs().amax(dim=-1)
    bounds = [tq.error_bound(q, k, v, made, **given, scales=scales), tq.error_bound(*codes, made, **given)]
    for bound in bounds:
        parts = torch.stack([bound.q, bound.k, bound.p, bound.v, bound.rounding])
        assert not parts.isnan().any() and (parts >= 0).all(), seed
        assert (bound.total <= parts.sum(dim=0) * (1 + 1e-9)).all(), seed
    return torch.stack([torch.where((error == 0) | bound.total.isinf(), 0.0, error / bound.total) for bound in bounds])


def assert_no_violation(seeds) -> None:
    judged = 0
    for seed in seeds:
        ratio = errors_over_bounds(seed)
        if ratio is not None:
            judged += 1
            assert (ratio[0] <= 1).all() and (ratio[1] <= 1).all(), (seed, some_case(seed)[3:], ratio.amax(dim=(1, 2, 3)))
    assert judged > 0.9 * len(seeds)


def test_no_error_is_above_its_bound():
    assert_no_violation(range(300))


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(20))
def test_no_error_of_20000_is_above_its_bound(thousand):
    assert_no_violation(range(1000 * thousand, 1000 * (thousand + 1)))


def half(function):
    """The same, with a factor of two forgotten."""

    def halved(*given, **more):
        made = function(*given, **more)
        return (made[0] / 2, *made[1:]) if isinstance(made, tuple) else made / 2

    return halved


def without(*names: str):
    """What is known of the operands, with this left out."""

    def leave_out(function):
        def known(*given):
            made = function(*given)
            left = {name: getattr(made, name) for name in names}
            return replace(made, **{n: (x[0] * 0, x[1]) if isinstance(x, tuple) else x * 0 for n, x in left.items()})

        return known

    return leave_out


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, mistake",
    [
        (certificate, "_moved", half),
        (certificate, "_moved_by", half),
        (certificate, "rounding_of_p", half),
        (certificate, "_range", half),
        (certificate, "known", without("q_error")),
        (certificate, "known", without("k_error")),
        (certificate, "known", without("v_error")),
        (certificate, "known", without("times_p")),
        (operands, "half_steps", half),
        (float32, "cast", half),
    ],
    ids=["scores of tensors", "scores of codes", "half of P", "half a range", "no Q", "no K", "no V", "no P", "half a step",
         "half of the output's type"],
)  # fmt: skip
def test_a_mistake_in_the_bound_is_found(module, name, mistake, monkeypatch):
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    for seed in range(400):
        try:
            ratio = errors_over_bounds(seed)
            if ratio is None or (ratio <= 1).all():
                ratio = beyond_codes(seed)
        except AssertionError:
            return
        if ratio is not None and not (ratio <= 1).all():
            return
    pytest.fail("no case tells the mistake from the bound")


def test_the_drift_of_logits_in_float32_is_needed(monkeypatch):
    q, k, v = qkv(20, 100, 64)
    q, k, made = 300 * q, 30 * k[:, :, :1] + 1e-4 * k, scheme()  # large logits, near one another
    error = (tq.attention(q, k, v, made, backend="reference").double() - oracle(q, k, v, features_of(q, k))[0]).abs()
    assert (error.amax(dim=-1) <= tq.error_bound(q, k, v, made).total).all()
    monkeypatch.setattr(float32, "moved", lambda p, drift: 0 * p[..., :1])
    assert not (error.amax(dim=-1) <= tq.error_bound(q, k, v, made).total).all()


def beyond_codes(seed: int) -> torch.Tensor | None:
    """Errors over the bound of codes, of other tensors that have them: each value almost half a step off, to either side."""
    q, k, v, made, scales, given = some_case(seed)
    try:
        codes = tq.quantize(q, k, v, made, scales=scales, backend="reference")
    except ValueError:
        return None
    if codes[0].logit_offset is not None:  # these see it, and it is of the tensors given
        given = {name: x for name, x in given.items() if name not in ("softcap", "sinks")}
    if codes[1].companion is not None or needed(made):
        return None  # one says more of K than codes do; the other's last codes may stand for anything
    others = []
    for x in codes:
        steps = 0.99 * half_steps(x)
        others.append(x.frame.undo(decoded(x) + torch.where(torch.rand_like(steps) < 0.5, -steps, steps)))
    out = tq.attention(*codes, made, **given, backend="reference").double()
    exact, _ = oracle(*others, features_of(q, k, **given))
    error = (out - exact).abs().amax(dim=-1)
    bound = tq.error_bound(*codes, made, **given)
    return torch.where((error == 0) | bound.total.isinf(), 0.0, error / bound.total)


def test_the_bound_of_codes_holds_for_other_tensors_that_have_them():
    ratios = [ratio for seed in range(25) if (ratio := beyond_codes(seed)) is not None]
    assert len(ratios) > 10 and all((ratio <= 1).all() for ratio in ratios)
    # and some tensors come near it
    assert max(ratio.max() for ratio in ratios) > 0.7


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("name", ["int8", "int-flash", "fp8", "kv-int4"])
def test_kernels_stay_below_the_same_bound(name, backend):
    q, k, v = qkv(20, 300, 32, heads=2, kv_heads=1)
    given = {"causal": True, "sinks": torch.tensor([0.0, 2.0]), "softcap": 20.0}
    exact, _ = oracle(q, k, v, features_of(q, k, **given))
    codes = tq.quantize(q, k, v, name, backend=backend)
    error = (tq.attention(*codes, name, **given, backend=backend).double() - exact).abs().amax(dim=-1)
    assert (error <= tq.error_bound(q, k, v, name, **given).total).all()
    # codes say the same, however they lie; what an offset of K takes off logits is a sum of float32
    of_codes = tq.error_bound(*codes, name, **given).total
    assert (error <= of_codes).all()
    canonical = tq.error_bound(*tq.quantize(q, k, v, name, backend="reference"), name, **given).total
    assert torch.allclose(of_codes, canonical, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed, d", [(709, 64), (790, 96), (1043, 128), (1054, 96)])
def test_an_origin_is_rounded_as_the_terms_that_cancel_in_it(seed, d):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 1, 1, d) for _ in "qkv")
    v = v * [1, 1000, 30][seed % 3]  # of a single token, whose zero and steps nearly cancel
    error = (tq.attention(q, k, v, "kv-int4", backend="reference").double() - v.double()).abs().amax(dim=-1)
    assert (error <= tq.error_bound(q, k, v, "kv-int4").total).all()


@pytest.mark.parametrize("rotate_v", ["none", "hadamard"])
@pytest.mark.parametrize(
    "of_q, of_k, of_v, scale",
    [(3, 1, 1e-34, None), (3, 1, 1e-36, None), (3, 1, 1e-38, None), (1e-19, 1e-19, 1, 1e37), (1e-2, 1e-36, 1, 1e37),
     (1, 1e-39, 1, 1e38)],
)  # fmt: skip
def test_what_products_of_bfloat16_take_as_zero_is_in_the_bound(of_q, of_k, of_v, scale, rotate_v):
    made = scheme("fp16", "fp16", "fp16", "fp16", rotate_v=rotate_v)
    q, k, v = ((size * x).bfloat16() for x, size in zip(qkv(20, 150, 32), (of_q, of_k, of_v), strict=True))
    exact, _ = oracle(q, k, v, features_of(q, k, scale=scale))
    error = tq.attention(q, k, v, made, scale=scale, backend="cpu").double() - exact
    assert (error.abs().amax(dim=-1) <= tq.error_bound(q, k, v, made, scale=scale).total).all()


@pytest.mark.parametrize("made, part", [(scheme(q="int8"), "q"), (scheme(k="int4"), "k"), (scheme(v="int4"), "v"),
                                        (scheme(p="int8"), "p")], ids="qkvp")  # fmt: skip
def test_what_is_not_rounded_takes_no_part(made, part):
    q, k, v = qkv(20, 150, 32)
    bound = tq.error_bound(q, k, v, made)
    assert (getattr(bound, part) > 10 * bound.rounding).all()
    for other in set("qkvp") - {part}:
        assert getattr(bound, other).max() < 1e-5
    error = (tq.attention(q, k, v, made, backend="reference").double() - oracle(q, k, v, features_of(q, k))[0]).abs()
    assert (error.amax(dim=-1) / bound.total).median() > 0.02


def test_of_two_keys_the_bound_of_scores_is_the_error():
    q, k, _ = qkv(30, 2, 32)
    v = torch.tensor([0.0, 1.0])[:, None].expand(1, 2, 2, 32)
    made = scheme(q="int4", k="int4")
    bound = tq.error_bound(q, k, v, made)
    error = (tq.attention(q, k, v, made, backend="reference").double() - oracle(q, k, v, features_of(q, k))[0]).abs()
    assert (bound.total - error.amax(dim=-1)).abs().max() < 2e-5 < 0.01 < error.max()


def test_rows_that_attend_to_nothing_are_exact():
    q, k, v = qkv(20, 10, 32)
    bound = tq.error_bound(q, k, v, "int8", causal=True, sinks=torch.zeros(2))
    assert (bound.total[:, :, :10] == 0).all() and (bound.total[:, :, 10:] > 0).all()
    assert (tq.error_bound(q, k, v, "int8", mask=torch.full((20, 10), -INF)).total == 0).all()


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("number", [math.nan, INF])
@pytest.mark.parametrize("name", ["none", "int-flash-half", "kv-int8"])
def test_rows_that_see_what_is_not_finite_have_no_certificate(name, number, where):
    q, k, v = qkv(20, 20, 32)
    clean = tq.error_bound(q, k, v, name, causal=True)
    given = {"k": k, "v": v}
    given[where] = given[where].clone()
    given[where][:, :, 12, 3] = number
    bound = tq.error_bound(q, given["k"], given["v"], name, causal=True)
    assert bound.total[:, :, 12:].isinf().all() and clean.total.isfinite().all()
    if name == "none":
        assert bound.total[:, :, :12].isfinite().all()
    assert not any(part.isnan().any() for part in vars(bound).values())


def test_clipped_values_are_in_the_bound_of_tensors_and_not_in_that_of_codes():
    q, k, v = qkv(20, 60, 32)
    made = scheme(v="int8 head static")
    calibrator = tq.Calibrator(made)
    calibrator.observe("layer", q, k, 0.3 * v)
    scales = calibrator.scales()["layer"]
    out = tq.attention(q, k, v, made, scales=scales, backend="reference").double()
    error = (out - oracle(q, k, v, features_of(q, k))[0]).abs()
    bound = tq.error_bound(q, k, v, made, scales=scales)
    assert error.amax() > 0.1 and (error.amax(dim=-1) <= bound.total).all() and bound.total.isfinite().all()
    assert tq.error_bound(*tq.quantize(q, k, v, made, scales=scales), made).total.isinf().all()


def test_nothing_as_large_as_all_scores_is_held():
    n = 1536
    q, k, v = qkv(n, d=16, heads=2, dtype=torch.float16)
    with Largest() as largest:
        tq.error_bound(q, k, v, "int8", causal=True)
    assert largest.elements <= SCORES_AT_ONCE < n * n


def test_what_attention_refuses_is_refused():
    q, k, v = qkv(8)
    with pytest.raises(tq.ScalesError, match="needs k_scale"):
        tq.error_bound(q, k, v, "kv-fp8")
    with pytest.raises(TypeError, match="either all tensors or all QuantizedTensors"):
        tq.error_bound(tq.quantize(q, k, v, "int8")[0], k, v, "int8")
    with pytest.raises(ValueError, match="of another scheme"):
        tq.error_bound(*tq.quantize(q, k, v, "int8"), "int-flash")


def test_ranges_of_heads_are_certified_each_by_its_own_scheme():
    q, k, v = qkv(40, d=32, heads=4, kv_heads=2)
    both = tq.HeadSchemes(((1, tq.preset("int8")), (1, tq.preset("kv-int4"))))
    mask = torch.rand(1, 4, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    found, alone = (tq.error_bound(q, k, v, each, mask=mask) for each in (both, "kv-int4"))
    torch.testing.assert_close(found.total[:, 2:], alone.total[:, 2:], rtol=1e-2, atol=0)
    assert bool((found.total[:, :2] < alone.total[:, :2]).all())
    codes = tq.quantize(q, k, v, both)
    assert bool((tq.error_bound(*codes, both, mask=mask).total >= found.total).all())
