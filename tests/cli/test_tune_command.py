"""`tokquant tune` and `tokquant compile`: what attention takes they take too, several schemes at once."""

import json
import re
from importlib import import_module

import pytest
import torch

import tokquant as tq
from tokquant.cli import features
from tokquant.kernels import tuned
from tokquant.kernels.candidates import Config
from tokquant.kernels.wanted import Wanted
from tokquant.kv_cache import KVCache
from tokquant.tuning.planner import Trial
from tokquant.tuning.trials import Tuned

COMMAND = import_module("tokquant.cli.tune")
SMALL = ("--tokens", 96, "--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--dtype", "fp32")


@pytest.fixture
def asked(monkeypatch):
    """What the command has tuned, on a CPU that passes for a GPU; nothing is timed."""
    calls = []

    def found(n_q, n_k):
        key = tuned.Key(kernel="attention_a_0", device="NVIDIA H100", triton="3.9.0", batch_heads=2, n_q=n_q, n_k=n_k)
        first, second = Config(64, 128, 4, 2), Config(128, 128, 8, 2)
        beside = dict(whole_ms=0.9, sdpa_ms=0.6) if n_q > 80 else dict(whole_ms=0.5, sdpa_ms=0.6)
        entry = tuned.Entry(key=key, config=second, ms=0.4, default_ms=0.5, rank=2, timed=2, **beside)
        trials = (
            Trial(first, 0.5, predicted_ms=0.31, limit="processors"),
            Trial(second, 0.4, predicted_ms=0.32, limit="cache"),
            Trial(Config(32, 128, 4, 2), None, "predicted 1.8 x the best", 0.56, "cache"),
        )
        return Tuned(entry, trials, kept=True)

    def tune(q, k, v, scheme, **given):
        tq.attention(q, k, v, scheme, backend="reference", **{x: y for x, y in given.items() if x not in ("keep", "repeats")})
        calls.append((scheme.name, tuple(q.shape), tuple(k.shape), given))
        return found(q.shape[2], k.shape[2])

    def tune_decode(q, cache, **given):
        calls.append((cache.scheme.name, tuple(q.shape), (cache.batch, cache.kv_heads, *cache.lengths), given))
        return found(q.shape[2], cache.lengths[0])

    monkeypatch.setattr(COMMAND, "need_gpu", lambda device: None)
    monkeypatch.setattr(COMMAND, "tune_call", tune)
    monkeypatch.setattr(COMMAND, "tune_decode", tune_decode)
    monkeypatch.setattr(COMMAND, "KVCache", lambda scheme, **given: KVCache(scheme, **given, backend="reference"))
    return calls


def test_schemes_and_lengths_are_tuned_one_after_another(tokquant, asked):
    code, out, err = tokquant(
        "tune", "int8", "kv-fp8", *SMALL, "--tokens", 64, "--causal", "--keep", 3, "--repeats", 2, "--json"
    )
    assert code == 0, err
    assert [(name, q[2]) for name, q, *_ in asked] == [("int8", 96), ("int8", 64), ("kv-fp8", 96), ("kv-fp8", 64)]
    assert all(given["causal"] and (given["keep"], given["repeats"]) == (3, 2) for *_, given in asked)
    report = json.loads(out)[0]
    assert report["scheme"] == "int8" and (report["rank"], report["timed"]) == (2, 2)
    assert report["trials"][2]["why"] == "predicted 1.8 x the best" and report["trials"][2]["predicted_ms"] == 0.56


def test_the_table_shows_the_order_and_the_place_of_the_fastest(tokquant, asked):
    code, out, _ = tokquant("tune", *SMALL)
    assert code == 0 and "taken from now on" in out and "predicted 1.8 x the best" in out and "0.3200" in out
    assert "the fastest of 2 that were timed is number 2 of the planner's order" in out
    said = " ".join(out.split())
    assert "with quantization 0.9000 ms, torch's attention in 16 bits 0.6000 ms: backend='auto' takes torch's here" in said
    said = " ".join(tokquant("tune", *SMALL[2:], "--tokens", 64)[1].split())
    assert "with quantization 0.5000 ms, torch's attention in 16 bits 0.6000 ms: backend='auto' quantizes" in said


FEATURES = {
    "a window": (("--window", 20), lambda given: given["window"] == (20, 20)),
    "a causal window": (("--window", 20, "--causal"), lambda given: given["window"] == (20, 0)),
    "softcap, sinks and LSE": (
        ("--softcap", 30, "--sinks", "--lse"),
        lambda given: given["softcap"] == 30 and given["sinks"].shape == (2,) and given["return_lse"],
    ),
    "a boolean mask": (("--mask", "boolean"), lambda given: given["mask"].dtype == torch.bool),
    "an additive mask": (("--mask", "additive"), lambda given: given["mask"].dtype == torch.float32),
    **{
        f"a bias, {kind}": (("--bias", kind, "--bias-rank", 24), lambda given, kind=kind: given["bias"].kind == kind)
        for kind in ("alibi", "key_vector", "lowrank", "dense")
    },
    "all that run": (("--keep", 0), lambda given: given["keep"] is None),
}


