"""Every command, as a user types it."""

import json
import re

import pytest
import safetensors.torch
import torch

import tokquant as tq
from tokquant.activations import Activations, sample, save
from tokquant.attention import choose_backend
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.instructions import INSTRUCTIONS
from tokquant.schemes import preset_names

AUTO = choose_backend("auto", torch.device("cpu"))
ERRORS = {"cosine", "rel_l1", "rmse", "max_abs"}


@pytest.fixture
def activations(tmp_path):
    path = tmp_path / "activations.safetensors"
    shapes = {"q": (1, 4, 60, 64), "k": (1, 2, 70, 64), "v": (1, 2, 70, 64)}
    tensors = {f"layers.{i}.{role}": torch.randn(shape).bfloat16() for i in (10, 2) for role, shape in shapes.items()}
    path.write_bytes(safetensors.torch.save(tensors))
    return path


def test_run_reports_every_layer_of_the_sample(tokquant):
    code, out, _ = tokquant("run", "--scheme", "int8", "--json", "--repeats", 1)
    report = json.loads(out)
    assert code == 0 and (report["scheme"], report["backend"]) == ("int8", AUTO)
    assert [layer["name"] for layer in report["layers"]] == [f"layers.{i}" for i in range(6)]
    for layer in report["layers"]:
        assert ERRORS | {"ms", "sdpa_ms", "bits"} <= set(layer) and set(layer["bits"]) == {"q", "k", "v"}
        assert 0 < layer["rel_l1"] <= 0.0125 and layer["ms"] > 0


def test_run_takes_a_file_with_gqa_and_causality(tokquant, activations):
    code, out, _ = tokquant("run", "-s", "int8-fp16", "-i", activations, "--causal", "--json", "--repeats", 1)
    report = json.loads(out)
    assert code == 0 and [layer["name"] for layer in report["layers"]] == ["layers.2", "layers.10"]
    operands = Activations(activations)["layers.2"]
    exact = tq.attention(*operands, "none", causal=True).double()
    out = tq.attention(*operands, "int8-fp16", causal=True).double()
    assert report["layers"][0]["max_abs"] == pytest.approx((out - exact).abs().max().item(), rel=0.3)


def test_run_prints_a_table(tokquant):
    code, out, err = tokquant("run", "--repeats", 1)
    assert code == 0 and f"int8 on sample.safetensors, head_dim 32, backend {AUTO}" in out and "layers.5" in out and err == ""


def test_layers_of_several_head_dims_are_all_named(tokquant, tmp_path):
    tensors = {f"{layer}.{role}": torch.randn(1, 1, 32, d) for layer, d in (("a", 96), ("b", 64)) for role in "qkv"}
    safetensors.torch.save_file(tensors, tmp_path / "mixed.safetensors")
    words = ("-i", tmp_path / "mixed.safetensors", "--repeats", 1, "--backend", "reference")
    assert "int8 on mixed.safetensors, head_dim 64 and 96, backend reference" in tokquant("run", *words)[1]
    assert "mixed.safetensors: 2 layers of head_dim 64 and 96" in tokquant("compare", "int8", *words)[1]


def test_run_takes_a_scheme_from_yaml(tokquant, tmp_path):
    tq.preset("int8-fast").model_copy(update={"name": "mine"}).dump(tmp_path / "mine.yaml")
    code, out, _ = tokquant("run", "--scheme", tmp_path / "mine.yaml", "--json", "--repeats", 1)
    assert code == 0 and json.loads(out)["scheme"] == "mine"


def test_run_in_the_interpreter_agrees_with_the_emulation(tokquant, activations):
    reports = {}
    for backend in ("triton", "reference"):
        words = ("run", "-s", "int-flash", "-i", activations, "--backend", backend, "--json", "--repeats", 1)
        code, out, err = tokquant(*words)
        assert code == 0, err
        reports[backend] = json.loads(out)
    assert reports["triton"]["backend"] == "triton"
    for one, other in zip(reports["triton"]["layers"], reports["reference"]["layers"], strict=True):
        assert one["rel_l1"] == pytest.approx(other["rel_l1"], rel=1e-2)


