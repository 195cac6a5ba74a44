"""The planner: a launch takes as long as what it waits for, and the best of the order are timed."""

from dataclasses import replace

import pytest
import torch

import tokquant as tq
from tokquant.io_model import Workload, traffic
from tokquant.kernels import hopper
from tokquant.kernels.targets import TARGETS
from tokquant.tuning.planner import SPILL, expect, planned
from tokquant.tuning.work import Step, Work, work

GIGAHERTZ = 1.83
SCORE = 2 * 2 * 64 / 8192 + 10 / 128  # clocks: both products of int8, then 10 instructions of 128 a clock


def kernel(name="int8-fast", **options):
    return tq.compile(name, head_dim=64, **options)


def of(**changed):
    """Work of whole waves that only multiprocessors have to do with."""
    plain = dict(programs=132, scores=(10**6,), memory_bytes=0.0, moved=0.0)
    return Work(**{**plain, **changed})


def milliseconds(clocks):
    return clocks / GIGAHERTZ / 1e6


def test_a_launch_takes_as_long_as_the_slowest_of_memory_cache_and_multiprocessors(code):
    for wide, (limit, ms) in {
        of(): ("processors", milliseconds(SCORE * 1e6)),
        of(memory_bytes=3.35e9): ("memory", 1.0),
        of(moved=2 * 5120 * GIGAHERTZ * 1e6): ("cache", 2.0),
        of(memory_bytes=3.35e9, moved=2 * 5120 * GIGAHERTZ * 1e6): ("cache", 2.0),
    }.items():
        found = expect(kernel(), wide)
        assert found.limit == limit and found.ms == pytest.approx(ms)


def test_merging_comes_after_all_of_it(code):
    alone, merged = expect(kernel(), of()), expect(kernel(), of(merged=5120 * GIGAHERTZ * 1e6))
    assert merged.ms == pytest.approx(alone.ms + 1.0)


@pytest.mark.parametrize(("programs", "waves"), [(1, 1), (132, 1), (133, 2), (264, 2), (265, 3)])
def test_a_wave_that_is_not_full_takes_as_long_as_a_full_one(code, programs, waves):
    assert expect(kernel(), of(programs=programs)).processors == pytest.approx(waves * milliseconds(SCORE * 1e6))


def test_blocks_beside_one_another_share_their_multiprocessor(code):
    two = kernel()
    code[two.config] = dict(blocks_per_multiprocessor=2)
    times = [expect(two, of(programs=programs)).processors for programs in (132, 264, 396)]
    assert times == pytest.approx([count * milliseconds(SCORE * 1e6) for count in (1, 2, 3)])


