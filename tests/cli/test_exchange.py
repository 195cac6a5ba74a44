"""`tokquant export` and `tokquant import`, as a user types them."""

import json

import pytest
import safetensors.torch
import torch

import tokquant as tq
from tokquant.exchange.compressed_tensors import fp8_scheme


@pytest.fixture
def calibrated(tokquant, tmp_path):
    """Scales of the sample, by name of their granularity."""

    def calibrate(kind):
        fp8_scheme(kind).dump(tmp_path / f"{kind}.yaml")
        code, _, err = tokquant("calibrate", "-s", tmp_path / f"{kind}.yaml", "-o", tmp_path / kind)
        assert code == 0, err
        return tmp_path / kind

    return calibrate


@pytest.mark.parametrize(("format", "kind"), [("compressed-tensors", "head"), ("modelopt", "tensor")])
def test_scales_go_out_and_come_in_as_they_were(format, kind, tokquant, calibrated, tmp_path):
    path = calibrated(kind)
    code, out, err = tokquant("export", path, "--format", format, "-o", tmp_path / "out.safetensors", "--json")
    report = json.loads(out)
    assert code == 0 and report["layers"] == 6, err
    assert (report["quantization_config"] is not None) is (format == "compressed-tensors")
    code, out, _ = tokquant("import", tmp_path / "out.safetensors", "-o", tmp_path / "back", "--json")
    shape = [2, 1, 1] if kind == "head" else [1, 1, 1]
    assert code == 0 and json.loads(out)["layers"]["layers.0"] == {"k_scale": shape, "v_scale": shape}
    before, after = tq.load_scales(path), tq.load_scales(tmp_path / "back")
    assert before.scheme == after.scheme
    assert all(torch.equal(after[layer].tensors[name], x) for layer in before for name, x in before[layer].tensors.items())


def test_export_prints_what_config_json_says(tokquant, calibrated, tmp_path):
    code, out, _ = tokquant("export", calibrated("head"), "-o", tmp_path / "out.safetensors")
    assert code == 0 and "6 layers of kv-fp8 written to" in out
    assert tq.from_compressed_tensors(json.loads(out[out.index("{") :])) == tq.preset("kv-fp8")


def test_export_writes_the_json_of_sglang(tokquant, calibrated, tmp_path):
    words = ("export", calibrated("tensor"), "--format", "sglang", "--model-type", "llama", "-o", tmp_path / "out.json")
    code, out, err = tokquant(*words)
    assert code == 0 and "config.json" not in out, err
    factors = json.loads((tmp_path / "out.json").read_text())["kv_cache"]["scaling_factor"]["0"]
    assert list(factors) == [str(number) for number in range(6)] and all(factor > 0 for factor in factors.values())


def test_import_says_what_the_scales_imply(tokquant, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(safetensors.torch.save({"a.k_scale": torch.ones(1), "a.v_scale": torch.ones(1)}))
    code, out, _ = tokquant("import", tmp_path, "-o", tmp_path / "scales")
    assert code == 0 and "1 layers of kv-fp8-tensor (q fp16, k fp8_e4m3 tensor static" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "none", "-o", "x"), "none: No such file"),
        (("export", "{head}", "-o", "x", "--format", "modelopt"), r"k.granularity: head cannot be expressed in modelopt"),
        (("export", "{head}", "-o", "x", "--format", "gguf"), "format: 'gguf' is not valid; use compressed-tensors"),
        (("import", "none.safetensors", "-o", "x"), "none.safetensors: No such file"),
        (
            ("import", "{head}", "-o", "x", "-s", "kv-int8"),
            "scheme 'kv-int8' has k.precision int8, and these scales are for fp8",
        ),
    ],
    ids=["no file", "head", "format", "no checkpoint", "scheme"],
)
def test_what_is_wrong_is_one_message(words, message, tokquant, calibrated):
    head = calibrated("head")
    code, out, err = tokquant(*(word.format(head=head) for word in words))
    assert code == 2 and out == "" and err.startswith("error: ") and message in err


@pytest.mark.parametrize("command", ["export", "import"])
def test_both_explain_themselves(command, tokquant):
    code, out, _ = tokquant(command, "--help")
    assert code == 0 and "--json" in out and "--output" in out
