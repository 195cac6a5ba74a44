"""What is written is what the package compressed-tensors takes, and means the same numbers there."""

import json

import pytest
import torch
from compressed_tensors.modeling import KV_CACHE_ATTR
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from factories import scheme
from transformers import LlamaConfig, LlamaForCausalLM

import tokquant as tq
from tokquant.exchange.compressed_tensors import fp8_scheme
from tokquant.tensor_files import read_tensors

STATIC = "fp8_e4m3 {} static"
EXPRESSIBLE = {f"{kind}{' with q' if q else ''}": fp8_scheme(kind, q=q) for kind in ("head", "tensor") for q in (False, True)}


def kv(words, **rest):
    return scheme("fp16", words, words, "fp16", **rest)


def tiny_llama():
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_compressed_tensors_takes_what_is_written_and_writes_what_is_read(name):
    written = tq.to_compressed_tensors(EXPRESSIBLE[name])
    assert tq.from_compressed_tensors(written) == EXPRESSIBLE[name]
    theirs = QuantizationConfig.model_validate(json.loads(json.dumps(written)))
    back = json.loads(theirs.model_dump_json())
    assert back["kv_cache_scheme"] == written["kv_cache_scheme"]
    assert tq.from_compressed_tensors({"model_type": "llama", "quantization_config": back}) == EXPRESSIBLE[name]


