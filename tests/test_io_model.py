"""What a kernel moves: the model equals the count of every load and store, byte by byte."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import SCHEMES, fits, qkv, some_factors

import tokquant as tq
from tokquant import bias, io_model
from tokquant.inputs import features_of
from tokquant.io_model import Workload
from tokquant.kernels import launch, quantize, targets
from tokquant.kernels.candidates import Config
from tokquant.kernels.compile import Kernel
from tokquant.kernels.wanted import Wanted
from tokquant.quantize import quantize_operands
from tokquant.schemes import preset


def drawn(number):
    """Scheme, shape, features, type, whether with LSE, and queries a block: the scheme in turn, the rest by chance."""
    chance = random.Random(number)
    name = list(SCHEMES)[number % len(SCHEMES)]
    d = chance.choice([d for d in (32, 32, 40, 64) if fits(SCHEMES[name], d)])
    n_q, n_k = chance.choice([(1, 90), (37, 37), (50, 20), (33, 101), (64, 64), (70, 110)])
    kv_heads, shared, batch = chance.choice([(1, 1, 1), (1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2)])
    heads = kv_heads * shared
    given = chance.choice([{}, {}, {"causal": True}, {"causal": True}, {"window": (20, 9)}, {"window": (13, None)}])
    given = given | chance.choice([{}, {}, {"softcap": 4.0}])
    pairs = [chance.choice([1, size]) for size in (batch, heads, n_q, n_k)]
    given = given | chance.choice([{}, {}, {"mask": torch.rand(pairs) > 0.2}, {"mask": torch.rand(pairs)}])
    given = given | chance.choice([{}, {}, {"sinks": torch.zeros(heads)}, {"sinks": torch.zeros(heads, dtype=torch.float16)}])
    given = given | chance.choice(
        [
            {},
            {},
            {"bias": bias.alibi(bias.alibi_slopes(heads))},
            {"bias": bias.key_vector(torch.rand(heads, n_k))},
            {"bias": bias.lowrank(some_factors(1, heads, n_q, 13), some_factors(1, 1, n_k, 13))},
            {"bias": bias.dense(torch.rand(*pairs[:2], n_q, n_k, dtype=torch.float16))},
        ]
    )
    dtype = chance.choice([torch.float16, torch.float32])
    return name, (n_q, n_k, d, heads, kv_heads, batch), given, dtype, chance.random() < 0.5, chance.choice([16, 32, 64])


def prepared(s, shape, given, dtype=torch.float32, lse=False, block_m=32, block_n=None):
    """A call, its kernel and its workload."""
    q, k, v = qkv(*shape, dtype=dtype)
    operands = launch.packed(quantize_operands(q, k, v, s), s)
    features = features_of(*operands[:2], **given)
    call = launch.prepare(*operands, s, features, lse, deterministic=True)
    config = replace(call.config, block_m=block_m, block_n=block_n or call.config.block_n)
    call = replace(call, config=config)
    kernel = Kernel.of(call.plan, s, shape[2], dtype, targets.DEFAULT, Wanted.of(features, lse))
    workload = Workload.of(q, k, features)
    return call, replace(kernel, config=config), workload


NUMBERS = [pytest.param(n, id=f"{n}: {drawn(n)[0]}", marks=[] if n < 60 else pytest.mark.slow) for n in range(240)]


@pytest.mark.parametrize("number", NUMBERS)
def test_bytes_of_a_plan_equal_those_counted(number):
    name, shape, given, dtype, lse, block_m = drawn(number)
    call, kernel, workload = prepared(SCHEMES[name], shape, given, dtype, lse, block_m)
    with io_model.counting() as launches:
        call.run()
    assert [launch.traffic for launch in launches] == [io_model.traffic(kernel, workload)]


def test_random_plans_reach_every_kind_of_traffic():
    kinds = set()
    for number in range(60):
        name, shape, given, dtype, lse, block_m = drawn(number)
        _, kernel, workload = prepared(SCHEMES[name], shape, given, dtype, lse, block_m)
        kinds |= set(io_model.traffic(kernel, workload).tensors)
    assert {name if name in kinds else f"no {name}" for name in NAMES} == NAMES


NAMES = {
    *("Q.codes", "Q.scale", "Q.offset", "Q.code_sum", "Q.logit_offset", "K.codes", "K.scale", "K.zero", "K.companion"),
    *("V.codes", "V.scale", "V.zero", "V.offset", "V.correction", "V.log2_weight", "V.inverse_weight"),
    *("F.sinks", "F.mask", "F.bias", "F.k_factors", "Out.data", "Lse"),
}


@pytest.mark.parametrize("name", ["int8", "kv-int4-kivi"])
def test_counting_does_not_disturb_the_results(name):
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    run = GridExecutor.__call__
    call, _, _ = prepared(preset(name), (33, 70, 64, 2), {"causal": True}, lse=True)
    out, lse = (x.clone() for x in call.run())
    call.out.fill_(float("nan"))
    call.lse.fill_(float("nan"))
    with io_model.counting():
        call.run()
    assert torch.equal(call.out, out) and torch.equal(call.lse, lse)
    assert "create_masked_load" not in vars(interpreter_builder) and GridExecutor.__call__ is run, "all is as it was"


@pytest.mark.parametrize(
    ("name", "reads"), [("int8-fast", (1, 1, 2)), ("int8", (1, 1, 1)), ("fp8", (2, 2, 2)), ("kv-int4", (1, 1, 1))]
)
def test_quantization_reads_as_often_as_its_page_says(name, reads):
    q, k, v = qkv(100, 200, 64, 2, dtype=torch.float16)
    with io_model.counting() as launches:
        operands = quantize.quantize_operands(q, k, v, preset(name))
    read = sum(launch.traffic.tensors.get("X.data", 0) for launch in launches)
    assert read == sum(times * x.nbytes for times, x in zip(reads, (q, k, v), strict=True))
    # tokens that only fill a group of 16 are written too
    assert sum(launch.traffic.tensors.get("Y.codes", 0) for launch in launches) == sum(x.codes.nbytes for x in operands)


def test_bytes_of_a_causal_kernel_are_what_one_counts_by_hand():
    # 256 queries in blocks of 128, tiles of 128 keys: the first block reads one tile, the second both; two heads share K and V
    kernel = tq.compile("int8", head_dim=64, causal=True, shared_heads=2, return_lse=True)
    kernel = replace(kernel, config=Config(128, 128, 8, 2))
    found = io_model.traffic(kernel, Workload(heads=2, n_q=256, n_k=256))
    assert found.tensors == {
        "Q.codes": 2 * 256 * 64,
        "Q.scale": 2 * 256 * 4,
        "K.codes": 2 * 3 * 128 * 64,
        "K.scale": 2 * 3 * 128 * 4,
        "V.codes": 2 * 3 * 128 * 64,
        "V.scale": 2 * 3 * 64 * 4,
        "V.correction": 2 * 3 * 64 * 4,
        "Q.logit_offset": 2 * 256 * 4,
        "V.offset": 2 * 2 * 64 * 2,
        "Out.data": 2 * 256 * 64 * 2,
        "Lse": 2 * 256 * 4,
    }
    assert found.kinds["scales"] == 2 * 4 * (256 + 3 * 128 + 3 * 64) and found.total == sum(found.kinds.values())


def test_larger_blocks_of_queries_read_keys_less_often():
    kernel = tq.compile("kv-int4", head_dim=128)
    small, large = (
        io_model.traffic(replace(kernel, config=Config(block_m, 128, 4, 2)), Workload(heads=8, n_q=2**17, n_k=2**17))
        for block_m in (64, 128)
    )
    assert small.kinds["k"] == 2 * large.kinds["k"] == 8 * 2**17 * 64 * 2**17 // 64
    assert small.kinds["o"] == large.kinds["o"]


PAGE = (Path(__file__).parent.parent / "docs" / "io.md").read_text()


@pytest.mark.parametrize("name", re.findall(r"^\| `([\w-]+)` \| \d+ \|", PAGE, re.MULTILINE))
def test_the_table_of_the_page_is_what_kernels_move(name):
    kernel, workload = tq.compile(name, head_dim=128, causal=True, shared_heads=4), Workload(heads=32, n_q=8192, n_k=8192)
    found = io_model.standing(kernel, workload)
    moved, kinds = found.traffic.total, found.traffic.kinds
    beside = 1 - sum(kinds[kind] for kind in "qkvo") / moved
    least = io_model.launches(kernel, workload)[0][1].total
    assert (
        f"| `{name}` | {kernel.config.block_m} | {moved / 1e6:.0f} | {100 * (kinds['k'] + kinds['v']) / moved:.0f} % | "
        f"{100 * beside:.1f} % | {found.sixteen_bit.total / moved:.2f} x | {found.intensity:.0f} | {least / 1e6:.0f} |"
    ) in PAGE


def test_launches_come_by_what_they_move():
    kernel = tq.compile("int8-fp16", head_dim=128)
    found = io_model.launches(kernel, Workload(heads=2, n_q=2048, n_k=2048))
    assert {each.config for each, _ in found} == set(kernel.plan.candidates)
    totals = [moved.total for _, moved in found]
    assert totals == sorted(totals) and totals[0] < totals[-1]
    score = io_model.bytes_per_score(found[0][0], Workload(heads=2, n_q=2048, n_k=2048))
    assert score == totals[0] / (2 * 2048 * 2048)


def test_tensors_that_share_memory_cannot_be_told_apart():
    given = {"bias": bias.alibi(torch.ones(2)), "sinks": torch.ones(2)}
    given["sinks"] = given["bias"].slopes
    call, _, _ = prepared(preset("int8"), (20, 30, 32, 2), given)
    with pytest.raises(ValueError, match=r"F\.bias and F\.sinks share memory"), io_model.counting():
        call.run()


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({}, {"heads": 0}, "heads: 0 is not a whole number from 1"),
        ({}, {"n_q": 2.0}, "n_q: 2.0 is not a whole number"),
        ({}, {"window": (-1, 0)}, r"window: \(-1, 0\) is not \(left, right\)"),
        ({}, {"window": (8, 8)}, "the kernel has no left bound; leave it out, or compile it with one"),
        ({"window": True}, {}, "the kernel has a left bound; give one, or compile it without one"),
        ({"shared_heads": 4}, {"heads": 6}, "heads: 6 is no multiple of the 4 that share one"),
    ],
)
def test_workloads_that_do_not_fit_a_kernel_are_refused(options, sizes, message):
    with pytest.raises(ValueError, match=message):
        io_model.traffic(tq.compile("int8", head_dim=64, **options), Workload(**{"heads": 4, "n_q": 8, "n_k": 8} | sizes))


@pytest.mark.parametrize("options", [{"varlen": True}, {"decode": True}])
def test_kernels_without_a_model_are_refused(options):
    with pytest.raises(tq.UnsupportedError, match="is not modelled"):
        io_model.traffic(tq.compile("kv-int8", head_dim=64, **options), Workload(heads=1, n_q=8, n_k=8))
