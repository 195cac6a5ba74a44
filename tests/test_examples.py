"""What lies in examples/ works: a precision in one file gets a kernel, the command line, and the registry's tests."""

import re
from pathlib import Path

import pytest

from tokquant import plugins

ROOT = Path(__file__).parent.parent
PLUGIN, SCHEME = ROOT / "examples" / "powers_of_two.py", ROOT / "examples" / "powers_of_two.yaml"


COMMANDS = {
    "run": ["run", "--scheme", str(SCHEME), "--repeats", "1"],
    "compare": ["compare", "int8-fp16", str(SCHEME), "--repeats", "1"],
    "show": ["show", str(SCHEME)],
    "schemes": ["schemes", str(SCHEME)],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_take_a_precision_from_a_file(command, python):
    result = python("-m", "tokquant", "--plugin", str(PLUGIN), *command)
    assert result.returncode == 0, result.stderr
    assert "pot4" in result.stdout or "powers-of-two" in result.stdout


def test_a_scheme_of_an_unknown_precision_says_so(python):
    result = python("-m", "tokquant", "run", "--scheme", str(SCHEME))
    assert result.returncode == 2 and "no precision 'pot4'" in result.stderr


@pytest.mark.compiled
def test_its_kernel_compiles_to_integer_products(python):
    result = python("-m", "tokquant", "--plugin", str(PLUGIN), "compile", str(SCHEME), "--head-dim", "64")
    assert result.returncode == 0 and "IGMMA" in result.stdout, result.stderr


def test_tests_over_the_registry_cover_it_by_its_being_named(python):
    result = python("-m", "pytest", "-q", "tests/precisions", "-k", "pot4", cwd=ROOT, TOKQUANT_PLUGINS=str(PLUGIN))
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 8


@pytest.mark.parametrize(("text", "message"), [("1 / 0", "failed: ZeroDivisionError"), ("", "is not a Python file")])
def test_a_plugin_that_cannot_be_run_is_named(tmp_path, text, message):
    path = tmp_path / ("mine.py" if text else "mine.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"plugin: {re.escape(str(path))} {message}"):
        plugins.load(path)


def test_the_readme_shows_the_example_as_it_is():
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = PLUGIN.read_text().partition('"""\n\n')[2]
    assert code in shown


SCRIPTS = {
    "quantize_and_attend": ["mine: relative L1", "certified, mean over queries"],
    "calibrate_export_load": ["layers.0.self_attn {'k_scale'", "'strategy': 'attn_head'"],
    "search": ["on tokens not seen", "layers.5: "],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_as_it_says(name, python):
    result = python(ROOT / "examples" / f"{name}.py")
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in SCRIPTS[name])


@pytest.mark.compiled
def test_the_kernel_example_compiles_its_kernel(python):
    result = python(ROOT / "examples" / "inspect_kernel.py")
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ registers, \d+ bytes spilled, [0-9.]+ instructions a score", result.stdout)


def test_the_cache_example_prints_the_figures_of_its_page_and_they_are_in_order(python):
    result = python(ROOT / "examples" / "kv_cache.py")
    assert result.returncode == 0, result.stderr
    printed = {
        name.strip(): (bits, error) for name, bits, error in re.findall(r"^(.{32}) *(\S+) +(0\.\d+)$", result.stdout, re.M)
    }
    page = (ROOT / "docs" / "kv-cache.md").read_text()
    written = {
        name.replace("`", ""): (bits, error)
        for name, bits, error in re.findall(r"^\| (.+) \| (\S+) \| (0\.\d+) \|$", page, re.M)
    }
    assert printed.keys() == written.keys() and len(printed) == 11
    for name, (bits, error) in printed.items():
        assert bits == written[name][0] and float(error) == pytest.approx(float(written[name][1]), abs=0.01), name
    error = {name: float(error) for name, (_, error) in printed.items()}
    # naive 4 bits are worse than rotated ones, and those worse than with a static offset of K too
    assert error["int4, neither"] > 1.5 * error["kv-int4 (Hadamard)"] > 1.5 * 1.2 * error["kv-int4 and static offset of K"]
    assert error["kv-int2-kivi"] > error["kv-int4 (Hadamard)"] > error["kv-int4-kivi"] > error["kv-int8"]
    assert error["fireq without its balance"] > 2 * error["fireq, calibrated"] > 2 * error["fireq, calibrated, top_k 8"]
    assert "a prompt of 600 tokens, answers of [601, 603]" in result.stdout


def test_the_example_of_logits_prints_each_layer_alone_and_all_of_them(python):
    pytest.importorskip("transformers")
    result = python(ROOT / "examples" / "compare_logits.py")
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"^(int\d) +(\S+|all layers) +(\S+) +(\S+)$", result.stdout, re.M)
    kl = {(scheme, layer): float(divergence) for scheme, layer, divergence, _ in printed}
    layers = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert list(kl) == [(scheme, layer) for scheme in ("int8", "int4") for layer in (*layers, "all layers")]
    assert all(0 < 10 * kl["int8", layer] < kl["int4", layer] < 0.1 for layer in layers)
    assert all(float(cosine) > 0.999 for scheme, *_, cosine in printed if scheme == "int8")


def test_the_example_of_generation_prints_caches_that_are_smaller_and_near(python):
    pytest.importorskip("transformers")
    result = python(ROOT / "examples" / "generate_with_cache.py")
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"^(\S+) +(\d+) +(0\.\d+) +(0\.\d+)$", result.stdout, re.M)
    share = {name: float(of) for name, _, of, _ in printed}
    near = {name: float(cosine) for name, _, _, cosine in printed}
    assert set(share) == {"kv-int8", "kv-int4"}
    # of tokens that are no padding, 900 of 1000 at the beginning
    assert share["kv-int4"] < 0.27 and share["kv-int8"] < 0.5
    assert near["kv-int8"] > 0.999 and 0.999 > near["kv-int4"] > 0.9