def test_the_preset_is_what_a_scale_a_head_means():
    assert tq.from_compressed_tensors(tq.to_compressed_tensors("kv-fp8")) == tq.preset("kv-fp8")


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_model_quantized_by_what_is_written_has_the_names_and_shapes_of_exported_scales(name, tmp_path):
    model = tiny_llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(tq.to_compressed_tensors(EXPRESSIBLE[name])))
    expected = {key: list(value.shape) for key, value in model.state_dict().items() if key.endswith("_scale")}
    calibrator = tq.Calibrator(EXPRESSIBLE[name])
    for layer in range(2):
        calibrator.observe(f"model.layers.{layer}.self_attn", *(torch.randn(1, h, 20, 16) for h in (4, 2, 2)))
    path = tmp_path / "scales.safetensors"
    tq.export_checkpoint_scales(path, calibrator.scales())
    written = read_tensors(path, ValueError)[0]
    assert {key: list(value.shape) for key, value in written.items()} == expected
    found = model.load_state_dict(written, strict=False)
    assert not found.unexpected_keys and not any(key.endswith("_scale") for key in found.missing_keys)
    assert tq.from_compressed_tensors(QuantizationConfig.from_pretrained(model).to_dict()) == EXPRESSIBLE[name]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_transformers_loads_what_is_exported_beside_a_model(name, tmp_path):
    """As docs/exchange.md says: the file beside the shards, its names in their index, the block in config.json."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    calibrator = tq.Calibrator(EXPRESSIBLE[name])
    for layer in range(2):
        calibrator.observe(f"model.layers.{layer}.self_attn", *(torch.randn(1, h, 20, 16) for h in (4, 2, 2)))
    scales = calibrator.scales()
    tq.export_checkpoint_scales(tmp_path / "kv_scales.safetensors", scales)
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / shard)
    files = (shard, "kv_scales.safetensors")
    where = {key: file for file in files for key in read_tensors(tmp_path / file, ValueError)[0]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = tq.to_compressed_tensors(EXPRESSIBLE[name])
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    for layer, part in scales.items():
        for scale, value in part.tensors.items():
            assert torch.equal(getattr(loaded.get_submodule(layer), scale).flatten(), value.flatten())
    ids = torch.randint(0, 64, (1, 20))
    with torch.no_grad():
        exact, quantized = model(ids).logits, loaded(ids).logits
    assert 0 < (quantized - exact).norm() < 0.1 * exact.norm()
    assert tq.import_checkpoint_scales(tmp_path).scheme == EXPRESSIBLE[name]


@pytest.mark.parametrize("kind", ["head", "tensor"])
def test_scales_and_codes_are_theirs_bit_for_bit(kind):
    x = torch.randn(1, 2, 50, 32) * torch.tensor([1.0, 30.0]).view(1, 2, 1, 1)
    calibrator = tq.Calibrator(fp8_scheme(kind))
    calibrator.observe("a", x, x, x)
    scales = calibrator.scales()["a"]
    args = QuantizationArgs(**tq.to_compressed_tensors(fp8_scheme(kind))["kv_cache_scheme"])
    low, high = (x.amin((0, 2, 3)), x.amax((0, 2, 3))) if kind == "head" else (x.amin()[None], x.amax()[None])
    scale, _ = calculate_qparams(low, high, args)
    assert torch.equal(scales.tensors["k_scale"].flatten(), scale)
    _, k, _ = tq.quantize(x, x, x, fp8_scheme(kind), scales=scales, backend="reference")
    scale = scale.view(-1, 1, 1)
    theirs = quantize(x, scale, torch.zeros_like(scale), args, dtype=torch.float8_e4m3fn)
    assert torch.equal(k.codes.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(k.dequantize(), dequantize(theirs, scale, args=args))


def test_a_model_that_compressed_tensors_calibrates_and_saves_is_read_as_our_calibrator_saw_it(tmp_path):
    """As llm-compressor does: hooks see K and V, its rule makes scales of them, `save_pretrained` makes shards."""
    model = tiny_llama()
    config = QuantizationConfig.model_validate(tq.to_compressed_tensors("kv-fp8"))
    apply_quantization_config(model, config)
    calibrator, args = tq.Calibrator("kv-fp8"), config.kv_cache_scheme
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.quantization_enabled = False

        def see(cache, operands, index=index, attention=attention):
            k, v = operands[:2]
            calibrator.observe(f"model.layers.{index}.self_attn", k, k, v)
            for name, x in (("k", k), ("v", v)):
                scale, _ = calculate_qparams(x.amin((0, 2, 3)), x.amax((0, 2, 3)), args)
                getattr(attention, f"{name}_scale").data = scale.view(-1, 1, 1)

        getattr(attention, KV_CACHE_ATTR).register_forward_pre_hook(see)
    with torch.no_grad():
        model(torch.randint(0, 64, (2, 30)))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    scales = tq.import_checkpoint_scales(tmp_path)
    assert scales.scheme == tq.preset("kv-fp8")
    assert set(scales) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for name, part in calibrator.scales().items():
        assert all(torch.equal(scales[name].tensors[key], value) for key, value in part.tensors.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (kv("int8 head static"), r"k\.precision: int8 cannot be expressed \(.*absmax / 127\.5\); use fp8_e4m3"),
        (kv("fp8_e5m2 head static"), r"v\.precision: fp8_e5m2 cannot be expressed; use fp8_e4m3"),
        (kv("fp16"), r"k\.precision: fp16 cannot be expressed; use fp8_e4m3"),
        (kv("fp8_e4m3 head"), r"k\.scale: dynamic cannot be expressed .*; use static"),
        (kv("fp8_e4m3 channel static"), r"k\.granularity: channel cannot be expressed; use head or tensor"),
        (kv("fp8_e4m3 token"), r"v\.granularity: token cannot be expressed; use head or tensor"),
        (scheme("fp16", STATIC.format("head"), STATIC.format("tensor"), "fp16"), r"v\.granularity: tensor .*\(here head\)"),
        (kv("fp8_e4m3 head static scale=fp16"), r"k\.scale_dtype: fp16 cannot be expressed; use fp32"),
        (kv("int8 head static asymmetric"), r"k\.symmetric: false cannot be expressed; use true"),
        (kv("fp8_e4m3 head static mean"), r"k\.smooth: mean cannot be expressed; use none"),
        (kv("fp8_e4m3 head static static_offset"), r"v\.smooth: static cannot be expressed; use none"),
        (kv(STATIC.format("head"), rotate="hadamard"), "rotate: hadamard cannot be expressed; use none"),
        (kv(STATIC.format("head"), rotate_v="hadamard"), "rotate_v: hadamard cannot be expressed; use none"),
        (kv(STATIC.format("head"), balance="channel"), "balance: channel cannot be expressed; use none"),
        (kv(STATIC.format("head"), normalizer="quantized"), "normalizer: quantized cannot be expressed; use exact"),
        (kv(STATIC.format("head"), cache={"recent": 128}), "cache: {sink: 0, recent: 128, page: 128} cannot be expressed"),
        (scheme("int8", *[STATIC.format("head")] * 2, "fp16"), r"q\.precision: int8 cannot be expressed"),
        (scheme("fp16 block_mean", *[STATIC.format("head")] * 2, "fp16"), r"q\.smooth: block_mean cannot be expressed"),
        (scheme("fp16", *[STATIC.format("head")] * 2, "int8"), r"p: {precision: int8.* cannot be expressed; use fp16, as"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_expressed_is_named_with_what_can(changed, message):
    with pytest.raises(tq.SchemeError, match=message):
        tq.to_compressed_tensors(changed)


def test_every_part_that_cannot_be_expressed_is_in_one_error():
    with pytest.raises(tq.SchemeError) as error:
        tq.to_compressed_tensors("int8")
    places = [place for place, _ in error.value.problems]
    assert {"q.precision", "k.precision", "k.granularity", "k.smooth", "v.granularity", "p"} <= set(places)


def test_targets_are_names():
    q = EXPRESSIBLE["head with q"]
    for targets in ("LlamaAttention", ["LlamaAttention"], ("LlamaAttention",)):
        assert tq.to_compressed_tensors(q, targets)["config_groups"]["attention"]["targets"] == ["LlamaAttention"]
    for targets in (5, [5], None):
        with pytest.raises(TypeError, match=r"targets: .*; give a class, or re: and a pattern of names"):
            tq.to_compressed_tensors(q, targets)


def test_what_does_not_change_numbers_is_expressed():
    plain = tq.to_compressed_tensors("kv-fp8")
    words = STATIC.format("head")
    for same in (scheme("bf16", words, words, "bf16"), scheme("fp32", words, words, "fp32", cache={"page": 64})):
        assert tq.to_compressed_tensors(same) == plain


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (FP8, "tensor"),
        ({"dynamic": False, "num_bits": 8, "type": "float"}, "tensor"),
        ({"type": "float"}, "tensor"),
        (FP8 | {"type": "FLOAT", "strategy": "ATTN_HEAD"}, "head"),
        (FP8 | {"observer": "minmax", "observer_kwargs": {"averaging_constant": 0.01}, "zp_dtype": None}, "tensor"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "tensor"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": FP8}}, "kv_cache_scheme": FP8}, "tensor"),
        (
            {
                "config_groups": {
                    "g": {"targets": ["re:.*self_attn.*_proj"], "weights": FP8, "input_activations": FP8 | {"type": "int"}},
                },
                "kv_cache_scheme": FP8,
            },
            "tensor",
        ),
    ],
    ids=["args", "ModelOpt's", "defaults", "capitals", "observer", "ModelOpt's config", "beside weights", "beside projections"],
)
def test_blocks_as_tools_write_them_are_read(block, kind):
    assert tq.from_compressed_tensors(block) == fp8_scheme(kind)


def test_a_group_of_attention_has_codes_for_q():
    group = {"targets": ["LlamaAttention"], "input_activations": FP8 | {"strategy": "attn_head"}}
    assert tq.from_compressed_tensors({"config_groups": {"attention": group}}) == fp8_scheme("head", q=True)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (FP8 | {"type": "int"}, r"kv_cache_scheme\.type: 'int' is not read.*use float"),
        ({}, r"kv_cache_scheme\.type: 'int' is not read"),
        (FP8 | {"num_bits": 4, "group_size": 16}, r"kv_cache_scheme\.num_bits: 4 is not read; use 8"),
        (FP8 | {"symmetric": False}, r"kv_cache_scheme\.symmetric: False is not read"),
        (FP8 | {"dynamic": True}, r"kv_cache_scheme\.dynamic: True is not read"),
        (FP8 | {"dynamic": "local"}, r"kv_cache_scheme\.dynamic: 'local' is not read"),
        (FP8 | {"strategy": "attn_haed"}, r"kv_cache_scheme\.strategy: 'attn_haed' is not read.*did you mean 'attn_head'"),
        (FP8 | {"strategy": ["tensor"]}, r"kv_cache_scheme\.strategy: \['tensor'\] is not read"),
        ({"num_bits": 8, "type": "float", "group_size": 64}, r"kv_cache_scheme\.strategy: 'group' is not read"),
        ({"num_bits": 8, "type": "float", "group_size": -1}, r"kv_cache_scheme\.strategy: 'channel' is not read"),
        (FP8 | {"num_bitz": 8}, r"kv_cache_scheme\.num_bitz: unknown key.*did you mean 'num_bits'"),
        ("fp8", "is a mapping, not 'fp8'"),
        ({"kv_cache_scheme": "fp8"}, "kv_cache_scheme: 'fp8' is no mapping"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "no kv_cache_scheme, and no config group of attention"),
        ({"config_groups": [1], "kv_cache_scheme": None}, "no kv_cache_scheme, and no config group of attention"),
        (
            {"config_groups": {"a": {"targets": 3, "input_activations": FP8}, "b": 1}},
            "no kv_cache_scheme, and no config group of attention",
        ),
        (
            {"config_groups": {"a": {"targets": ["LlamaAttention"], "input_activations": FP8 | {"type": "int"}}}},
            r"config_groups\.a\.input_activations\.type: 'int' is not read",
        ),
        (
            {
                "config_groups": {"a": {"targets": ["LlamaAttention"], "input_activations": FP8}},
                "kv_cache_scheme": FP8 | {"strategy": "attn_head"},
            },
            r"kv_cache_scheme and config_groups\.a\.input_activations have scales of different granularity",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_read_is_quoted(block, message):
    with pytest.raises(tq.SchemeError, match=message):
        tq.from_compressed_tensors(block)


def test_the_errors_of_theirs_and_ours_agree_on_what_is_no_args_at_all():
    for block in (FP8 | {"num_bitz": 8}, FP8 | {"strategy": "attn_haed"}):
        with pytest.raises(ValueError):
            QuantizationArgs(**block)
