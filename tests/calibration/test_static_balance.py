"""Calibrated factors of balance: those that the dynamic rule would take, and what is static in the frame that they make."""

import pytest
import torch
from factories import qkv, scheme

import tokquant as tq
from tokquant.calibration.balance import DIRECTIONS, Maxima
from tokquant.folding import split
from tokquant.quantize import frames
from tokquant.schemes.balance import RopePairBalance

RULES = {
    "channel": {},
    "channel, alpha 0.2": {"alpha": 0.2},
    "rope_pairs": {},
    "rope_pairs, top_k": {"alpha": 4, "beta": 3, "top_k": 3},
}


def balance(name, scale="static"):
    return {name.partition(",")[0]: RULES[name] | {"scale": scale}}


def given(seed=0, batch=1, **rest):
    """Keys with outlier channels and a bias, four heads of Q to two of K."""
    q, k, v = qkv(50, 70, 32, 4, 2, batch, seed=seed, **rest)
    k[..., 5] *= 20
    k[..., 9] += 12
    q[..., 7] *= 9
    return q, k, v


def calibrated(made, *batches):
    calibrator = tq.Calibrator(made)
    for operands in batches:
        calibrator.observe("layer", *operands)
    return calibrator.scales()["layer"]


@pytest.mark.parametrize("smooth", ["", "mean"])
@pytest.mark.parametrize("name", RULES)
def test_factors_of_one_sequence_are_those_that_it_takes_itself(name, smooth):
    static, dynamic = (scheme("int8", f"int8 {smooth}", balance=balance(name, scale)) for scale in ("static", "dynamic"))
    operands = given()
    scales = calibrated(static, operands)
    assert list(scales.tensors) == ["k_balance"] and scales.tensors["k_balance"].shape == (2, 1, 32)
    expected = tq.quantize(*operands, dynamic, backend="reference")
    for found, right in zip(tq.quantize(*operands, static, scales=scales, backend="reference"), expected, strict=True):
        assert torch.equal(found.codes, right.codes)


@pytest.mark.parametrize("name", ["channel", "channel, alpha 0.2", "rope_pairs, top_k"])
def test_a_calibrated_offset_is_off_before_magnitudes_are_taken(name):
    """What the dynamic rule makes of all tokens as one sequence, less the same offset."""
    batches = [given(seed, batch=2) for seed in range(3)]
    scales = calibrated(scheme("int8", "int8 static_offset", balance=balance(name)), *batches)
    q, k, v = (
        torch.cat([x.transpose(0, 1).flatten(1, 2)[None] for x in all_of], dim=2) for all_of in zip(*batches, strict=True)
    )
    k = k - scales.tensors["k_offset"].float()
    _, frame, _ = frames(q, k, v, scheme("int8", "int8", balance=balance(name, "dynamic")))
    found, right = scales.tensors["k_balance"], frame.balance[0]
    if name.startswith("channel"):
        assert torch.allclose(found, right, rtol=1e-5)
    else:
        assert bool((found <= right * 1.00001).all()) and bool((found >= right * 0.98).all())
        assert k.mul(found).abs().max() <= 4 * 1.00001, "FireQ's bound of alpha holds"


@pytest.mark.parametrize("turn", range(5))
def test_the_largest_norm_is_known_to_two_percent_wherever_the_points_lie(turn):
    angle = torch.tensor(turn * torch.pi / DIRECTIONS / 4)
    line = torch.linspace(-3, 5, 40)[:, None] * torch.stack([angle.cos(), angle.sin()]) + torch.tensor([7.0, -2.0])
    maxima = Maxima(RopePairBalance(alpha=1, scale="static"), True, 1, 2)
    maxima.observe((torch.ones(1, 1, 1, 2), line[None, None]))
    norm = 1 / maxima.factors(torch.tensor([[[7.0, -2.0]]]))
    assert bool((norm >= 5 * 0.99999).all()) and bool((norm <= 5 * 1.02).all())


