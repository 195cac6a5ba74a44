"""Tuning: candidates are read before they are timed, and every one of them computes the same."""

from dataclasses import replace

import pytest
import torch
from factories import qkv, scheme

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.io_model import Workload
from tokquant.kernels import launch, targets
from tokquant.kernels.plan import plan
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import preset, preset_names
from tokquant.tuning import trials as tuning
from tokquant.tuning.planner import Trial, planned


def prepared(name, n=200):
    s = preset(name)
    operands = tq.quantize(*qkv(n, n, 64, 2), s, backend="triton")
    return launch.prepare(*operands, s, features_of(*operands[:2], causal=True), return_lse=True)


def timed(call, trials):
    return tuning.time(call.plan, trials, lambda trial: replace(call, config=trial.config).run, 1, call.out.device)


@pytest.mark.parametrize("name", ["int8", "int8-fast", "kv-int8", "int-flash", "fp8", "int8-fp16", "kv-int4-kivi", "none"])
def test_candidates_compute_the_same_but_for_codes_of_p_beside_a_tie(name):
    call, s = prepared(name), preset(name)
    step = 2**-3 if s.p.precision.startswith("fp8") else 1 / (s.p.format.largest or 512)
    first = None
    for config in call.plan.candidates[::3]:
        call.out.fill_(float("nan"))
        out, lse = (x.clone() for x in replace(call, config=config).run())
        first = first or (out, lse)
        difference, reach = (out - first[0]).abs(), first[0].abs().max()
        assert difference.max() <= step * reach
        # against a running maximum, a tile of another size rounds all of P otherwise
        same_tile = config.block_n == call.plan.config.block_n
        assert difference.mean() <= (1e-4 if same_tile else step / 4) * reach
        assert torch.allclose(lse, first[1], atol=1e-5 if same_tile else 1e-2)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_candidates_keep_the_tile_that_row_block_and_sums_of_v_fix(name, target):
    s = preset(name)
    try:
        made = plan(s, head_dim=128, dtype=torch.float16, target=targets.get(target))
    except tq.UnsupportedError:
        pytest.skip("no fp8 there")
    assert len(set(made.candidates)) == len(made.candidates) >= 3
    tiles = {config.block_n for config in made.candidates}
    if s.p.granularity.kind == "row_block":
        assert tiles == {s.key_tile}
    if s.v.granularity.size and s.v.granularity.kind != "group":
        assert all(s.v.granularity.size % tile == 0 for tile in tiles)


def test_sums_stored_with_v_fix_the_tile_under_unit_too():
    s = scheme("int8", "int8", "int8 head", "uint8")
    assert {config.block_n for config in plan(s, head_dim=64, dtype=torch.float16).candidates} == {128}


def test_what_reads_a_value_for_each_pair_takes_small_tiles():
    masked = plan(preset("int8"), head_dim=128, dtype=torch.float16, wanted=Wanted(mask="additive"))
    assert max(config.block_m for config in masked.candidates) <= 64


def test_only_what_is_left_is_timed():
    call = prepared("int8-fast", 40)
    configs = call.plan.candidates[:3]
    found = timed(call, [Trial(configs[0]), Trial(configs[1], why="predicted 1.8 x the best"), Trial(configs[2])])
    assert [trial.ms is None for trial in found] == [False, True, False]
    assert found[1].why == "predicted 1.8 x the best" and all(trial.ms is None or trial.ms > 0 for trial in found)


def test_tuning_without_a_gpu_says_what_to_do():
    q = torch.randn(1, 1, 32, 64)
    with pytest.raises(tq.UnsupportedError, match=r"tune: needs a GPU, and q is on cpu.*--candidates"):
        tq.tune(q, q, q, "int8")


def test_tuning_checks_its_arguments_first():
    q = torch.randn(1, 1, 32, 64)
    with pytest.raises(ValueError, match="softcap"):
        tq.tune(q, q, q, "int8", softcap=-1.0)


def test_a_candidate_that_the_driver_refuses_is_passed_over(monkeypatch):
    call = prepared("int8-fast", 40)
    run, refused = launch.Call.run, call.plan.candidates[1]

    def sometimes(self):
        if self.config == refused:
            raise RuntimeError
        return run(self)

    monkeypatch.setattr(launch.Call, "run", sometimes)
    found = timed(call, [Trial(config) for config in call.plan.candidates[:2]])
    assert found[0].ms is not None and found[1] == Trial(refused, None, "does not run: RuntimeError")


