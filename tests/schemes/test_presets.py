"""The presets that ship: each is what its source in the literature or in the design says."""

import re

import pytest
import torch

import tokquant
from tokquant import QuantScheme, SchemeError
from tokquant.schemes import preset, preset_names, resolve
from tokquant.schemes.presets import source

KIVI_CACHE = {"cache": {"recent": 128}}
TABLE = {
    "none": ("fp32", "fp32", "fp32", "fp32 unit", {}),
    "int-flash": ("int8 token", "int8 token", "int8 head", "int8 unit", {"normalizer": "quantized"}),
    "int-flash-half": ("int8 token", "int8 token", "fp16", "fp16 unit", {}),
    "int8": ("int8 token", "int8 token, mean", "int8 channel_block 128, mean", "uint8 row_block 128", {}),
    "int8-token": ("int8 token", "int8 token, mean", "int8 token", "uint8 row_block 128", {}),
    "int8-fast": ("int8 token", "int8 block 128, mean", "int8 channel", "int8 row_block 128", {}),
    "int8-fp16": ("int8 token", "int8 block 128, mean", "fp16", "fp16 unit", {}),
    "int8-fp8": ("int8 token", "int8 block 128, mean", "fp8_e4m3 channel", "fp8_e4m3 unit", {}),
    "fp8": ("fp8_e4m3 head", "fp8_e4m3 head", "fp8_e4m3 head", "fp8_e4m3 unit", {}),
    "fp8-rotated": ("fp8_e4m3 head", "fp8_e4m3 head", "fp8_e4m3 head", "fp8_e4m3 unit", {"rotate": "hadamard"}),
    "int4": ("int4 token, block_mean", "int4 token, mean", "fp16", "fp16 unit", {}),
    "kv-fp8": ("fp16", "fp8_e4m3 head, static scale", "fp8_e4m3 head, static scale", "fp16 unit", {}),
    "kv-int8": ("int8 token", "int8 token, fp16 scales", "int8 token, fp16 scales", "int8 row_block 128", {}),
    "kv-int4": (
        "int8 token",
        "int4 token, asymmetric, fp16 scales",
        "int4 token, asymmetric, fp16 scales",
        "int8 row_block 128",
        {"rotate": "hadamard"},
    ),
    "kv-int4-kivi": (
        "fp16",
        "int4 channel_block 32, asymmetric, fp16 scales",
        "int4 group 32, asymmetric, fp16 scales",
        "fp16 unit",
        KIVI_CACHE,
    ),
    "kv-int2-kivi": (
        "fp16",
        "int2 channel_block 32, asymmetric, fp16 scales",
        "int2 group 32, asymmetric, fp16 scales",
        "fp16 unit",
        KIVI_CACHE,
    ),
    "fireq": (
        "fp8_e4m3 token",
        "int4 token, fp8_e4m3 scales",
        "int4 token, fp8_e4m3 scales",
        "fp8_e4m3 unit",
        {"balance": {"rope_pairs": {"top_k": 8}}},
    ),
}

BITS = {
    "none": (32, 32, 32),
    "int-flash": (8.25, 8.25, 8),
    "int-flash-half": (8.25, 8.25, 16),
    "int8": (8.25, 8.25, 8.25),
    "int8-token": (8.25, 8.25, 8.25),
    "int8-fast": (8.25, 8 + 32 / 128**2, 8),
    "int8-fp16": (8.25, 8 + 32 / 128**2, 16),
    "int8-fp8": (8.25, 8 + 32 / 128**2, 8),
    "fp8": (8, 8, 8),
    "fp8-rotated": (8, 8, 8),
    "int4": (4.25, 4.25, 16),
    "kv-fp8": (16, 8, 8),
    "kv-int8": (8.25, 8.125, 8.125),
    "kv-int4": (8.25, 4.25, 4.25),
    "kv-int4-kivi": (16, 5, 5),
    "kv-int2-kivi": (16, 3, 3),
    "fireq": (8.25, 4.0625, 4.0625),
}
every = pytest.mark.parametrize("name", preset_names())


def described(operand):
    text = operand.precision + (f" {operand.granularity}" if operand.scaled else "")
    text += f", {operand.smooth}" if operand.smooth != "none" else ""
    text += "" if operand.symmetric else ", asymmetric"
    text += "" if operand.scale_dtype == "fp32" else f", {operand.scale_dtype} scales"
    return text + (", static scale" if operand.scale == "static" else "")