@pytest.mark.parametrize("smooth", ["", "static_offset"])
@pytest.mark.parametrize("name", RULES)
def test_two_calibrators_merged_equal_one_over_both(name, smooth):
    made = scheme("int8 tensor static", f"int8 head static {smooth}", balance=balance(name))
    whole, first, second = (tq.Calibrator(made) for _ in range(3))
    for seed, part in ((0, first), (1, second)):
        for each in (whole, part):
            each.observe("layer", *given(seed))
    second.observe("only there", *given(2))
    whole.observe("only there", *given(2))
    first.merge(second)
    for layer, part in whole.scales().items():
        for tensor, value in part.tensors.items():
            assert torch.equal(value, first.scales()[layer].tensors[tensor]), (layer, tensor)


@pytest.mark.parametrize("words", ["tensor", "head", "channel", "head asymmetric", "channel asymmetric"])
@pytest.mark.parametrize("smooth", ["", "mean", "static_offset"])
@pytest.mark.parametrize("name", ["channel, alpha 0.2", "rope_pairs, top_k"])
def test_static_scales_cover_what_was_seen_in_the_balanced_frame(name, smooth, words):
    queries = words.replace(" asymmetric", "")
    made = scheme(f"int8 {queries} static", f"int8 {words} static {smooth}", "int8", balance=balance(name))
    batches = [given(seed) for seed in range(2)]
    scales = calibrated(made, *batches)
    for operands in batches:
        for x, codes in zip(operands[:2], tq.quantize(*operands, made, scales=scales, backend="reference"), strict=False):
            error = codes.frame.apply(x) - codes.frame.apply(codes.dequantize())
            step = codes.spread(codes.scale).float()
            assert bool((error.abs() <= step * 0.501 + 1e-5).all()), codes.spec
            assert error.abs().amax() > 0.2 * step.min(), "and no more than that is left free"


@pytest.mark.parametrize(
    ("made", "observer", "message"),
    [
        (scheme("int8", "int8 head static", balance=balance("channel"), rotate="hadamard"), "amax",
         "k: its scale cannot be static where a static balance is rotated.*use scale: dynamic, or rotate: none"),
        (scheme("int8", "int8 head static static_offset", balance="rope_pairs"), "amax",
         r"k: its scale cannot be static beside a static offset.*use balance \{rope_pairs: \{scale: static\}\}"),
    ],
)  # fmt: skip
def test_what_is_not_known_in_one_pass_is_refused(made, observer, message):
    with pytest.raises(tq.SchemeError, match=message):
        tq.Calibrator(made, observer)


def test_a_percentile_of_v_and_a_rotation_go_well_with_a_static_balance():
    made = scheme("int8", "int8", "int8 head static", balance=balance("rope_pairs"), rotate="hadamard")
    calibrator = tq.Calibrator(made, "percentile:99")
    calibrator.observe("layer", *given())
    assert set(calibrator.scales()["layer"].tensors) == {"k_balance", "v_scale"}


@pytest.mark.parametrize(
    ("d", "rule", "message"),
    [
        (33, {"rope_pairs": {"scale": "static"}}, "rope_pairs needs an even head_dim, not 33"),
        (16, {"rope_pairs": {"top_k": 17}}, "balance.rope_pairs.top_k: 17 is more than the 16 channels of a head"),
        (16, {"rope_pairs": {"top_k": 17, "scale": "static"}}, "balance.rope_pairs.top_k: 17 is more than"),
    ],
)
def test_pairs_that_a_head_does_not_have_are_refused(d, rule, message):
    operands = qkv(9, d=d)
    static = "scale" in rule["rope_pairs"]
    made = scheme("int8", "int8", balance=rule)
    with pytest.raises(tq.SchemeError, match=message):
        calibrated(made, operands) if static else tq.quantize(*operands, made)


def test_a_batch_that_is_refused_leaves_no_trace():
    calibrator = tq.Calibrator(scheme("int8", "int8", balance=balance("rope_pairs")))
    with pytest.raises(tq.SchemeError):
        calibrator.observe("layer", *qkv(9, d=33))
    assert not calibrator.layers