def test_calibrate_then_run_needs_only_the_file(tokquant, tmp_path):
    path = tmp_path / "scales.safetensors"
    code, out, _ = tokquant("calibrate", "--scheme", "kv-fp8", "--output", path, "--json")
    assert code == 0 and json.loads(out)["layers"]["layers.0"] == {"k_scale": [2, 1, 1], "v_scale": [2, 1, 1]}
    code, out, _ = tokquant("run", "--scales", path, "--json", "--repeats", 1)
    assert code == 0 and json.loads(out)["scheme"] == "kv-fp8"
    code, _, err = tokquant("run", "--scales", path, "--scheme", "int8")
    assert code == 2 and "calibrated for (kv-fp8)" in err
    code, out, _ = tokquant("compare", "--scales", path, "--json", "--repeats", 1)
    assert len(json.loads(out)["schemes"]) == len(preset_names())
    code, out, _ = tokquant("compare", "int8", "--scales", path, "--json", "--repeats", 1)
    assert code == 0 and [row["scheme"] for row in json.loads(out)["schemes"]] == ["int8", "kv-fp8"]


def test_calibrate_prints_a_table(tokquant, tmp_path):
    code, out, _ = tokquant("calibrate", "-s", "kv-fp8", "-o", tmp_path / "s", "--observer", "percentile:99.9")
    assert code == 0 and "layers.5" in out and "v_scale" in out


def test_calibrate_goes_on_from_its_state_and_counts_no_file_twice(tokquant, tmp_path):
    files = [write(tmp_path / f"{n}.safetensors", **{f"a__{r}": torch.randn(1, 2, 8, 32) * n for r in "qkv"}) for n in (1, 3)]
    state, both, one = (tmp_path / name for name in ("state", "both", "one"))
    words = ["calibrate", "-s", "kv-fp8", "--observer", "mse", "--json"]
    inputs = [word for file in files for word in ("-i", file)]
    code, out, _ = tokquant(*words, *inputs, "-o", both)
    assert code == 0 and json.loads(out)["observer"] == "mse"
    # as if killed after the first file
    assert tokquant(*words, "-i", files[0], "-o", one, "--state", state)[0] == 0
    (tmp_path / "again.safetensors").write_bytes(files[0].read_bytes())
    code, _, err = tokquant(*words, *inputs, "-i", tmp_path / "again.safetensors", "-o", one, "--state", state)
    assert code == 0, err
    calibrator = tq.Calibrator.load(state)
    assert calibrator.layers["a"].tokens["k"] == 16 and list(calibrator.sources.values()) == ["1.safetensors", "3.safetensors"]
    assert torch.equal(*(tq.load_scales(path)["a"].tensors["k_scale"] for path in (both, one)))
    code, _, err = tokquant("calibrate", "-s", "kv-fp8", "-i", files[0], "-o", one, "--state", state)
    assert code == 2 and "is of scheme 'kv-fp8' and observer mse; give those, or another file" in err
    code, _, err = tokquant(*words, "-i", files[0], "-o", one, "--state", files[0])
    assert code == 2 and "1.safetensors: holds no calibration" in err


def test_calibrate_goes_on_with_a_scheme_map(tokquant, tmp_path):
    (tmp_path / "map.yaml").write_text('layers: {layers.0: kv-fp8, "*": int8}')
    words = ["calibrate", "-s", tmp_path / "map.yaml", "-o", tmp_path / "scales", "--state", tmp_path / "state"]
    for _ in range(2):
        code, _, err = tokquant(*words)
        assert code == 0, err
    assert tq.Calibrator.load(tmp_path / "state").layers["layers.0"].tokens["k"] == 512


def test_calibrate_keeps_the_state_of_whole_files_when_one_is_bad(tokquant, tmp_path):
    good = write(tmp_path / "good.safetensors", **{f"a__{r}": torch.randn(1, 2, 8, 32) for r in "qkv"})
    bad = {f"{layer}__{r}": torch.randn(1, 2, 8, 32) for layer in "ab" for r in "qkv"}
    bad["b__k"][0, 0, 0, 0] = float("nan")
    words = [
        "calibrate",
        "-s",
        "kv-fp8",
        "-i",
        good,
        "-i",
        write(tmp_path / "bad.safetensors", **bad),
        "--state",
        tmp_path / "state",
    ]
    code, _, err = tokquant(*words, "-o", tmp_path / "scales")
    assert code == 2 and "bad.safetensors, b: b.k: holds a value that is not finite" in err
    assert tq.Calibrator.load(tmp_path / "state").layers["a"].tokens["k"] == 8 and not (tmp_path / "scales").exists()


