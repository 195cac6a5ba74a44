"""Tuning: candidates are read before they are timed, and every one of them computes the same."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from factories import qkv, scheme
from tokquant.kernels.tuning import Trial

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.kernels import launch, targets, tuning
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import Wanted, plan
from tokquant.kernels.resources import Resources
from tokquant.schemes import preset, preset_names


def prepared(name, n=200):
    s = preset(name)
    operands = tq.quantize(*qkv(n, n, 64, 2), s, backend="triton")
    return launch.prepare(*operands, s, features_of(*operands[:2], causal=True), return_lse=True)


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


def test_only_what_is_left_is_timed_and_the_first_in_any_case():
    call = prepared("int8-fast", 40)
    configs = call.plan.candidates[:3]
    trials = [Trial(configs[0], None), Trial(configs[1], None, "spills"), Trial(configs[2], None)]
    timed = tuning.time(call, trials, repeats=1)
    assert [trial.ms is None for trial in timed] == [False, True, False]
    assert timed[1].why == "spills" and all(trial.ms is None or trial.ms > 0 for trial in timed)


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
    timed = tuning.time(call, [Trial(config, None) for config in call.plan.candidates[:2]], repeats=1)
    assert timed[0].ms is not None and timed[1] == Trial(refused, None, "does not run: RuntimeError")


class Read:
    """A kernel whose machine code has been read."""

    def __init__(self, number, *, spill_bytes=0, blocks=1, rate=900.0):
        self.config = Config(64, 64, 4, number)
        self.resources = Resources(
            registers=255, spill_bytes=spill_bytes, shared_bytes=9999, blocks_per_multiprocessor=blocks,
            instructions_per_score=20.0, loop={}, tensor_core={},
        )  # fmt: skip
        self.prediction = SimpleNamespace(serial_tops=rate)


def whys(*kernels):
    return [trial.why for trial in tuning.prune(kernels)]


def test_what_does_not_fit_spills_or_is_far_slower_is_not_timed():
    found = whys(Read(1), Read(2, blocks=0, rate=9e9), Read(3, spill_bytes=200), Read(4, rate=500.0), Read(5, rate=600.0))
    assert [bool(why) for why in found] == [False, True, True, True, False]
    assert "no block fits" in found[1] and "spills 200 bytes" in found[2] and "20.0 instructions a score" in found[3]


def test_the_first_is_timed_unless_it_cannot_run_and_where_all_spill_those_that_do_least():
    assert whys(Read(1, spill_bytes=500), Read(2)) == ["", ""]
    assert [bool(why) for why in whys(Read(1, blocks=0), Read(2))] == [True, False]
    assert [bool(why) for why in whys(Read(1, spill_bytes=400), Read(2, spill_bytes=300), Read(3, spill_bytes=301))] == [
        False,
        False,
        True,
    ]


LAUNCHED = [
    ("int8-fp16", 256, {}),
    ("int8", 256, {}),
    ("int8-fp16", 128, {"bias": "lowrank", "bias_rank": 64}),
    ("kv-int4-kivi", 128, {}),
]


@pytest.mark.compiled
@pytest.mark.parametrize("target", ["sm_86", "sm_120"])
@pytest.mark.parametrize(("name", "head_dim", "given"), LAUNCHED)
def test_what_is_taken_without_tuning_fits_small_gpus(name, head_dim, given, target):
    kernel = tq.compile(name, head_dim=head_dim, target=target, dtype=torch.bfloat16, **given)
    assert kernel.compiled.metadata.shared <= targets.get(target).shared_bytes - 1024


@pytest.mark.compiled
def test_pruning_reads_machine_code():
    kernel = tq.compile("int8-fast", head_dim=64, target="sm_90")
    trials = tuning.prune(kernel.candidates())
    assert [trial.config for trial in trials] == list(kernel.plan.candidates) and trials[0].why == ""
    for trial, each in zip(trials, kernel.candidates(), strict=True):
        assert trial.why or (each.resources.fits and each.resources.spill_bytes <= tuning.STACK_BYTES)


@pytest.mark.compiled
def test_a_candidate_that_does_not_compile_is_passed_over(monkeypatch):
    from tokquant.kernels import compile as compile_module

    kernel = tq.compile("int8-fast", head_dim=64)
    build, broken = compile_module._compile, kernel.plan.candidates[1]

    def sometimes(each):
        if each.config == broken:
            raise RuntimeError("PassManager::run failed\nmore")
        return build(each)

    monkeypatch.setattr(compile_module, "_compile", sometimes)
    trials = tuning.prune(kernel.candidates()[:3])
    assert [trial.why for trial in trials] == ["", "does not compile: PassManager::run failed", ""]


@pytest.mark.gpu
@pytest.mark.compiled
def test_tuning_keeps_the_fastest_and_attention_takes_it():
    from tokquant.kernels import tuned

    q, k, v = (torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    result = tq.tune(q, k, v, "int8", causal=True, repeats=5)
    assert result.kept and result.entry.ms == min(trial.ms for trial in result.trials if trial.ms)
    operands = tq.quantize(q, k, v, "int8")
    call = launch.prepare(*operands, preset("int8"), features_of(q, k, causal=True), return_lse=False)
    assert call.config == result.entry.config
    assert tuned.nearest(call.plan, result.entry.key) == result.entry.config
    fixed = launch.prepare(*operands, preset("int8"), features_of(q, k, causal=True), return_lse=False, deterministic=True)
    assert fixed.config == call.plan.config
