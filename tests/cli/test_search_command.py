"""`tokquant search`, and scheme maps on the command line."""

import json

import pytest
import safetensors.torch
import torch

from tokquant.activations import sample
from tokquant.schemes import preset, read

SEARCH = ("search", "--budget", "bits=7.5", "-s", "int8", "-s", "kv-int4", "-s", "int8-fp16")


def test_search_writes_a_map_that_other_commands_take(tokquant, tmp_path):
    path, plot = tmp_path / "few-bits.yaml", tmp_path / "front.svg"
    code, out, _ = tokquant(*SEARCH, "--held-out", sample(), "--plot", plot, "-o", path)
    assert code == 0 and "few-bits" in out and "held out" in out
    assert read(path).name == "few-bits" and preset("kv-int4") in read(path).schemes()
    pytest.importorskip("matplotlib")
    assert plot.read_text().startswith("<?xml")
    code, out, _ = tokquant("run", "--scheme", path, "--backend", "reference", "--repeats", 1, "--json")
    report = json.loads(out)
    assert code == 0 and len(report["layers"]) == 6 and report["scheme"] == "few-bits"
    code, out, _ = tokquant("compare", path, "int8", "--backend", "reference", "--repeats", 1, "--json")
    rows = {row["scheme"]: row for row in json.loads(out)["schemes"]}
    assert code == 0 and rows["few-bits"]["rel_l1"] > rows["int8"]["rel_l1"]
    assert rows["few-bits"]["bits"]["k"] < rows["int8"]["bits"]["k"]
    code, out, _ = tokquant("schemes", path)
    assert code == 0 and read(path).to_yaml() == out


def test_search_prints_the_map_and_json(tokquant):
    code, out, _ = tokquant(*SEARCH, "--rows", 64)
    assert code == 0 and "layers.0: " in out
    code, out, _ = tokquant(*SEARCH, "--rows", 64, "--json")
    found = json.loads(out)
    assert code == 0 and found["cost"] <= 7.5 and len(found["map"]["layers"]) == 6 and found["held_out"] == {}


def test_search_says_which_candidates_do_not_fit(tokquant, tmp_path):
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({f"odd.{role}": torch.randn(1, 1, 64, 48) for role in "qkv"}, path)
    words = ("search", "--budget", "bits=32", "-s", "int8", "-s", "kv-int4-kivi", "-i", path)
    code, out, _ = tokquant(*words)
    assert code == 0 and "kv-int4-kivi does not fit odd: v.granularity: a group of 32 channels" in " ".join(out.split())
    assert list(json.loads(tokquant(*words, "--json")[1])["unfit"]) == ["kv-int4-kivi"]


def test_a_point_that_has_a_name_is_shown_by_it_alone(tokquant):
    _, out, _ = tokquant("search", "--budget", "bits=32", "-s", "int8", "--rows", 64)
    assert "int8" in out and "a map" not in out


def test_held_out_activations_are_of_the_same_layers(tokquant, tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({f"other.{r}": torch.ones(1, 1, 8, 32) for r in "qkv"}, path)
    code, _, err = tokquant(*SEARCH, "--held-out", path)
    assert code == 2 and err.startswith("error: held_out: lacks layer 'layers.0'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "bits"), "budget: 'bits' is not valid"),
        (("--budget", "bits=8", "-o", "nowhere/map.yaml"), "--output: there is no folder nowhere"),
        (("--budget", "bits=8", "-o", "map.txt"), "--output: map.txt has to end in .yaml"),
        (("--budget", "bits=8", "-o", "."), "--output: . is a folder"),
        (("--budget", "bits=32", "-s", "int8", "--plot", "front.txt"), "plot: 'front.txt' is not one of .svg"),
    ],
)
def test_what_cannot_be_searched_is_one_message(tokquant, words, message):
    code, _, err = tokquant("search", *words)
    assert code == 2 and message in err


def test_a_layer_of_a_map_is_named_for_one_kernel(tokquant, tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("layers: {a: int8, b: fp8}")
    code, out, _ = tokquant("show", path, "--layer", "b", "--json")
    assert code == 0 and json.loads(out)["scheme"] == "fp8"
    code, _, err = tokquant("show", path)
    assert code == 2 and "is a map of layers; say which one this is" in err