def test_calibrate_leaves_room(tokquant, tmp_path):
    for margin in (1, 2):
        assert tokquant("calibrate", "-s", "kv-fp8", "-o", tmp_path / str(margin), "--margin", margin)[0] == 0
    one, two = (tq.load_scales(tmp_path / name)["layers.0"].tensors["k_scale"] for name in "12")
    assert torch.allclose(two, 2 * one)


def test_compare_puts_schemes_side_by_side(tokquant, tmp_path):
    names = ["int-flash", "int8", "kv-int4", "fp8"]
    code, out, _ = tokquant("compare", *names, "--json", "--repeats", 1, "--html", tmp_path / "report.html")
    rows = {row["scheme"]: row for row in json.loads(out)["schemes"]}
    assert code == 0 and list(rows) == names
    assert rows["int-flash"]["rel_l1"] > 3 * rows["int8"]["rel_l1"]
    assert rows["kv-int4"]["bits"] == {"q": 9.0, "k": 5.0, "v": 5.0}, "head_dim of the sample is 32"
    layers = rows["int8"]["layers"]
    assert [layer["name"] for layer in layers] == [f"layers.{n}" for n in range(6)] and len(layers[0]["heads"]) == 2
    assert sum(layer["rel_l1"] for layer in layers) / 6 == pytest.approx(rows["int8"]["rel_l1"])
    assert set(layers[0]["explanation"]["parts"]) == set(rows["int8"]["parts"]) == set("qkvp")
    text = (tmp_path / "report.html").read_text()
    assert all(word in text for word in (*names, "sample.safetensors", "6 of batch 1, 2 heads, 512 tokens", "every query sees"))


def test_compare_shows_every_dynamic_preset(tokquant, activations):
    code, out, err = tokquant("compare", "-i", activations, "--repeats", 1)
    assert code == 0 and all((name in out) is (name != "kv-fp8") for name in preset_names()), err


def test_compare_warns_of_values_that_are_not_finite(tokquant, tmp_path):
    layers = {f"{name}__{r}": torch.ones(1, 1, 8, 32) for name in "ab" for r in "qkv"}
    layers["b__k"][0, 0, 3, 3] = float("nan")
    path = write(tmp_path / "x.safetensors", **layers)
    code, _, err = tokquant("compare", "int8", "-i", path, "--backend", "reference", "--repeats", 1)
    assert code == 0 and err == "warning: x.safetensors: not all values are finite in b.k; errors there may be no number\n"


def test_compare_explains_where_errors_come_from(tokquant, activations):
    words = ("compare", "int-flash", "-i", activations, "--repeats", 1)
    code, out, err = tokquant(*words, "--explain")
    assert code == 0 and "of q / k / v / p" in out, err
    code, out, _ = tokquant(*words, "--json")
    assert code == 0 and "parts" not in json.loads(out)["schemes"][0]


def test_compare_keeps_schemes_of_one_name_apart(tokquant, tmp_path):
    for folder, bits in (("a", "int8"), ("b", "int2")):
        (tmp_path / folder).mkdir()
        k = tq.preset("int8").k.model_copy(update={"precision": bits})
        tq.preset("int8").model_copy(update={"name": "mine", "k": k}).dump(tmp_path / folder / "mine.yaml")
    code, out, _ = tokquant("compare", tmp_path / "a" / "mine.yaml", tmp_path / "b" / "mine.yaml", "--json", "--repeats", 1)
    one, other = json.loads(out)["schemes"]
    assert code == 0 and one["scheme"] == other["scheme"] == "mine"
    assert one["bits"]["k"] == 9 and other["bits"]["k"] == 3 and one["rel_l1"] < other["rel_l1"] / 10


def write(path, **tensors):
    path.write_bytes(safetensors.torch.save({name.replace("__", "."): x for name, x in tensors.items()}))
    return path