WRONG = {
    "a factor of zero": (torch.zeros(2, 1, 32), "holds a factor that is not above zero"),
    "a factor whose inverse is infinite": (torch.full((2, 1, 32), 1e-40), "holds a factor that is not above zero"),
    "a factor that is not finite": (torch.full((2, 1, 32), torch.inf), "holds a value that is not finite"),
    "one a head": (torch.ones(2, 32, 1), r"shape \[2, 32, 1\] is not \[H, 1, D\]"),
    "integers": (torch.ones(2, 1, 32, dtype=torch.int32), "torch.int32 is no type for it"),
}


@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG)
def test_factors_that_cannot_be_used_are_named(value, message):
    made = scheme("int8", "int8", balance=balance("channel"))
    with pytest.raises(tq.ScalesError, match=rf"layer\.k_balance: {message}"):
        tq.LayerScales("layer", {"k_balance": value}, made)


def test_factors_of_other_heads_are_refused():
    made = scheme("int8", "int8", balance=balance("channel"))
    scales = tq.LayerScales("layer", {"k_balance": torch.ones(3, 1, 32)}, made)
    with pytest.raises(tq.ScalesError, match=r"layer\.k_balance: shape \[3, 1, 32\] does not fit k \[1, 2, 70, 32\]"):
        tq.quantize(*given(), made, scales=scales)
    with pytest.raises(tq.ScalesError, match=r"scales: scheme 'custom' is static and needs k_balance"):
        tq.quantize(*given(), made)


def test_factors_go_through_a_file(tmp_path):
    made = scheme("int8", "int8 static_offset", balance=balance("rope_pairs, top_k"))
    calibrator = tq.Calibrator(made)
    calibrator.observe("layers.0", *given())
    tq.save_scales(tmp_path / "scales.safetensors", calibrator.scales())
    loaded = tq.load_scales(tmp_path / "scales.safetensors")
    assert loaded.scheme == made
    for name, value in calibrator.scales()["layers.0"].tensors.items():
        assert torch.equal(loaded["layers.0"].tensors[name], value)


@pytest.mark.parametrize("smooth", ["", "static_offset"])
@pytest.mark.parametrize("name", RULES)
def test_a_default_device_of_torch_changes_no_factor(name, smooth):
    made, operands = scheme("int8", f"int8 {smooth}", balance=balance(name)), given()
    expected = calibrated(made, operands).tensors["k_balance"]
    try:
        torch.set_default_device("meta")
        found = calibrated(made, operands).tensors["k_balance"]
        parts = split(found)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected) and torch.equal(parts[0] * parts[1], expected)


@pytest.mark.parametrize("name", RULES)
def test_histograms_are_balanced_too(name):
    """All values of a channel, times its factor: the whole range is that of the extremes."""
    made = scheme("int8 head static", "int8 channel static", balance=balance(name))
    extremes, whole = (tq.Calibrator(made, observer) for observer in ("amax", "percentile:100"))
    for each in (extremes, whole):
        each.observe("layer", *given())
    first, second = (each.scales()["layer"].tensors for each in (extremes, whole))
    for tensor in ("q_scale", "k_scale", "k_balance"):
        torch.testing.assert_close(second[tensor], first[tensor], rtol=0.01, atol=0)


@pytest.mark.parametrize("smooth", ["", "static_offset"])
@pytest.mark.parametrize("name", ["channel", "rope_pairs, top_k"])
def test_a_calibration_with_balance_goes_on_from_its_file(name, smooth, tmp_path):
    made = scheme("int8", f"int8 {smooth}", balance=balance(name))
    whole, half = tq.Calibrator(made), tq.Calibrator(made)
    whole.observe("layer", *given(0))
    half.observe("layer", *given(0))
    half.save(tmp_path / "half.safetensors")
    again = tq.Calibrator.load(tmp_path / "half.safetensors")
    for each in (whole, again):
        each.observe("layer", *given(1))
    right = whole.scales()["layer"].tensors
    for tensor, value in again.scales()["layer"].tensors.items():
        assert torch.equal(value, right[tensor])
