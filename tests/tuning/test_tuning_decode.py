"""Tuning from end to end, with a clock that says what a test wants: attention and decode then take what was found."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.kernels import compile as compile_module
from tokquant.kernels import decode_launch, launch, tuned
from tokquant.kernels.candidates import Config
from tokquant.schemes import preset
from tokquant.tuning.trials import tune_attention, tune_pages

KEYS = 700


def filled(name="kv-int4", batch=1, keys=KEYS, d=32):
    q, k, v = qkv(1, keys, d, 2, 1, batch)
    cache = tq.KVCache(name, batch=batch, kv_heads=1, head_dim=d, dtype=torch.float32, backend="triton")
    cache.append(k, v)
    return q, cache


def launched(monkeypatch):
    """The calls of attention to pages from now on."""
    calls, run = [], decode_launch.Call.run

    def noted(self):
        calls.append(self)
        return run(self)

    monkeypatch.setattr(decode_launch.Call, "run", noted)
    return calls


def test_the_fastest_that_was_timed_is_kept_with_its_place_in_the_planners_order(code, gpu, clock):
    clock[:] = [3.0, 2.0, 1.0, 4.0, 5.0, 6.0]
    s = preset("int8-fast")
    operands = tq.quantize(*qkv(150, 150, 64, 2), s, backend="triton")
    features = features_of(*operands[:2], causal=True)
    found = tune_attention(operands, s, features, return_lse=False, keep=None, repeats=1)
    third = found.trials[2]
    assert found.rank == found.entry.rank == 3 and found.entry.config == third.config and third.ms == found.entry.ms == 1.0
    assert found.entry.timed == len(found.trials) and found.kept
    plan = launch.prepare(*operands, s, features, False, deterministic=True).plan
    [default] = [trial for trial in found.trials if trial.untuned(plan)]
    assert found.entry.default_ms == default.ms
    assert launch.prepare(*operands, s, features, False).config == third.config
    assert list(tuned.entries()) == [found.entry]


def test_only_those_that_are_kept_run(code, gpu, clock, monkeypatch):
    ran, run = set(), launch.Call.run

    def noted(self):
        ran.add(self.config)
        return run(self)

    monkeypatch.setattr(launch.Call, "run", noted)
    clock[:] = [1.0, 2.0, 3.0]
    s = preset("int8-fast")
    operands = tq.quantize(*qkv(70, 70, 64, 2), s, backend="triton")
    found = tune_attention(operands, s, features_of(*operands[:2]), return_lse=False, keep=2, repeats=1)
    timed = {trial.config for trial in found.trials if trial.ms is not None}
    assert ran == timed and 2 <= len(timed) <= 3 < len(found.trials)
    assert all(trial.why.startswith("predicted ") for trial in found.trials if trial.ms is None)


def test_decode_takes_the_launch_and_the_split_that_were_found(code, gpu, clock, monkeypatch):
    q, cache = filled()
    clock[:] = [9.0, 9.0, 1.0, 9.0, 9.0, 9.0]
    found = tq.tune_decode(q, cache, repeats=1)
    assert found.rank == 3 and found.kept and found.entry.key.kernel.startswith("decode_")
    assert (found.entry.key.batch_heads, found.entry.key.n_q, found.entry.key.n_k) == (2, 1, 1024)
    calls = launched(monkeypatch)
    out = tq.decode(q, cache)
    assert [(call.config, call.split) for call in calls] == [(found.entry.config, found.entry.split)]
    fixed = tq.decode(q, cache, deterministic=True)
    assert (calls[1].config, calls[1].split) == (calls[1].plan.config, None), "tuning is left out"
    assert torch.allclose(out, fixed, atol=0.02)


def test_an_entry_for_decoding_splits_as_the_program_does_or_is_none(gpu, monkeypatch):
    q, cache = filled(keys=600)
    calls = launched(monkeypatch)
    tq.decode(q, cache)
    plan = calls[0].plan
    key = tuned.key_of(plan, q.device, 4, 1, 600)
    for split, taken in ((1, 1), (8, 8), (3, 4), (None, 4)):
        tuned.record(tuned.Entry(key=key, config=plan.candidates[1], split=split, ms=1.0, default_ms=None))
        tq.decode(q, cache)
        assert calls[-1].split == taken
        assert calls[-1].config == (plan.candidates[1] if split == taken else plan.config)


def of_attention(few):
    s, prepare = preset("int8-fast"), launch.prepare
    operands = launch.packed(tq.quantize(*qkv(40, 40, 64, 1), s, backend="reference"), s)
    few(launch, "prepare", lambda *given, **more: (call := prepare(*given, **more)) and replace(call, plan=two_of(call.plan)))
    return tune_attention(operands, s, features_of(*operands[:2], causal=True), return_lse=False, keep=None, repeats=1)


def of_pages(few):
    q, cache = filled(keys=300)
    call = cache.launch(q, features_of(q, q, causal=True))
    return tune_pages(replace(call, planned=lambda **runs: two_of(call.planned(**runs))), keep=None, repeats=1)


def two_of(plan):
    return replace(plan, candidates=plan.candidates[:2])


@pytest.mark.compiled
@pytest.mark.parametrize("tune", [of_attention, of_pages])
def test_the_machine_code_that_is_read_is_that_of_the_launches_that_run(tune, on_ptx, gpu, clock, monkeypatch):
    read, measure = [], compile_module.measure
    monkeypatch.setattr(compile_module, "measure", lambda compiled, *rest: (read.append(compiled), measure(compiled, *rest))[1])
    clock[:] = [1.0] * 8
    found = tune(monkeypatch.setattr)
    ran = [each for each in on_ptx if each.name.startswith(("attention", "decode"))]
    assert len(read) == 2 and {id(each) for each in read} <= {id(each) for each in ran}
    assert found.entry.timed >= 2


@pytest.mark.parametrize("name", ["kv-int4", "kv-int8", "kv-int4-kivi"])
def test_every_launch_and_split_of_decoding_computes_the_same(name):
    q, cache = filled(name)
    call = cache.launch(q, features_of(q, q, causal=True))
    first = None
    for number, config in enumerate(call.plan.candidates):
        out, lse = replace(call, config=config, split=call.plan.splits[number % 4]).run()
        first = first or (out, lse)
        assert (out - first[0]).abs().max() <= first[0].abs().max() / 64 and torch.allclose(lse, first[1], atol=1e-4)


def test_deterministic_decoding_gives_the_bits_of_the_sequence_in_any_batch_whatever_was_tuned(code, gpu, clock):
    # one run of keys alone, three beside the longer one
    q, cache = filled(batch=2, keys=1100)
    cache.truncate([1100, 300])
    clock[:] = [1.0, 2.0]
    tq.tune_decode(q, cache, keep=1, repeats=1)
    both = tq.decode(q, cache, deterministic=True)
    for b in range(2):
        assert torch.equal(tq.decode(q[b : b + 1], cache.fork([b]), deterministic=True), both[b : b + 1])


def test_a_window_makes_another_kernel(code, gpu, clock):
    q, cache = filled()
    clock[:] = [1.0] * 6
    plain, windowed = tq.tune_decode(q, cache, repeats=1), tq.tune_decode(q, cache, window=(300, 0), repeats=1)
    assert plain.entry.key.kernel != windowed.entry.key.kernel
    assert windowed.trials[0].predicted_ms <= plain.trials[0].predicted_ms
    assert (plain.entry.key.n_k, windowed.entry.key.n_k) == (1024, 512), "what is read decides which split is fast"


def test_what_cannot_be_tuned_is_said(monkeypatch):
    q, cache = filled(keys=20)
    with pytest.raises(tq.UnsupportedError, match="tune: needs a GPU, and q is on cpu"):
        tq.tune_decode(q, cache)
    with pytest.raises(TypeError, match=r"cache: a str; give a tokquant\.KVCache"):
        tq.tune_decode(q, "kv-int4")
    with pytest.raises(ValueError, match="q: shape"):
        tq.tune_decode(q[..., :16], cache)
    monkeypatch.setattr(import_module("tokquant.tune"), "need_gpu", lambda device: None)
    with pytest.raises(ValueError, match="cache: nothing is packed in it yet"):
        tq.tune_decode(q, tq.KVCache("kv-int4", batch=1, kv_heads=2, head_dim=32, dtype=torch.float32, backend="triton"))
    with pytest.raises(tq.UnsupportedError, match="cache: kept by reference, which has nothing to tune"):
        tq.tune_decode(q, tq.KVCache("kv-int4", batch=1, kv_heads=2, head_dim=32, dtype=torch.float32, backend="reference"))


def test_entries_from_before_the_planner_are_still_read():
    key = tuned.Key(kernel="attention_a_0123", device="NVIDIA H200", triton="3.9.0", batch_heads=32, n_q=64, n_k=64)
    entry = tuned.Entry(key=key, config=Config(64, 128, 4, 2), ms=0.5, default_ms=0.6)
    text = entry.model_dump_json(exclude={"split", "rank", "timed"})
    assert tuned.Entry.model_validate_json(text) == entry and entry.rank is entry.timed is entry.split is None
    with pytest.raises(ValueError):
        tuned.Entry.model_validate_json(text.replace('"ms"', '"rank": 0, "ms"'))


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("name", ["kv-int4", "kv-int8", "kv-fp8"])
def test_a_gpu_tunes_decoding_and_takes_what_it_found(name, monkeypatch):
    from tokquant.evaluation.costs import scales_for

    q, k, v = (torch.randn(2, heads, 5000, 128, device="cuda", dtype=torch.float16) for heads in (8, 2, 2))
    s = preset(name)
    cache = tq.KVCache(s, batch=2, kv_heads=2, head_dim=128, device="cuda", scales=scales_for(s, q, k, v))
    cache.append(k, v)
    before = tq.decode(q[:, :, -1:], cache, deterministic=True)
    found = tq.tune_decode(q[:, :, -1:], cache, keep=None, repeats=5)
    assert found.kept and found.entry.ms == min(trial.ms for trial in found.trials if trial.ms)
    assert found.entry.timed == sum(trial.ms is not None for trial in found.trials) >= 8
    calls = launched(monkeypatch)
    out = tq.decode(q[:, :, -1:], cache)
    assert (calls[0].config, calls[0].split) == (found.entry.config, found.entry.split)
    assert torch.equal(tq.decode(q[:, :, -1:], cache, deterministic=True), before)
    assert (out - before).abs().max() <= 0.05 * before.abs().max()