def test_what_is_compared_by_itself_fits_every_layer(tokquant, tmp_path):
    layers = {f"{name}__{r}": torch.randn(1, 1, 8, d) for name, d in (("a", 32), ("b", 48)) for r in "qkv"}
    code, out, err = tokquant(
        "compare", "-i", write(tmp_path / "x.safetensors", **layers), "--backend", "reference", "--repeats", 1, "--json"
    )
    assert code == 0, err
    names = {each["scheme"] for each in json.loads(out)["schemes"]}
    assert "int8" in names and "kv-int4-kivi" not in names  # groups of 32 channels do not divide 48


def test_layers_of_any_name_are_shown_as_they_are(tokquant, tmp_path):
    x = torch.randn(1, 1, 8, 32)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors.torch.save({f"[/b] block.[attn].{role}": x.clone() for role in "qkv"}))
    code, out, err = tokquant("run", "-i", path, "--repeats", 1)
    assert code == 0 and "[/b] block.[attn]" in out, err


def test_what_is_wrong_with_a_layer_names_it_and_the_file(tokquant, tmp_path):
    x = torch.randn(1, 2, 8, 32)
    path = write(tmp_path / "bad.safetensors", a__q=x, a__k=x.clone(), a__v=x.clone(), b__q=x.clone(), b__k=x[:, :, :4].clone(),
                 b__v=x.clone())  # fmt: skip
    for words in (["run"], ["compare", "int8"], ["calibrate", "-s", "kv-fp8", "-o", tmp_path / "s"]):
        code, _, err = tokquant(*words, "-i", path)
        assert code == 2 and err.startswith("error: bad.safetensors, b: v: shape [1, 2, 8, 32] is not that of k"), err


def test_scales_without_a_layer_of_the_file_are_refused_before_any_work(tokquant, activations, tmp_path):
    tokquant("calibrate", "-s", "kv-fp8", "-o", tmp_path / "s")
    code, _, err = tokquant("run", "--scales", tmp_path / "s", "-i", activations)
    assert code == 2 and "has no layer layers.10 of activations.safetensors" in err


def test_what_does_not_fit_a_head_dim_is_left_out_or_says_so(tokquant, tmp_path):
    x = torch.randn(1, 1, 8, 80)
    path = write(tmp_path / "a.safetensors", a__q=x, a__k=x.clone(), a__v=x.clone())
    code, out, err = tokquant("compare", "-i", path, "--backend", "reference", "--repeats", 1)
    assert code == 0 and "kv-int8" in out and "kivi" not in out, err
    code, out, _ = tokquant("schemes", "--head-dim", 80)
    assert code == 0 and "does not fit" in out


def test_schemes_lists_presets_with_their_bits(tokquant):
    code, out, _ = tokquant("schemes")
    assert code == 0 and all(name in out for name in preset_names()) and "8.25 / 4.25 / 4.25" in out
    code, out, _ = tokquant("schemes", "--json")
    bits = {row["name"]: row["bits"] for row in json.loads(out)}
    assert bits["kv-int4"] == {"q": 8.25, "k": 4.25, "v": 4.25}


def test_schemes_prints_one_and_its_grammar(tokquant):
    code, out, _ = tokquant("schemes", "int8")
    assert code == 0 and out.startswith("#") and tq.QuantScheme.from_yaml(out) == tq.preset("int8")
    code, out, _ = tokquant("schemes", "int8", "--json")
    assert tq.QuantScheme(**json.loads(out)) == tq.preset("int8")
    code, out, _ = tokquant("schemes", "--json-schema")
    schema = json.loads(out)
    assert code == 0 and "int4" in schema["$defs"]["Keys"]["properties"]["precision"]["enum"]
    assert schema["additionalProperties"] is False