@pytest.mark.parametrize(("words", "holds"), FEATURES.values(), ids=FEATURES)
def test_what_attention_takes_is_tuned_too(tokquant, asked, words, holds):
    code, _, err = tokquant("tune", "int8", *SMALL, *words)
    assert code == 0, err
    [(*_, given)] = asked
    assert holds(given)
    assert given.get("bias") is None or given["bias"].kind != "lowrank" or given["bias"].rank == 24


def test_decoding_is_tuned_on_a_cache_as_full_as_asked_for(tokquant, asked):
    code, _, err = tokquant("tune", "kv-int8", "kv-fp8", "--decode", *SMALL, "--batch", 3, "--window", 40)
    assert code == 0, err
    sizes = ((3, 2, 1, 32), (3, 1, 96, 96, 96))
    assert [call[:3] for call in asked] == [("kv-int8", *sizes), ("kv-fp8", *sizes)]
    assert asked[0][3]["window"] == (40, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune", "--mask", "bool"), "--mask: 'bool' is not valid; use none, boolean, additive"),
        (("tune", "--bias", "alibis"), "--bias: 'alibis' is not valid; .*alibi"),
        (("compile", "--softcap", 0), "--softcap: 0.0 is not above zero"),
        (("tune", "--kv-heads", 5), "--kv-heads: 5 does not divide the 32 heads of Q"),
        (("tune", "--decode", "--bias", "alibi"), "--bias: kernels that read a cache have none"),
        (("tune", "--decode", "--sinks"), "--sinks: they make no other kernel of a cache"),
        (("tune", "--decode", "--lse"), "--lse: kernels that read a cache have it in any case"),
        (("compile", "--varlen", "--mask", "boolean"), "varlen: sequences of their own lengths have no mask"),
        (("compile", "int8", "int9"), "no preset 'int9'"),
        (("tune", "--decode"), "tune: needs a GPU"),
    ],
)
def test_what_does_not_fit_is_one_message(tokquant, words, message):
    code, out, err = tokquant(*words)
    assert (code, out) == (2, "")
    assert re.search(message, err)


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_of_the_options_is_that_of_the_tensors(causal):
    """What `compile` makes of the words and `tune` of their tensors has one text."""
    from tokquant.inputs import features_of
    from tokquant.kernels import generate

    words = dict(window=30, softcap=4.0, mask="boolean", bias="lowrank", bias_rank=24, sinks=True, lse=True)
    wanted = features.Wanted(causal=causal, **words)
    kernel = tq.compile("int8", head_dim=32, **wanted.flags())
    q = torch.randn(1, 2, 70, 32, dtype=torch.float16)
    given = wanted.tensors(q, q)
    del given["return_lse"]
    asked = Wanted.of(features_of(q, q, **given), True)
    assert asked == kernel.wanted and generate.render(kernel.plan) == kernel.source


@pytest.mark.compiled
def test_several_kernels_are_compiled_with_their_features(tokquant):
    words = ("--head-dim", 64, "--causal", "--window", 500, "--softcap", 30, "--sinks", "--lse", "--json")
    code, out, err = tokquant("compile", "int8-fast", "fp8", *words)
    assert code == 0, err
    found = json.loads(out)
    assert [each["scheme"] for each in found] == ["int8-fast", "fp8"]
    assert all(each["resources"]["registers"] <= 255 and each["bytes_per_score"] > 0 for each in found)
    code, out, err = tokquant("compile", "int8-fast", "--head-dim", 64, "--varlen", "--json")
    assert code == 0 and "bytes_per_score" not in json.loads(out), err


@pytest.mark.compiled
def test_launches_of_decoding_are_compared_split_by_split(tokquant):
    words = ("compile", "kv-int4", "--head-dim", 64, "--decode", "--shared-heads", 4, "--candidates", "--tokens", 32768)
    code, out, err = tokquant(*words, "--keep", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {each["split"] for each in found} == {1, 2, 4, 8} and sum(each["default"] for each in found) == 1
    assert sum(not each["why_not"] for each in found) == 3
    assert "split 4" in tokquant(*words)[1]


@pytest.mark.compiled
def test_launches_that_cannot_run_are_shown_with_the_reason(tokquant, monkeypatch):
    from dataclasses import replace

    from tokquant.kernels import compile as compile_module
    from tokquant.kernels.compile import Kernel

    build, large = compile_module._compile, Kernel.resources.func
    broken, wide = (tq.compile("int8-fast", head_dim=64).plan.candidates[place] for place in (1, 2))

    def compiled(each):
        if each.config == broken:
            raise RuntimeError("PassManager::run failed")
        return build(each)

    def resources(each):
        return replace(large(each), blocks_per_multiprocessor=0 if each.config == wide else 1)

    monkeypatch.setattr(compile_module, "_compile", compiled)
    monkeypatch.setattr(Kernel, "resources", property(resources))
    words = ("compile", "int8-fast", "--head-dim", 64, "--candidates")
    code, out, err = tokquant(*words)
    assert code == 0, err
    assert f"{broken}: does not compile: PassManager::run failed" in out
    assert re.search(rf"{wide}: takes \d+ bytes of shared memory and \d+ registers: no block fits", " ".join(out.split()))
    found = {each["why_not"].split(":")[0]: each for each in json.loads(tokquant(*words, "--json")[1])}
    assert found["does not compile"]["config"]["num_stages"] == broken.num_stages
    assert found["does not compile"]["predicted_ms"] is None and "resources" not in found["does not compile"]
