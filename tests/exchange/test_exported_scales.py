"""Exported scales have the names, shapes and numbers that engines read, and come back as they were."""

import json

import pytest
import safetensors
import torch

import tokquant as tq
from tokquant.calibration.scales import Scales
from tokquant.exchange.compressed_tensors import fp8_scheme

LAYER = "model.layers.{}.self_attn"


def made(scheme, layers=("model.layers.0.self_attn", "model.layers.1.self_attn"), heads=2):
    """Scales of several layers, each another number: 1/16, 2/16 ... by layer and operand."""
    tensors = {}
    for number, layer in enumerate(layers):
        tensors[layer] = {}
        for place, role in enumerate("qkv" if scheme.q.scaled else "kv"):
            kind = getattr(scheme, role).granularity.kind
            count = 1 if kind == "tensor" else 2 * heads if role == "q" else heads
            tensors[layer][f"{role}_scale"] = (torch.arange(count) + 1 + 8 * place + 64 * number).view(-1, 1, 1) / 16
    return Scales(scheme, tensors)


def contents(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("q", [False, True], ids=["kv", "qkv"])
@pytest.mark.parametrize("kind", ["tensor", "head"])
def test_compressed_tensors_get_float32_under_the_names_of_modules(kind, q, tmp_path):
    scales = made(fp8_scheme(kind, q=q))
    tq.export_checkpoint_scales(tmp_path / "s", scales)
    tensors, metadata = contents(tmp_path / "s")
    roles = "qkv" if q else "kv"
    assert set(tensors) == {f"{layer}.{role}_scale" for layer in scales for role in roles} and metadata == {"format": "pt"}
    heads = {"q": 4, "k": 2, "v": 2}
    for name, value in tensors.items():
        layer, _, scale = name.rpartition(".")
        assert list(value.shape) == ([1] if kind == "tensor" else [heads[scale[0]], 1, 1]) and value.dtype == torch.float32
        assert torch.equal(value.flatten(), scales[layer].tensors[scale].flatten())


def test_one_tensor_for_both_scales_is_written_twice(tmp_path):
    one = torch.ones(4, 1, 1)[::2]
    tq.export_checkpoint_scales(tmp_path / "s", Scales("kv-fp8", {"a": {"k_scale": one, "v_scale": one}}))
    assert {name: value.tolist() for name, value in contents(tmp_path / "s")[0].items()} == dict.fromkeys(
        ("a.k_scale", "a.v_scale"), one.tolist()
    )


def test_modelopt_gets_them_under_its_projections(tmp_path):
    tq.export_checkpoint_scales(tmp_path / "s", made(fp8_scheme("tensor")), "modelopt")
    tensors, _ = contents(tmp_path / "s")
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "model.layers.0.self_attn.k_proj.k_scale": 1 / 16,
        "model.layers.0.self_attn.v_proj.v_scale": 9 / 16,
        "model.layers.1.self_attn.k_proj.k_scale": 65 / 16,
        "model.layers.1.self_attn.v_proj.v_scale": 73 / 16,
    }


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_what_goes_out_comes_in_as_it_was(format, tmp_path):
    scales = made(fp8_scheme("tensor"))
    tq.export_checkpoint_scales(tmp_path / "s.safetensors", scales, format)
    read = tq.import_checkpoint_scales(tmp_path)
    assert read.scheme == scales.scheme and list(read) == list(scales)
    for layer in scales:
        assert all(torch.equal(read[layer].tensors[name], value) for name, value in scales[layer].tensors.items())


def test_sglang_gets_one_number_a_layer_and_rank_the_larger_of_k_and_v(tmp_path):
    scales = made(fp8_scheme("tensor"), [LAYER.format(i) for i in (1, 0)])
    tq.export_checkpoint_scales(tmp_path / "s.json", scales, "sglang", model_type="llama", tp_size=2)
    layers = {"0": 73 / 16, "1": 9 / 16}
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "model_type": "llama",
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": layers, "1": layers}},
    }


def test_scales_of_other_types_and_devices_of_memory_are_written_by_value(tmp_path):
    value = torch.tensor([0.1, 7, 0.2], dtype=torch.bfloat16)[::2].view(2, 1, 1)
    scales = Scales(tq.preset("kv-fp8"), {"a": {"k_scale": value, "v_scale": value}})
    tq.export_checkpoint_scales(tmp_path / "s", scales)
    tensors, _ = contents(tmp_path / "s")
    assert torch.equal(tensors["a.k_scale"], value.float()) and torch.equal(tensors["a.v_scale"], value.float())
    assert value.dtype == torch.bfloat16


TENSOR, HEAD = fp8_scheme("tensor"), fp8_scheme("head")
MEAN = HEAD.model_copy(update={"k": HEAD.k.model_copy(update={"smooth": "mean"})})


@pytest.mark.parametrize(
    ("scales", "format", "options", "message"),
    [
        (made(MEAN), "compressed-tensors", {}, r"k\.smooth: mean cannot be expressed; use none"),
        (
            made(HEAD),
            "modelopt",
            {},
            r"k\.granularity: head cannot be expressed in modelopt; use tensor, or format compressed-te",
        ),
        (made(HEAD), "sglang", {"model_type": "llama"}, r"v\.granularity: head cannot be expressed in sglang"),
        (made(fp8_scheme("tensor", q=True)), "modelopt", {}, r"q\.precision: fp8_e4m3 cannot be expressed in modelopt"),
        (made(TENSOR), "vllm", {}, "format: 'vllm' is not valid; use compressed-tensors, modelopt, sglang"),
        (made(TENSOR), "compresed-tensors", {}, "did you mean 'compressed-tensors'"),
        (made(TENSOR), "modelopt", {"tp_size": 2}, "model_type and tp_size: only format sglang has them, not modelopt"),
        (
            made(TENSOR),
            "modelopt",
            {"model_type": "llama"},
            "model_type and tp_size: only format sglang has them, not modelopt",
        ),
        (made(TENSOR), "sglang", {"model_type": ""}, "model_type: '' is not valid"),
        (made(TENSOR), "sglang", {"model_type": 5}, "model_type: 5 is not valid"),
        (made(TENSOR), "sglang", {}, "model_type: None is not valid; sglang needs that of config.json"),
        (made(TENSOR), "sglang", {"model_type": "llama", "tp_size": 0}, "tp_size: 0 is not a whole number from 1 to 1024"),
        (made(TENSOR, ["a"]), "sglang", {"model_type": "llama"}, "a: sglang counts layers, and this name has not one number"),
        (made(TENSOR, ["a.0", "a.2"]), "sglang", {"model_type": "llama"}, r"every layer from 0 on, once; there are a\.0, a\.2"),
        (made(TENSOR, ["a.0", "b.0"]), "sglang", {"model_type": "llama"}, r"every layer from 0 on, once; there are a\.0, b\.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_a_format_cannot_express_is_named_and_nothing_written(scales, format, options, message, tmp_path):
    path = tmp_path / "s"
    path.write_text("before")
    with pytest.raises(ValueError, match=message):
        tq.export_checkpoint_scales(path, scales, format, **options)
    assert path.read_text() == "before"