def test_show_prints_the_text_that_is_launched(tokquant, tmp_path):
    code, out, _ = tokquant("show", "int8", "--causal")
    assert code == 0 and out == tq.compile("int8", head_dim=128, causal=True).source
    code, out, _ = tokquant("show", "int8-fp8", "--head-dim", 64, "--json")
    report = json.loads(out)
    assert report["config"]["block_n"] == 128 and "head_dim 64" in report["source"]
    words = ("--window", 64, "--softcap", 30, "--mask", "boolean", "--bias", "lowrank", "--bias-rank", 8, "--sinks", "--lse")
    kernel = tq.compile(
        "int8",
        head_dim=128,
        window=True,
        softcap=True,
        mask="boolean",
        bias="lowrank",
        bias_rank=8,
        sinks=True,
        return_lse=True,
    )
    assert tokquant("show", "int8", *words)[1] == kernel.source
    assert tokquant("show", "int8", "--varlen")[1] == tq.compile("int8", head_dim=128, varlen=True).source
    assert tokquant("show", "--decode")[1] == tq.compile("kv-int8", head_dim=128, decode=True).source
    words = ("--decode", "--shared-heads", 4, "--target", "sm_80")
    assert tokquant("show", "kv-int4", *words)[1] == tq.compile(
        "kv-int4", head_dim=128, decode=True, shared_heads=4, target="sm_80"
    ).source  # fmt: skip