def scales_for(scheme, q, k, v):
    if "static" not in (scheme.k.scale, scheme.v.scale, scheme.q.scale, scheme.k.smooth, scheme.v.smooth):
        return None
    calibrator = tokquant.Calibrator(scheme)
    calibrator.observe("layer", q, k, v)
    return calibrator.scales()["layer"]


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_of_the_design_is_just_what_the_design_says(name):
    scheme = preset(name)
    rest = scheme.model_dump(mode="json", exclude_defaults=True, exclude={"name", *"qkvp"})
    operands = tuple(described(getattr(scheme, role)) for role in "qkv")
    assert (*operands, f"{scheme.p.precision} {scheme.p.granularity}", rest) == TABLE[name]


@pytest.mark.parametrize("name", BITS)
def test_bits_per_value_count_codes_scales_and_zeros(name):
    assert list(preset(name).bits_per_value(128).values()) == pytest.approx(list(BITS[name]), abs=1e-6)


@every
def test_a_tensor_has_the_bits_per_value_that_its_scheme_promises(name):
    scheme = preset(name)
    q, k, v = (torch.randn(1, 1, 256, 128, dtype=torch.float16 if scheme.q.format.bits == 16 else None) for _ in range(3))
    quantized = tokquant.quantize(q, k, v, scheme, scales=scales_for(scheme, q, k, v))
    promised = scheme.bits_per_value(128)
    for x in quantized:
        # a scale a head or a channel is spread over no more than these 256 tokens
        spare = 0 if x.spec.granularity.kind not in ("head", "channel", "tensor") else 32 / 256
        assert promised[x.spec.role] <= x.bits_per_value <= promised[x.spec.role] + spare


@pytest.mark.parametrize("d", [128, 80])
@pytest.mark.parametrize("n", [1, 129])
@pytest.mark.parametrize("name", ["int8", "kv-int4", "fp8"])
def test_bits_per_value_count_nothing_that_a_backend_pads(name, n, d):
    tensors = [torch.randn(1, 2, n, d) for _ in "qkv"]
    bits = [[x.bits_per_value for x in tokquant.quantize(*tensors, name, backend=b)] for b in ("auto", "cpu", "reference")]
    assert bits[0] == bits[1] == bits[2]
    promised = preset(name).bits_per_value(d)
    if n > 1:  # scales of the second block, of channels and of heads are shared by few tokens
        assert all(promised[role] <= x < promised[role] + 0.6 for role, x in zip("qkv", bits[0], strict=True))


@every
def test_a_preset_is_named_after_its_file_and_says_where_it_is_from(name):
    text = source(name)
    assert preset(name).name == name
    assert text.startswith("# ") and "its per value" in text
    told = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text.partition("\nname")[0])]
    assert all(pytest.approx(bits, abs=5e-4) in told for bits in preset(name).bits_per_value(128).values())
    assert QuantScheme.from_yaml(text) == resolve(name) == preset(name)


@every
def test_a_preset_survives_yaml(name):
    assert QuantScheme.from_yaml(preset(name).to_yaml()) == preset(name)


@every
def test_a_preset_runs_and_is_near_to_exact_attention(name):
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    scheme = preset(name)
    out = tokquant.attention(q, k, v, name, scales=scales_for(scheme, q, k, v), backend="reference")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    largest_error = 0.7 if min(scheme.k.format.bits, scheme.v.format.bits) == 2 else 0.2
    assert ((out - exact).norm() / exact.norm()).item() < largest_error


def test_presets_do_the_same_thing_only_once():
    assert len({preset(name).digest() for name in preset_names()}) == len(preset_names())


def test_presets_are_listed_from_exact_to_few_bits():
    bits = [sum(preset(name).bits_per_value().values()) for name in preset_names()]
    assert bits == sorted(bits, reverse=True) and preset_names()[0] == "none"


@pytest.mark.parametrize(
    ("name", "near"), [("int9", "int8"), ("INT8", "int8"), ("kv_int8", "kv-int8"), ("../int8", "int8"), ("fp8_rotated", "fp8-")]
)
def test_an_unknown_preset_is_refused_with_the_nearest_name(name, near):
    with pytest.raises(SchemeError) as error:
        preset(name)
    assert f"no preset {name!r}; use one of fireq, " in str(error.value) and f"did you mean '{near}" in str(error.value)


NO_NAMES = {
    "nothing": "",
    "two dots": "..",
    "a NUL": "a\0b",
    "300 letters": "x" * 300,
    "many letters": "x" * 10**5,
    "a number": 8,
    "None": None,
    "a list": ["int8"],
}


@pytest.mark.parametrize("take", [preset, resolve], ids=["preset", "resolve"])
@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_what_cannot_be_a_name_is_refused_as_a_scheme_error(name, take):
    with pytest.raises(SchemeError, match=r"no preset|no scheme"):
        take(name)