def test_programs_that_start_with_the_longest_end_together_and_others_do_not(code):
    # 264 programs of 10 and 30 scores in all sizes between, for 132 places: 40 for each where the order lets them
    longest_first = tuple(30 - number // 13 for number in range(264 + 9))[:264]
    ends = [expect(kernel(), of(programs=264, scores=scores)).processors for scores in (longest_first, longest_first[::-1])]
    mean = sum(longest_first) / 132
    assert ends[0] <= milliseconds(SCORE * (mean + 2)) < milliseconds(SCORE * (mean + 8)) <= ends[1]


def test_two_warps_leave_half_of_the_schedulers_without_one(code):
    four = kernel()
    two = replace(four, config=replace(four.config, num_warps=2))
    assert expect(two, of()).ms == pytest.approx(2 * expect(replace(four, config=replace(four.config, num_warps=4)), of()).ms)


def test_what_the_loop_spills_takes_the_load_units(code):
    spilling = kernel()
    config = spilling.config
    code[config] = dict(spill_bytes=400, loop={"LDL": 30, "STL": 2, "FFMA": 900})
    more = (SPILL - 1) * 32 * 32 * config.num_warps / (config.block_m * config.block_n) / 128
    assert expect(spilling, of()).ms == pytest.approx(milliseconds((SCORE + more) * 1e6))


@pytest.mark.parametrize(("target", "processors", "rate"), [("sm_90", 200, 5120), ("sm_90", 10, 640), ("sm_89", 500, 142 * 64)])
def test_a_few_multiprocessors_take_no_more_from_the_cache_than_their_ports(target, processors, rate):
    card = TARGETS[target]
    assert card.cache_terabytes(processors) == pytest.approx(rate * card.gigahertz / 1e3)


def test_work_of_a_causal_kernel_is_what_one_counts_by_hand():
    made = kernel(causal=True, shared_heads=2)
    made = replace(made, config=replace(made.config, block_m=128, block_n=128))
    given = Workload(batch=3, heads=4, n_q=300, n_k=300)
    # blocks of 128, 128 and 44 queries see 1, 2 and 3 tiles; those of all heads start with the last
    found = work(made, given)
    assert found.programs == 3 * 4 * 3 and found.scores == (*[128 * 128 * 3] * 12, *[128 * 128 * 2] * 12, *[128 * 128] * 12)
    assert found.moved == traffic(made, given).total > found.memory_bytes == 3 * 64 * 300 * (4 * (1 + 2) + 2 * 2)


def test_sequences_of_their_own_lengths_count_as_a_batch_of_the_longest():
    given = Workload(batch=3, heads=4, n_q=300, n_k=300)
    assert work(kernel(varlen=True), given) == work(kernel(), given)


def test_work_of_decoding_is_what_one_counts_by_hand():
    made = tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    step = Step(batch=2, heads=8, keys=8192)
    bits = tq.preset("kv-int4").bits_per_value(64)
    codes = 2 * 2 * 8192 * 64 * (bits["k"] + bits["v"]) / 8
    part = 4 * 2 * 8 * 65
    found = work(made, step, 1)
    # 132 programs wanted, 4 there are: 32 runs, no shorter than 256 keys
    assert (found.programs, found.scores) == (4 * 32, (16 * 128 * 2,) * 32)
    assert (found.memory_bytes, found.moved, found.merged) == (codes, codes + 32 * part, 33 * part)


def test_work_of_decoding_in_a_window_is_of_the_keys_that_are_read():
    made = tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    step = Step(batch=2, heads=8, keys=8192)
    whole = work(made, step, 1)
    # 1024 keys are 8 tiles here, and 9 in sequences of other lengths: 4 runs of 256, and one that has nothing here
    within = work(made, replace(step, left=1023), 1)
    assert within.programs == 4 * 5 and within.scores == (*[16 * 128 * 2] * 4, 0)
    assert within.memory_bytes == whole.memory_bytes / 8 and within.merged == 6 / 33 * whole.merged
    # 1000 keys of 8192 begin within a tile
    assert work(made, replace(step, left=999), 1).scores == (*[16 * 128 * 3] * 2, 16 * 128 * 2)


def test_keys_that_fill_a_gpu_anyway_are_not_split():
    made = tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    step = Step(batch=1024, heads=8, keys=8192)
    found = {split: work(made, step, split) for split in made.plan.splits}
    assert len(set(found.values())) == 1 and found[4].merged == 0 and found[4].programs == 2048


# ---------------------------------------------------------------------------- the order

LONG = Workload(heads=8, n_q=4096, n_k=4096)


@pytest.mark.parametrize("keep", [1, 2])
def test_launches_come_by_predicted_time_and_the_best_are_kept_with_the_one_taken_without_tuning(code, keep):
    made = kernel(target="sm_89")
    for number, config in enumerate(made.plan.candidates):
        code[config] = dict(instructions_per_score=100.0 if config == made.config else 10.0 + 10 * number)
    trials = planned(made, LONG, keep=keep)
    times = [trial.predicted_ms for trial in trials]
    assert times == sorted(times) and {trial.config for trial in trials} == set(made.plan.candidates)
    left = [trial for trial in trials if not trial.why]
    assert left[:keep] == trials[:keep] and [trial.config for trial in left[keep:]] == [made.config]
    next_best = trials[keep]
    assert next_best.why == f"predicted {next_best.predicted_ms / trials[0].predicted_ms:.1f} x the best"
    assert all(trial.limit == "processors" for trial in trials)


@pytest.mark.skipif(not hopper.available(), reason="this Triton has no Gluon")
def test_the_best_of_each_loop_are_kept(code):
    made = kernel(target="sm_90")
    trials = planned(made, LONG, keep=2)
    first = {loop: [t.config for t in trials if t.config.loop == loop][:2] for loop in ("portable", "hopper")}
    assert trials[0].config.loop == trials[1].config.loop, "two of one loop are the best"
    left = {trial.config for trial in trials if not trial.why}
    assert left == {*first["portable"], *first["hopper"], made.config}


def test_without_a_limit_all_that_run_are_timed_and_what_cannot_run_comes_last(code):
    made = kernel()
    broken, large = made.plan.candidates[1:3]
    code[broken], code[large] = RuntimeError("PassManager::run failed\nmore"), dict(blocks_per_multiprocessor=0)
    trials = planned(made, LONG, keep=None)
    assert [trial.config for trial in trials[-2:]] == [broken, large]
    assert trials[-2].why == "does not compile: PassManager::run failed"
    assert trials[-1].why == "takes 9999 bytes of shared memory and 128 registers: no block fits"
    assert not any(trial.why for trial in trials[:-2]) and trials[-1].predicted_ms is None


STEP = Step(batch=16, heads=8, keys=8192)


@pytest.mark.parametrize("given", [LONG, STEP], ids=["attention", "decoding"])
def test_a_default_that_cannot_run_is_not_timed_and_is_still_the_default(code, given):
    made = kernel() if given is LONG else tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    code[made.config] = dict(blocks_per_multiprocessor=0)
    trials = planned(made, given)
    assert "no block fits" in trials[-1].why and trials[-1].untuned(made.plan)
    assert not any(trial.untuned(made.plan) for trial in trials[:-1])


def test_many_keys_and_short_instructions_wait_for_the_cache_and_then_taller_blocks_win(code):
    made = tq.compile("int8-fp16", head_dim=128)
    for config in made.plan.candidates:
        code[config] = dict(instructions_per_score=0.5)
    slow = replace(made, target=replace(made.target, cache_bytes=512))
    trials = planned(slow, LONG)
    heights = [trial.config.block_m for trial in trials]
    assert trials[0].limit == "cache" and heights == sorted(heights, reverse=True)


def test_splits_that_come_to_the_same_runs_are_one_launch(code):
    made = tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    few, full = (planned(made, Step(batch=batch, heads=8, keys=8192), keep=None) for batch in (16, 1024))
    assert {trial.split for trial in full} == {4} and len(full) == len(made.plan.candidates)
    assert {trial.split for trial in few} >= {1, 2, 4} and len(set(few)) == len(few)
    assert sum(trial.untuned(made.plan) for trial in few) == sum(trial.untuned(made.plan) for trial in full) == 1


@pytest.mark.parametrize("keep", [0, -1, 2.0, True, "5"])
def test_a_number_to_keep_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep: .* is not a whole number from 1; give None"):
        planned(kernel(), LONG, keep)


@pytest.mark.parametrize("wrong", [dict(heads=0), dict(heads=4, keys=0), dict(heads=4, batch=1.0)])
def test_a_step_of_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match="is not a whole number from 1"):
        Step(**{"heads": 1, "keys": 1, **wrong})