@pytest.mark.compiled
def test_compile_reports_what_a_kernel_takes(tokquant):
    code, out, err = tokquant("compile", "int8-fp16", "--head-dim", 64, "--target", "sm_90", "--causal", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert report["resources"]["registers"] <= 255 and "int8 tensor cores" in report["decisions"]["Q K^T"]
    code, out, _ = tokquant("compile", "int8-fp16", "--head-dim", 64, "--causal")
    assert code == 0 and "instructions a score" in out and "HGMMA" in out


@pytest.mark.compiled
def test_candidates_are_compared_best_first(tokquant):
    code, out, _ = tokquant("compile", "int8-fast", "--head-dim", "64", "--candidates", "--json")
    found = json.loads(out)
    assert code == 0 and len(found) >= 4
    times = [each["predicted_ms"] for each in found]
    assert times == sorted(times) and all(0 < each["prediction"]["share"] < 1 for each in found)
    moved = {each["config"]["block_m"]: each["bytes_per_score"] for each in found}
    assert moved[64] == pytest.approx(2 * moved[128], rel=0.05), "each block of queries reads all keys and values"
    code, out, _ = tokquant("compile", "int8-fast", "--head-dim", "64", "--candidates")
    assert code == 0 and "taken without tuning" in out


def test_the_cache_lists_moves_and_clears_entries(tokquant, tmp_path):
    from tokquant.kernels import tuned

    key = tuned.Key(kernel="attention_a_0123", device="NVIDIA H200", triton="3.9.0", batch_heads=32, n_q=1024, n_k=1024)
    tuned.record(tuned.Entry(key=key, config=tuned.Config(128, 128, 8, 2), ms=0.5, default_ms=None, rank=2, timed=6))
    code, out, _ = tokquant("cache", "list", "--json")
    assert code == 0 and json.loads(out)[0]["key"]["device"] == "NVIDIA H200"
    listed = tokquant("cache", "list")[1]
    assert "128 x 128" in listed and "2 of 6" in listed and "1 entry in " in listed and "taken" not in listed
    tuned.record(tuned.Entry(key=key, config=tuned.Config(128, 128, 8, 2), ms=0.5, default_ms=None, whole_ms=0.8, sdpa_ms=0.7))
    assert "0.7000, taken" in " ".join(tokquant("cache", "list")[1].split())
    file = str(tmp_path / "entries.json")
    assert json.loads(tokquant("cache", "export", file, "--json")[1])["written"] == 1
    assert json.loads(tokquant("cache", "clear", "--json")[1])["removed"] == 1
    assert json.loads(tokquant("cache", "list", "--json")[1]) == []
    assert json.loads(tokquant("cache", "import", file, "--json")[1])["imported"] == 1
    assert len(json.loads(tokquant("cache", "list", "--json")[1])) == 1
    assert [tokquant("cache", "clear")[1][:18] for _ in range(2)] == ["1 entry removed: /", "0 entries removed:"]


def test_doctor_says_what_runs_here(tokquant):
    code, out, _ = tokquant("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["torch"] == torch.__version__ and "interpreter" in report["triton_kernels"]
    assert report["cpu_instructions"] in INSTRUCTIONS or "C++ compiler" in report["cpu_compiler"]
    code, out, _ = tokquant("doctor")
    assert code == 0 and "cache folder" in out


def test_doctor_says_at_how_many_shapes_auto_takes_16_bits(tokquant, monkeypatch):
    from tokquant.kernels import tuned

    assert "nothing was tuned" in tokquant("doctor")[1]
    for device, n, sdpa_ms in (("NVIDIA H200", 512, 0.7), ("NVIDIA H200", 4096, 0.9), ("NVIDIA A100", 512, 0.7)):
        key = tuned.Key(kernel="attention_a_0123", device=device, triton="3.9.0", batch_heads=32, n_q=n, n_k=n)
        entry = dict(config=tuned.Config(128, 128, 8, 2), ms=0.5, default_ms=None, whole_ms=0.8, sdpa_ms=sdpa_ms)
        tuned.record(tuned.Entry(key=key, **entry))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert json.loads(tokquant("doctor", "--json")[1])["auto_in_16_bits"].startswith("torch's attention at 1 of 2 tuned shapes")


def test_doctor_says_of_compiler_and_instruction_set_each_what_is_wrong_with_it(tokquant, monkeypatch):
    monkeypatch.setenv("TOKQUANT_CPU_INSTRUCTIONS", "avx")
    found = json.loads(tokquant("doctor", "--json")[1])
    assert "'avx' is not valid; use one of" in found["cpu_instructions"] or "C++ compiler" in found["cpu_compiler"]
    assert "'avx' is not valid" not in found["cpu_compiler"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = json.loads(tokquant("doctor", "--json")[1])
    assert "CXX='no-such-compiler' cannot be run" in found["cpu_compiler"]
    assert found["cpu_instructions"] == "none without a compiler"


def test_doctor_says_whether_libraries_are_kept(tokquant, monkeypatch, tmp_path):
    folder = tmp_path / "cpu"
    monkeypatch.setattr(build, "libraries", lambda: folder)
    assert json.loads(tokquant("doctor", "--json")[1])["cpu_libraries"] == "kept"
    folder.chmod(0o755)
    found = json.loads(tokquant("doctor", "--json")[1])["cpu_libraries"]
    assert found == f"built anew in every process; {folder} must be yours, of mode 0700, or set TOKQUANT_CACHE_DIR"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "-s", "int9"), "no preset 'int9'.*did you mean 'int8'"),
        (("run", "-s", ""), "no preset ''; use one of"),
        (("run", "-s", "none.yaml"), "none.yaml: No such file"),
        (("run", "-s", "kv-fp8"), "scheme 'kv-fp8' is static and needs k_scale, v_scale.*tokquant calibrate"),
        (("run", "-i", "none.safetensors"), "^error: none.safetensors: No such file or directory$"),
        (("run", "--backend", "tritn"), "backend: 'tritn' is not valid.*did you mean 'triton'"),
        (("run", "-i", __file__), "not a safetensors file"),
        (("show", "int4", "--head-dim", "512"), "head_dim 512 is more than a kernel holds"),
        (("compile", "int8"), "interpreter is on; unset TRITON_INTERPRET"),
        (("compile", "fp8", "--target", "sm_80"), "sm_80 has no fp8"),
        (("show", "--dtype", "fp61"), "--dtype: 'fp61' is not valid; use fp16, bf16, fp32"),
        (("schemes", "kv-int5"), "did you mean 'kv-int"),
        (("tune", "int8"), "tune: needs a GPU, and q is on cpu; `tokquant compile SCHEME --candidates`"),
        (("tune", "int9"), "no preset 'int9'"),
        (("compile", "int8", "--target", "sm90"), r"target: 'sm90' is not valid; use one of .*sm_90 \(H100 SXM\)"),
        (("cache", "import", "none.json"), "^error: none.json: No such file or directory$"),
        (("cache", "import", __file__), "not a list of tuning entries"),
        (("--plugin", "none.py", "doctor"), "plugin: there is no file none.py"),
        (("tune", "int8", "--tokens", "1000000000000"), "tune: needs a GPU"),
        (("compile", "int8", "--candidates"), "interpreter is on; unset TRITON_INTERPRET"),
        (("calibrate", "-s", "int8", "-o", "x"), "no static part to calibrate"),
        (("calibrate", "-s", "kv-fp8", "-o", "nowhere/x"), "--output: there is no folder nowhere"),
        (("calibrate", "-s", "kv-fp8", "-o", "x", "--state", "nowhere/x"), "--state: there is no folder nowhere"),
        (("calibrate", "-s", "kv-fp8", "-o", "."), "--output: . is a folder; name a file in it"),
        (("export", "x", "-o", "nowhere/x"), "--output: there is no folder nowhere"),
        (("import", "x", "-o", "nowhere/x"), "--output: there is no folder nowhere"),
        (("import", "nofile", "-o", "x"), "^error: nofile: No such file or directory$"),
        (("compare", "int8", "--html", "."), "--html: . is a folder"),
        (("calibrate", "-s", "kv-fp8", "-o", "x", "--observer", "amx"), "observer: 'amx' is not valid.*did you mean 'amax'"),
        (("calibrate", "-s", "kv-fp8", "-o", "x", "--margin", "0"), "margin: 0.0 is not a number above zero"),
        (("compare", "int8", "fp9"), "no preset 'fp9'"),
        (("run", "--device", "nowhere"), "--device: 'nowhere' cannot be used"),
        (("run", "--device", "meta"), "--device: 'meta' cannot be used"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_what_the_user_got_wrong_is_one_message(words, message, tokquant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = tokquant(*words)
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "-s", "kv-fp8", "-i", "{file}", "-o", "{file}"),
        ("calibrate", "-s", "kv-fp8", "--state", "new", "-o", "./new"),
        ("compare", "int8", "-i", "{file}", "--html", "{file}"),
        ("export", "{file}", "-o", "{file}"),
        ("import", "{file}", "-o", "{file}"),
    ],
    ids=" ".join,
)
def test_a_command_does_not_write_over_its_own_files(words, tokquant, activations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = activations.read_bytes()
    code, _, err = tokquant(*(word.format(file=activations.name) for word in words))
    assert code == 2 and "is another file of this command, which would be lost; name a new one" in err
    assert activations.read_bytes() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    ["run", "compare", "schemes", "show", "compile", "tune", "bench", "calibrate", "doctor", "search", "export", "import"],
)
def test_every_command_explains_itself_and_takes_json(command, tokquant):
    code, out, _ = tokquant(command, "--help")
    assert code == 0 and "--json" in out and len(out.splitlines()) > 8


