"""Scales of checkpoints: taken as they are, nothing else read, and what is wrong named by file and tensor."""

import json

import pytest
import safetensors.torch
import torch

import tokquant as tq
from tokquant.exchange import shards
from tokquant.exchange.compressed_tensors import fp8_scheme

ATTENTION = "model.layers.{}.self_attn"
KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
HEAD = [torch.tensor(values).view(2, 1, 1) for values in ([0.5, 0.25], [0.125, 3.0])]


def weights(layers=3):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    return {f"model.layers.{i}.{name}.weight": torch.zeros(8, 8, dtype=torch.bfloat16) for i in range(layers) for name in names}


def scales(k="{}.k_scale", v="{}.v_scale", values=None, layers=3, **more):
    """Those of every layer; layer i has k 0.5 + i and v 0.25 + i, as bfloat16 holds them, or the values given."""
    tensors = {}
    for i in range(layers):
        layer = ATTENTION.format(i)
        one, other = values or (torch.tensor([0.5 + i]), torch.tensor([0.25 + i]))
        tensors |= {k.format(layer): one.clone(), v.format(layer): other.clone()}
        tensors |= {f"{layer}.{name}": value.clone() for name, value in more.items()}
    return tensors


def write(folder, tensors, config=None, parts=1):
    """A checkpoint as Hugging Face lays it out: one file, or shards and their index."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    if parts == 1:
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        return folder
    names = list(tensors)
    index = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        here = {name: tensors[name] for name in names[part::parts]}
        index |= dict.fromkeys(here, file)
        (folder / file).write_bytes(safetensors.torch.save(here, {"format": "pt"}))
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("parts", [1, 4], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("k", "v"),
    [("{}.k_scale", "{}.v_scale"), ("{}.k_proj.k_scale", "{}.v_proj.v_scale"), ("{}.qkv_proj.k_scale", "{}.qkv_proj.v_scale")],
    ids=["compressed-tensors", "ModelOpt", "fused"],
)
def test_scales_a_tensor_are_read_under_every_name(k, v, parts, tmp_path):
    read = tq.import_checkpoint_scales(write(tmp_path, weights() | scales(k, v), {"kv_cache_scheme": KV}, parts))
    assert read.scheme == fp8_scheme("tensor") and list(read) == [ATTENTION.format(i) for i in range(3)]
    for i in range(3):
        tensors = read[ATTENTION.format(i)].tensors
        assert torch.equal(tensors["k_scale"], torch.full((1, 1, 1), 0.5 + i))
        assert torch.equal(tensors["v_scale"], torch.full((1, 1, 1), 0.25 + i))


def test_k_a_tensor_and_v_a_head_are_no_one_scheme(tmp_path):
    write(tmp_path, scales(values=(torch.ones(1), torch.ones(2, 1, 1))))
    with pytest.raises(tq.ScalesError, match=r"layers\.0\.self_attn\.v_scale: is one per head, and .*k_scale one per tensor"):
        tq.import_checkpoint_scales(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_a_head_keep_their_values_in_any_type(dtype, tmp_path):
    values = [(value * 1.1).to(dtype) for value in HEAD]
    write(tmp_path, weights() | scales(values=values))
    read = tq.import_checkpoint_scales(tmp_path / "model.safetensors")
    assert read.scheme == tq.preset("kv-fp8")
    tensors = read[ATTENTION.format(2)].tensors
    assert all(torch.equal(tensors[f"{role}_scale"], value.float()) for role, value in zip("kv", values, strict=True))
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_what_is_read_runs_as_the_formula_says(tmp_path):
    read = tq.import_checkpoint_scales(write(tmp_path, scales(values=HEAD, layers=1)))
    q, k, v = (torch.randn(1, h, 20, 32) for h in (4, 2, 2))
    out = tq.attention(q, k, v, read.scheme, scales=read[ATTENTION.format(0)], backend="reference")
    k, v = ((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s for x, s in zip((k, v), HEAD, strict=True))
    exact = tq.attention(q, k, v, "none", backend="reference")
    assert (out - exact).abs().max() < 0.01 * exact.abs().max()


def test_the_deprecated_kv_scale_is_one_for_both_and_a_scalar_is_one(tmp_path):
    tensors = {f"{ATTENTION.format(i)}.kv_scale": torch.tensor(0.5) for i in range(2)}
    read = tq.import_checkpoint_scales(write(tmp_path, tensors))
    assert read.scheme == fp8_scheme("tensor")
    assert all(value.shape == (1, 1, 1) and value == 0.5 for part in read.values() for value in part.tensors.values())
    tq.save_scales(tmp_path / "scales", read)
    assert tq.load_scales(tmp_path / "scales").scheme == read.scheme


def test_scales_of_q_are_read_with_their_own_heads_or_left_to_a_scheme_without(tmp_path):
    write(tmp_path, scales(values=HEAD, q_scale=torch.ones(4, 1, 1)))
    read = tq.import_checkpoint_scales(tmp_path)
    assert read.scheme == fp8_scheme("head", q=True) and read[ATTENTION.format(0)].tensors["q_scale"].shape == (4, 1, 1)
    kv_only = tq.import_checkpoint_scales(tmp_path, "kv-fp8")
    assert kv_only.scheme.name == "kv-fp8" and set(kv_only[ATTENTION.format(0)].tensors) == {"k_scale", "v_scale"}


def test_a_scheme_may_say_more_of_q_and_p_than_the_checkpoint(tmp_path):
    changed = tq.preset("kv-fp8").model_copy(update={"q": tq.preset("int8").q, "p": tq.preset("fp8").p})
    read = tq.import_checkpoint_scales(write(tmp_path, scales(values=HEAD)), changed)
    assert read.scheme == changed


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (fp8_scheme("tensor"), r"k\.granularity tensor, and these scales are for head"),
        (fp8_scheme("head", q=True), r"q\.precision fp8_e4m3, and these scales are for fp16"),
        (tq.preset("kv-fp8").model_copy(update={"rotate": "hadamard"}), "rotate hadamard, and these scales are for none"),
        ("kv-int8", r"scheme 'kv-int8' has k\.precision int8, and these scales are for fp8_e4m3"),
    ],
    ids=["granularity", "q", "rotated", "integers"],
)
def test_a_scheme_that_is_not_that_of_the_scales_is_refused(scheme, message, tmp_path):
    with pytest.raises(tq.ScalesError, match=message):
        tq.import_checkpoint_scales(write(tmp_path, scales(values=HEAD)), scheme)


def test_zero_points_of_zero_are_taken(tmp_path):
    zeros = {f"{role}_zero_point": torch.zeros(1).to(torch.float8_e4m3fn) for role in "kv"}
    assert tq.import_checkpoint_scales(write(tmp_path, scales(**zeros))).scheme == fp8_scheme("tensor")


def test_only_scales_are_read_and_only_shards_that_have_some_are_opened(tmp_path, monkeypatch):
    write(tmp_path, weights() | scales(), parts=6)
    names = json.loads((tmp_path / shards.INDEX).read_text())["weight_map"]
    without = {file for file in names.values()} - {file for name, file in names.items() if name.endswith("_scale")}
    for file in without:
        (tmp_path / file).write_bytes(b"not even a safetensors file")
    taken = []
    opened = shards.open_tensors

    def watched(path, error_type):
        return Watched(opened(path, error_type), taken)

    monkeypatch.setattr(shards, "open_tensors", watched)
    tq.import_checkpoint_scales(tmp_path)
    assert sorted(taken) == sorted(name for name in names if name.endswith("_scale"))


class Watched:
    """A safetensors file that notes what is read of it."""

    def __init__(self, manager, taken):
        self.manager, self.taken = manager, taken

    def __enter__(self):
        self.file = self.manager.__enter__()
        return self

    def __exit__(self, *error):
        return self.manager.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        self.taken.append(name)
        return self.file.get_tensor(name)


K1, V1 = (f"{ATTENTION.format(1)}.{role}_scale" for role in "kv")
ZERO = f"{ATTENTION.format(1)}.k_zero_point"


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def swapped(tensors):
    tensors[f"{ATTENTION.format(1)}.v_proj.k_scale"] = tensors.pop(K1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(K1, torch.tensor([-1.0])), "k_scale: is -1, which vLLM puts where a scale was never set"),
        (put(V1, torch.zeros(1)), "v_scale: holds a scale that is not above zero"),
        (put(V1, torch.tensor([-0.5])), "v_scale: holds a scale that is not above zero"),
        (put(K1, torch.tensor([float("nan")])), "k_scale: holds a value that is not finite"),
        (put(K1, torch.tensor([float("inf")])), "k_scale: holds a value that is not finite"),
        (put(K1, torch.ones(2)), r"k_scale: shape \[2\] is not \[1\] \(per tensor\) or \[H, 1, 1\]"),
        (put(K1, torch.ones(1, 2, 1)), r"k_scale: shape \[1, 2, 1\] is not"),
        (put(K1, torch.ones(0, 1, 1)), r"k_scale: shape \[0, 1, 1\] is not"),
        (put(K1, torch.ones(2**17, 1, 1, dtype=torch.float16)), r"k_scale: shape \[131072, 1, 1\] is not"),
        (put(K1, torch.ones(2, 1, 1)), r"layers\.1.*k_scale: is one per head, and model\.layers\.0.*k_scale one per tensor"),
        (put(K1, torch.ones(1, dtype=torch.int8)), "k_scale: I8 is no type for a scale; use F32, F16, BF16"),
        (put(K1, torch.ones(1, dtype=torch.float64)), "k_scale: F64 is no type for a scale"),
        (drop(V1), r"layers\.1\.self_attn\.k_scale: the layer has no v_scale beside it"),
        (drop(K1), r"layers\.1\.self_attn\.v_scale: the layer has no k_scale beside it"),
        (drop(K1, V1), r"layers\.1\.self_attn\.k_scale: missing, and others like that layer have theirs"),
        (put(f"{ATTENTION.format(0)}.q_scale", torch.ones(1)), r"layers\.1\.self_attn\.\w_scale: the layer has no q_scale"),
        (put(ZERO, torch.arange(2.0).view(2, 1, 1)), "k_zero_point: a zero point other than 0 cannot be used"),
        (put(f"{ATTENTION.format(1)}.k_proj.k_scale", torch.ones(1)), r"k_scale: the layer has model\.layers\.1.*k_scale too"),
        (put(f"{ATTENTION.format(1)}.kv_scale", torch.ones(1)), r"\w+_scale: the layer has model\.layers\.1.*_scale too"),
        (put(f"{ATTENTION.format(1)}.prob_scale", torch.ones(1)), "prob_scale: a static scale of P, which no scheme has"),
        (swapped, r"v_proj\.k_scale: a scale of K under v_proj; the names are swapped"),
    ],
    ids=["sentinel", "zero", "negative", "nan", "infinite", "vector", "shape", "no heads", "too many heads", "mixed",
         "integers", "double", "no v", "no k", "no layer", "q of one layer", "zero point", "two names", "kv too", "p",
         "swapped"],
)  # fmt: skip
@pytest.mark.parametrize("parts", [1, 5], ids=["one file", "shards"])
def test_what_is_wrong_with_a_scale_names_file_and_tensor(change, message, parts, tmp_path):
    tensors = weights() | scales()
    change(tensors)
    with pytest.raises(tq.ScalesError, match=rf"{tmp_path}.*model.*safetensors: .*{message}"):
        tq.import_checkpoint_scales(write(tmp_path, tensors, parts=parts))


def without_shard(folder):
    next(folder.glob("model-00002*")).unlink()


def truncated_shard(folder):
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-3])


def index(change):
    def write_index(folder):
        data = json.loads((folder / shards.INDEX).read_text())
        change(data)
        (folder / shards.INDEX).write_text(json.dumps(data))

    return write_index


def elsewhere(data):
    data["weight_map"][K1] = "../model-00001-of-00002.safetensors"


def in_the_other(data):
    there = data["weight_map"][K1]
    data["weight_map"][K1] = next(file for file in data["weight_map"].values() if file != there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_shard, r"model-00002-of-00002\.safetensors: No such file"),
        (truncated_shard, r"model-00002-of-00002\.safetensors: not a safetensors file, or not a whole one"),
        (index(elsewhere), r"index\.json: 'model\.layers\.1.*' is in '\.\./model.*', which is no file of this folder"),
        (index(in_the_other), r"model-0000.*k_scale: is not there, though the index says so"),
        (index(lambda data: data["weight_map"].update({K1: "a\0b"})), "a.*b: .*"),
        (index(lambda data: data["weight_map"].update({K1: ".."})), r"\.\.: Is a directory"),
        (index(lambda data: data["weight_map"].update({K1: 3})), r"index\.json: has no weight_map"),
        (index(lambda data: data.pop("weight_map")), r"index\.json: has no weight_map"),
        (lambda folder: (folder / shards.INDEX).write_text("{"), r"index\.json: not JSON"),
        (lambda folder: (folder / shards.INDEX).write_text("[" * 100000), r"index\.json: not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), r"config\.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: holds \[\], not a mapping"),
    ],
    ids=[
        "no shard",
        "truncated",
        "path",
        "wrong shard",
        "null",
        "parent",
        "number",
        "no map",
        "json",
        "deep json",
        "config bytes",
        "config list",
    ],
)
def test_what_is_wrong_with_the_files_is_named(change, message, tmp_path):
    change(write(tmp_path, weights() | scales(), parts=2))
    with pytest.raises(tq.ScalesError, match=message):
        tq.import_checkpoint_scales(tmp_path)


def test_what_holds_no_scales_says_how_they_are_named(tmp_path):
    with pytest.raises(tq.ScalesError, match="holds no safetensors files"):
        tq.import_checkpoint_scales(tmp_path)
    with pytest.raises(tq.ScalesError, match=r"none\.safetensors: No such file"):
        tq.import_checkpoint_scales(tmp_path / "none.safetensors")
    with pytest.raises(tq.ScalesError, match=r"holds no scales of attention; they are named <layer>\.k_scale"):
        tq.import_checkpoint_scales(write(tmp_path, weights()))


def test_layers_of_other_kinds_need_no_scales(tmp_path):
    """A vision tower keeps no cache, and of a hybrid model only some layers are attention."""
    tensors = scales() | weights() | {"vision_tower.layers.0.self_attn.k_proj.weight": torch.zeros(4, 4)}
    tensors |= {"model.layers.3.linear_attn.in_proj.weight": torch.zeros(4, 4)}
    assert len(tq.import_checkpoint_scales(write(tmp_path, tensors))) == 3


def test_two_files_with_one_name_and_no_index_are_refused(tmp_path):
    write(tmp_path, scales())
    (tmp_path / "other.safetensors").write_bytes(safetensors.torch.save(scales(layers=1)))
    with pytest.raises(tq.ScalesError, match=r"other\.safetensors: model\.layers\.0.*: is in model\.safetensors too"):
        tq.import_checkpoint_scales(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_cache_scheme": KV | {"type": "int"}}, r"config\.json: kv_cache_scheme\.type: 'int' is not read"),
        (
            {"kv_cache_scheme": KV | {"strategy": "attn_head"}},
            r"config\.json: says that scales are one per head",
        ),
        ({"kv_cache_quant_algo": "NVFP4"}, r"config\.json: kv_cache_quant_algo 'NVFP4' is not read; use FP8"),
    ],
    ids=["int8", "strategy", "nvfp4"],
)
@pytest.mark.parametrize("lone", [False, True], ids=["folder", "its file"])
def test_what_config_json_contradicts_is_refused(config, message, lone, tmp_path):
    write(tmp_path, weights() | scales(), config)
    with pytest.raises(tq.ScalesError, match=message):
        tq.import_checkpoint_scales(tmp_path / "model.safetensors" if lone else tmp_path)


def test_the_config_of_modelopt_is_heeded(tmp_path):
    write(tmp_path, weights() | scales("{}.k_proj.k_scale", "{}.v_proj.v_scale"))
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}))
    assert tq.import_checkpoint_scales(tmp_path).scheme == fp8_scheme("tensor")
    file.write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "NVFP4"}}))
    with pytest.raises(tq.ScalesError, match=r"hf_quant_config\.json: kv_cache_quant_algo 'NVFP4' is not read"):
        tq.import_checkpoint_scales(tmp_path)