def test_heads_that_the_kernel_does_not_share_are_refused():
    made = tq.compile("kv-int4", head_dim=64, decode=True, shared_heads=4)
    with pytest.raises(ValueError, match="heads: 6 is no multiple of the 4"):
        work(made, Step(heads=6, keys=100), 4)


# ---------------------------------------------------------------------------- real machine code


@pytest.mark.compiled
def test_the_order_of_a_real_kernel_agrees_with_its_counts():
    made = tq.compile("kv-int8", head_dim=128, causal=True, shared_heads=4)
    trials = planned(made, Workload(heads=32, n_q=8192, n_k=8192), keep=None)
    read = {each.config: each.resources.instructions_per_score for each in made.candidates()}
    counts = [read[trial.config] for trial in trials]
    assert counts == sorted(counts), "one head_dim, one type of products: instructions decide where memory does not"
    tall = next(trial for trial in trials if trial.config.block_m == 128)
    assert 1.0 < tall.predicted_ms / trials[0].predicted_ms < 1.3, "half the bytes do not pay for registers of eight warps"


@pytest.mark.compiled
def test_a_kernel_that_reads_pages_with_newer_keys_elsewhere_compiles():
    from tokquant.kernels.compile import Kernel
    from tokquant.kernels.decode_plan import decode_plan
    from tokquant.kernels.wanted import Wanted

    scheme, wanted = tq.preset("kv-int4-kivi"), Wanted(right=True, lse=True)
    plan = decode_plan(scheme, head_dim=64, dtype=torch.float16, page=128, wanted=wanted, newer=True)
    made = Kernel.of(plan, scheme, 64, torch.float16, TARGETS["sm_90"], wanted)
    assert made.resources.fits
    found = planned(replace(made, plan=replace(plan, candidates=plan.candidates[:1])), Step(heads=1, keys=4096))
    assert found[0].predicted_ms > 0