def test_operands_that_share_memory_are_saved(tmp_path):
    qkv = torch.randn(3, 1, 2, 8, 32)
    save(tmp_path / "a.safetensors", {"one": tuple(qkv), "same": (qkv[0],) * 3, "turned": tuple(qkv.transpose(2, 3))})
    found = Activations(tmp_path / "a.safetensors")
    assert torch.equal(torch.stack(found["one"]), qkv) and torch.equal(torch.stack(found["turned"]), qkv.transpose(2, 3))
    assert all(torch.equal(x, qkv[0]) for x in found["same"])


def test_operands_with_memory_of_their_own_are_not_copied(tmp_path, monkeypatch):
    operands = tuple(torch.randn(1, 2, 8, 32) for _ in range(3))
    monkeypatch.setattr(torch.Tensor, "clone", None)
    save(tmp_path / "a.safetensors", {"one": operands})
    monkeypatch.undo()
    assert all(map(torch.equal, Activations(tmp_path / "a.safetensors")["one"], operands))


def test_the_sample_is_small_and_real():
    assert sample().stat().st_size < 1.5e6
    q, _, _ = Activations(sample())["layers.0"]
    assert q.shape == (1, 2, 512, 32) and q.dtype == torch.float16


def test_compare_certifies_where_it_is_asked_to(tokquant, activations):
    code, out, _ = tokquant("compare", "int8", "int-flash", "-i", activations, "--bound", "--repeats", 1)
    assert code == 0 and "certificates" in out and "of rounding" in out
    code, out, _ = tokquant("compare", "int8", "-i", activations, "--bound", "--json", "--repeats", 1)
    [scheme] = json.loads(out)["schemes"]
    bound = scheme["bound"]
    assert 0 < bound["error"] < bound["total"] <= 1.001 * sum(bound[part] for part in ("q", "k", "p", "v", "rounding"))
    assert 0 < bound["tightness"]["median"] <= bound["tightness"]["largest"] <= 1