@pytest.mark.parametrize("wrong", ["a tenth too much", "nothing written"])
def test_a_launch_with_other_numbers_is_not_timed(monkeypatch, wrong):
    call, run = prepared("int8-fast", 40), launch.Call.run
    default, same, refused, *_ = (config for config in call.plan.candidates if config.block_n == call.plan.config.block_n)

    def sometimes(self):
        if self.config != refused:
            return run(self)
        return (self.out if wrong == "nothing written" else run(self)[0].mul_(1.1)), self.lse

    monkeypatch.setattr(launch.Call, "run", sometimes)
    found = timed(call, [Trial(refused), Trial(default), Trial(same)])
    assert found[0].ms is None and found[1].ms is not None and found[2].ms is not None
    assert found[0].why.startswith("other numbers than a launch before it")
    assert wrong == "nothing written" or "10.0% apart" in found[0].why


LAUNCHED = [
    ("int8-fp16", 256, {}),
    ("int8", 256, {}),
    ("int8-fp16", 128, {"bias": "lowrank", "bias_rank": 64}),
    ("kv-int4-kivi", 128, {"bias": "lowrank", "bias_rank": 128}),
    ("int-flash-half", 128, {"bias": "lowrank", "bias_rank": 256}),
    ("kv-int4-kivi", 128, {}),
]


@pytest.mark.compiled
@pytest.mark.parametrize("target", ["sm_86", "sm_120"])
@pytest.mark.parametrize(("name", "head_dim", "given"), LAUNCHED)
def test_what_is_taken_without_tuning_fits_small_gpus(name, head_dim, given, target):
    kernel = tq.compile(name, head_dim=head_dim, target=target, dtype=torch.bfloat16, **given)
    assert kernel.compiled.metadata.shared <= targets.get(target).shared_bytes - 1024


@pytest.mark.compiled
def test_a_candidate_that_does_not_compile_is_passed_over(monkeypatch):
    from tokquant.kernels import compile as compile_module

    kernel = tq.compile("int8-fast", head_dim=64)
    kernel = replace(kernel, plan=replace(kernel.plan, candidates=kernel.plan.candidates[:3]))
    build, broken = compile_module._compile, kernel.plan.candidates[1]

    def sometimes(each):
        if each.config == broken:
            raise RuntimeError("PassManager::run failed\nmore")
        return build(each)

    monkeypatch.setattr(compile_module, "_compile", sometimes)
    *read, refused = planned(kernel, Workload(heads=8, n_q=4096, n_k=4096))
    assert refused == Trial(broken, why="does not compile: PassManager::run failed")
    assert all(trial.why == "" and trial.predicted_ms > 0 for trial in read) and len(read) == 2


@pytest.mark.gpu
@pytest.mark.compiled
def test_tuning_keeps_the_fastest_and_attention_takes_it():
    from tokquant.kernels import tuned

    q, k, v = (torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    result = tq.tune(q, k, v, "int8", causal=True, keep=None, repeats=5)
    assert result.kept and result.entry.ms == min(trial.ms for trial in result.trials if trial.ms)
    assert result.trials[result.rank - 1].config == result.entry.config
    operands = tq.quantize(q, k, v, "int8")
    call = launch.prepare(*operands, preset("int8"), features_of(q, k, causal=True), return_lse=False)
    assert call.config == result.entry.config
    assert tuned.nearest(call.plan, result.entry.key) == result.entry
    fixed = launch.prepare(*operands, preset("int8"), features_of(q, k, causal=True), return_lse=False, deterministic=True)
    assert fixed.config == call.plan.config


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:attention is torch's")
def test_auto_takes_torchs_attention_where_tuning_found_it_faster():
    from tokquant.kernels import tuned

    q, k, v = (torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    entry = tq.tune(q, k, v, "int8", causal=True, keep=1, repeats=5).entry
    assert entry.whole_ms > entry.ms and entry.sdpa_ms > 0
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for times, expected in ((0.5, torchs), (2, tq.attention(q, k, v, "int8", causal=True, backend="triton"))):
        tuned.record(entry.model_copy(update={"sdpa_ms": times * entry.whole_ms}))
        assert torch.equal(tq.attention(q, k, v, "int8", causal=True), expected)
