"""Checkpoints that carry their scheme and scales."""

import copy
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import decoder, prompts

import tokquant as tq
from tokquant.integrations.transformers import TokquantConfig, run_observed, use

LAYERS = [f"model.layers.{i}.self_attn" for i in range(2)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.fixture
def plain(tmp_path):
    """A checkpoint without a scheme."""
    decoder().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def scales():
    calibrator = tq.Calibrator("kv-fp8")
    run_observed(decoder(), [prompts()["input_ids"]], calibrator.observe)
    return calibrator.scales()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_scheme_come_back_as_they_were(plain, scales, tmp_path, dtype):
    model = load(plain, quantization_config=TokquantConfig("kv-fp8", scales), dtype=dtype)
    assert model.config._attn_implementation == "tokquant" and not any("scale" in name for name in model.state_dict())
    # the type of a model is no matter to its scales
    model.save_pretrained(tmp_path / "kept")
    copy.deepcopy(model).to(torch.float16).save_pretrained(tmp_path / "half")
    with safetensors.safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        for layer in LAYERS:
            for name, value in scales[layer].tensors.items():
                assert torch.equal(file.get_tensor(f"{layer}.{name}"), value)
    again = load(tmp_path / "kept", dtype=dtype)
    given = prompts()
    assert again.config._attn_implementation == "tokquant"
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert not torch.equal(again(**given).logits, use(decoder().to(dtype), "none")(**given).logits)
    # and once more
    again.save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_a_map_comes_back(plain, tmp_path):
    # in its order: the first pattern that matches decides
    data = {"name": "mine", "layers": {LAYERS[0]: "int4", "*": "int8"}}
    model = load(plain, quantization_config=TokquantConfig(tq.SchemeMap.from_data(data), backend="reference"))
    model.save_pretrained(tmp_path / "kept")

    given, expected = prompts(), use(decoder(), tq.SchemeMap.from_data(data), backend="reference")
    assert torch.equal(model(**given).logits, expected(**given).logits)
    again = load(tmp_path / "kept")
    assert again.model.layers[0].self_attn._tokquant.setting.scheme == tq.SchemeMap.from_data(data)


def test_the_implementation_that_is_asked_for_goes_first(plain):
    model = load(plain, quantization_config=TokquantConfig("int8"), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_without_tokquant_the_model_is_the_plain_one(plain, scales, tmp_path):
    load(plain, quantization_config=TokquantConfig("kv-fp8", scales)).save_pretrained(tmp_path / "kept")
    code = """
import sys, torch, transformers
models = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in sys.argv[1:]]
out = [model(torch.arange(3, 20)[None]).logits for model in models]
assert torch.equal(*out) and models[0].config._attn_implementation == "sdpa" and "tokquant" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code, plain, tmp_path / "kept"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_scales_that_were_changed_or_lost_are_refused(plain, scales, tmp_path):
    load(plain, quantization_config=TokquantConfig("kv-fp8", scales)).save_pretrained(tmp_path / "kept")
    path = tmp_path / "kept" / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    key = f"{LAYERS[1]}.v_scale"
    for changed in ({key: 2 * tensors[key]}, {}):
        rest = {name: value for name, value in tensors.items() if name != key}
        path.write_bytes(safetensors.torch.save(rest | changed, {"format": "pt"}))
        with pytest.raises(tq.ScalesError, match=r"those of the checkpoint|is not finite|not above zero"):
            load(tmp_path / "kept")


def test_a_config_that_does_not_fit_says_so(plain, scales):
    with pytest.raises(tq.ScalesError, match="'kv-fp8' is static; calibrate it"):
        TokquantConfig("kv-fp8")
    with pytest.raises(tq.SchemeError, match="int9"):
        TokquantConfig("int9")
    elsewhere = tq.Scales(scales.scheme, {"layers.0": scales[LAYERS[0]].tensors})
    with pytest.raises(tq.ScalesError, match=r"LlamaForCausalLM has no module 'layers\.0'"):
        load(plain, quantization_config=TokquantConfig("kv-fp8", elsewhere))
