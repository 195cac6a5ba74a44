"""Calibration: statistics that merge exactly, and scales that do what dynamic ones would on the same data."""

import itertools

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant.features import Features
from tokquant.reference import oracle
from tokquant.schemes import preset

INT8 = {"precision": "int8"}


def scheme(k=None, v=None, q=None, **more):
    static = {"precision": "int8", "granularity": "head", "scale": "static"}
    return tq.QuantScheme(q=q or INT8, k=k or static, v=v or static, p=INT8, **more)


def batch(n=50, heads=2, d=32, batch=2):
    return tuple(torch.randn(batch, h, n, d) + 0.5 for h in (2 * heads, heads, heads))


def relative_error(operands, s, scales):
    out = tq.attention(*operands, s, scales=scales, backend="reference")
    exact, _ = oracle(*operands, Features(scale=operands[0].shape[-1] ** -0.5))
    return ((out - exact).norm() / exact.norm()).item()


STATIC = [
    ({"granularity": g, "symmetric": symmetric, "smooth": smooth}, rotate)
    for g, symmetric, smooth, rotate in itertools.product(
        ["tensor", "head", "channel"], [True, False], ["none", "mean", "static"], ["none", "hadamard"]
    )
]


@pytest.mark.parametrize(("part", "rotate"), STATIC, ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())))
def test_static_scales_cover_what_was_seen(part, rotate):
    """No value that was observed is clipped: each lies within half a step of its code."""
    s = scheme(k=INT8 | part | {"scale": "static"}, v=INT8 | part | {"scale": "static"}, rotate=rotate, rotate_v=rotate)
    calibrator = tq.Calibrator(s)
    seen = [batch() for _ in range(2)]
    for operands in seen:
        calibrator.observe("a", *operands)
    scales = calibrator.scales()["a"]
    for operands in seen:
        for x, codes in list(zip(operands, tq.quantize(*operands, s, scales=scales), strict=True))[1:]:
            error = codes.frame.apply(x) - codes.frame.apply(codes.dequantize())
            assert bool((error.abs() <= codes.scale.float() * 0.5001 + 1e-5).all())
        assert relative_error(operands, s, scales) < 0.06


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_amax_scales_are_those_that_one_batch_gets_dynamically(granularity):
    part = {"precision": "int8", "granularity": granularity}
    q, k, v = batch(batch=1)
    static = scheme(k=part | {"scale": "static"}, v=part | {"scale": "static"})
    calibrator = tq.Calibrator(static)
    calibrator.observe("a", q, k, v)
    fixed = tq.quantize(q, k, v, static, scales=calibrator.scales()["a"])
    dynamic = tq.quantize(q, k, v, scheme(k=part, v=part))
    for one, other in zip(fixed[1:], dynamic[1:], strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_a_static_offset_of_k_changes_only_its_codes_and_serves_a_dynamic_scheme():
    s = preset("kv-int4").model_copy(update={"k": preset("kv-int4").k.model_copy(update={"smooth": "static"})})
    q, k, v = batch(n=200)
    k[..., 4] += 20
    calibrator = tq.Calibrator(s)
    calibrator.observe("a", q, k, v)
    scales = calibrator.scales()["a"]
    assert list(scales.tensors) == ["k_offset"] and scales.tensors["k_offset"].shape == (2, 1, 32)
    assert torch.allclose(scales.tensors["k_offset"].float(), k.mean(dim=(0, 2))[:, None], rtol=1e-2, atol=1e-2)
    assert relative_error((q, k, v), s, scales) < 0.7 * relative_error((q, k, v), "kv-int4", None)


@pytest.mark.parametrize("balance", ["channel", "rope_pairs"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_a_static_offset_is_that_of_k_itself_whatever_is_done_to_it_afterwards(balance, rotate):
    s = scheme(k=INT8 | {"smooth": "static"}, v=INT8, balance=balance, rotate=rotate)
    q, k, v = batch(n=200)
    k = k * torch.linspace(0.1, 30, 32) + 50
    calibrator = tq.Calibrator(s)
    calibrator.observe("a", q, k, v)
    scales = calibrator.scales()["a"]
    assert torch.allclose(scales.tensors["k_offset"].float(), k.mean(dim=(0, 2))[:, None], rtol=1e-2)
    dynamic = scheme(k=INT8 | {"smooth": "mean"}, v=INT8, balance=balance, rotate=rotate)
    assert relative_error((q, k, v), s, scales) < 1.5 * relative_error((q, k, v), dynamic, None) + 1e-3


def test_what_depends_on_an_offset_that_is_not_known_yet_is_refused():
    with pytest.raises(tq.SchemeError, match="k: its scale cannot be static beside a static offset of K under a balance"):
        tq.Calibrator(scheme(k=INT8 | {"granularity": "head", "scale": "static", "smooth": "static"}, balance="channel"))
    with pytest.raises(tq.SchemeError, match="q: its scale cannot be static beside a static offset of K"):
        q = INT8 | {"granularity": "head", "scale": "static"}
        tq.Calibrator(scheme(q=q, k=INT8 | {"smooth": "static"}, balance="channel"))
    with pytest.raises(tq.SchemeError, match=r"q\.scale: K's dynamic scales per channel are multiplied into Q"):
        scheme(q=INT8 | {"granularity": "head", "scale": "static"}, k=INT8 | {"granularity": "channel"})


def test_a_merge_that_fails_changes_nothing():
    one, other = tq.Calibrator("kv-fp8"), tq.Calibrator("kv-fp8")
    one.observe("b", *batch())
    other.observe("a", *batch())
    other.observe("b", *batch(heads=3))
    with pytest.raises(ValueError, match=r"merge: b\.q: heads and channels \[6, 32\] are not \[4, 32\]"):
        one.merge(other)
    assert list(one.layers) == ["b"] and one.layers["b"].tokens["k"] == 100


def test_a_layer_needs_a_name():
    with pytest.raises(ValueError, match="name: '' is no name of a layer"):
        tq.Calibrator("kv-fp8").observe("", *batch())


def test_scales_follow_the_tensors_to_their_device():
    calibrator = tq.Calibrator(scheme(k=INT8 | {"smooth": "static"}))
    calibrator.observe("a", *batch())
    moved = tq.quantize(*(x.to("meta") for x in batch()), calibrator.scheme, scales=calibrator.scales()["a"])
    assert moved[1].offset.device.type == moved[2].scale.device.type == "meta"


@pytest.mark.parametrize("elsewhere", [torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("observer", ["amax", "percentile:99", "mse", "ema"])
def test_a_default_type_or_device_of_torch_changes_no_scale(elsewhere, observer):
    q, k, v = batch()
    asymmetric = INT8 | {"granularity": "channel", "scale": "static", "symmetric": False, "smooth": "static"}
    s = scheme(q=INT8 | {"granularity": "head", "scale": "static"}, k=asymmetric, v=asymmetric)
    found = []
    for changed in (False, True):
        try:
            if changed:
                torch.set_default_device("meta") if elsewhere == "meta" else torch.set_default_dtype(elsewhere)
            calibrator = tq.Calibrator(s, observer)
            calibrator.observe("layer", q, k, v)
            found.append(calibrator.scales()["layer"].tensors)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*(each.values() for each in found), strict=True))


def test_what_is_not_finite_is_refused_and_leaves_no_trace():
    calibrator = tq.Calibrator("kv-fp8")
    q, k, v = batch()
    calibrator.observe("a", q, k, v)
    before = calibrator.scales()["a"].tensors["k_scale"]
    k = k.clone()
    k[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"a\.k: holds a value that is not finite"):
        calibrator.observe("a", q, k, v)
    with pytest.raises(ValueError, match=r"b\.k: "):
        calibrator.observe("b", q, k, v)
    assert torch.equal(calibrator.scales()["a"].tensors["k_scale"], before) and list(calibrator.scales()) == ["a"]


def test_a_layer_that_changes_shape_is_named():
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("a", *batch())
    with pytest.raises(ValueError, match=r"a\.q: heads and channels \[6, 32\] are not \[4, 32\]"):
        calibrator.observe("a", *batch(heads=3))


def test_nothing_observed_is_an_error():
    with pytest.raises(tq.ScalesError, match="no layers; observe"):
        tq.Calibrator("kv-fp8").scales()


def test_a_scale_that_its_type_does_not_hold_names_its_layer():
    calibrator = tq.Calibrator(scheme(k=INT8 | {"granularity": "head", "scale": "static", "scale_dtype": "fp16"}))
    q, k, v = batch()
    calibrator.observe("layers.0", q, k, v)
    calibrator.observe("layers.1", q, 1e9 * k, v)
    with pytest.raises(tq.ScalesError, match=r"layers\.1\.k: a scale of .* does not fit scale_dtype fp16"):
        calibrator.scales()


def test_a_dynamic_scheme_has_nothing_to_calibrate():
    with pytest.raises(tq.SchemeError, match="'int8' has no static part"):
        tq.Calibrator("int8")


def test_unobserved_heads_of_zeros_give_scale_one():
    q, k, v = batch()
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("a", q, torch.zeros_like(k), v)
    assert torch.equal(calibrator.scales()["a"].tensors["k_scale"], torch.ones(2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_an_offset_is_kept_in_sixteen_bits(dtype):
    calibrator = tq.Calibrator(scheme(k=INT8 | {"smooth": "static"}))
    calibrator.observe("a", *(x.to(dtype) for x in batch()))
    assert calibrator.scales()["a"].tensors["k_offset"].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("kind", ["fp32", "fp8_e4m3"])
def test_static_q_covers_k_per_channel_folded_in(kind):
    part = {"precision": "int8", "scale": "static"}
    s = scheme(q=part | {"granularity": "head"}, k=part | {"granularity": "channel", "scale_dtype": kind})
    q, k, v = batch()
    k[..., 3] *= 30
    calibrator = tq.Calibrator(s)
    calibrator.observe("a", q, k, v)
    codes, _, _ = tq.quantize(q, k, v, s, scales=calibrator.scales()["a"])
    error = codes.frame.apply(q) - codes.frame.apply(codes.dequantize())
    assert bool((error.abs() <= codes.scale.float() * 0.5001).all())


MAP = """
schemes:
  offset: {q: {precision: int8}, k: {precision: int8, smooth: static}, v: {precision: fp16}, p: {precision: fp16}}
layers:
  layers.0: kv-fp8
  layers.1: offset
  layers.2: {heads: {"0": int8, "1": kv-int4}}
  "*": int8
"""


def test_a_map_is_calibrated_layer_by_layer(tmp_path):
    schemes = tq.SchemeMap.from_yaml(MAP)
    calibrator = tq.Calibrator(schemes)
    tensors = {f"layers.{i}": qkv(40, heads=2, seed=i) for i in range(4)}
    for name, operands in tensors.items():
        calibrator.observe(name, *operands)
    calibrator.save(tmp_path / "state.safetensors")
    tq.save_scales(tmp_path / "scales.safetensors", tq.Calibrator.load(tmp_path / "state.safetensors").scales())
    scales = tq.load_scales(tmp_path / "scales.safetensors")
    assert scales.scheme == schemes and list(scales) == ["layers.0", "layers.1"]
    assert set(scales["layers.0"].tensors) == {"k_scale", "v_scale"} and set(scales["layers.1"].tensors) == {"k_offset"}
    for name, operands in tensors.items():
        own = scales.get(name)
        alone = tq.Calibrator(schemes[name]) if own else None
        if alone:
            alone.observe(name, *operands)
        expected = tq.attention(*operands, schemes[name], scales=alone.scales()[name] if alone else None)
        assert torch.equal(tq.attention(*operands, schemes, layer=name, scales=own), expected)
    with pytest.raises(tq.SchemeError, match="'same' has no static part"):
        tq.Calibrator(tq.SchemeMap((("*", tq.preset("int8")),), "same"))
    by_heads = tq.HeadSchemes(((1, tq.preset("int8")), (1, tq.preset("kv-fp8"))))
    with pytest.raises(tq.SchemeError, match=r"layers\.9: 'kv-fp8' is static, which a scheme for a range of heads cannot be"):
        tq.Calibrator(tq.SchemeMap((("*", by_heads),))).observe("layers.9", *tensors["layers.0"])
    with pytest.raises(tq.SchemeError, match="is a map of layers, and a quantization_config has one scheme"):
        tq.export_checkpoint_scales(tmp_path / "out.safetensors", scales)
