"""Lower bounds on what attention moves, and the algorithms that are held against them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokquant as tq
from tokquant import io_model
from tokquant.io_model import Problem, Workload, algorithms, bounds, lower_bounds
from tokquant.kernels.targets import TARGETS
from tokquant.schemes import preset, preset_names


def words(n, d, **widths):
    """One head of n tokens, in words of one byte unless said otherwise."""
    return Problem(
        scores=n * n, queries=n, keys=n, outputs=n, head_dim=d, **(dict.fromkeys("qkvo", 1.0) | {"sums": 1.0} | widths)
    )


def slope(f, low, high):
    """Of f between two memories, in logarithms."""
    return math.log(f(high) / f(low)) / math.log(high / low)


@pytest.mark.parametrize(
    ("n", "d", "memory"), [(64, 32, 256), (48, 16, 64), (32, 32, 4), (40, 8, 400), (37, 13, 100), (9, 5, 35)]
)
def test_square_tiling_is_attention_and_moves_the_words_of_its_formula(n, d, memory, monkeypatch):
    read, largest, b = algorithms.SlowMemory.read, [], algorithms.side(memory)

    def measured(self, *place):
        part = read(self, *place)
        largest.append(part.size)
        return part

    monkeypatch.setattr(algorithms.SlowMemory, "read", measured)
    q, k, v = (np.random.default_rng(i).standard_normal((n, d)) / 3 for i in range(3))
    out, moved = algorithms.square_tiling(q, k, v, memory)
    exact = torch.softmax(torch.tensor(q) @ torch.tensor(k).T, dim=1) @ torch.tensor(v)
    assert np.abs(out - exact.numpy()).max() < 1e-12
    assert moved == algorithms.square_tiling_words(n, d, memory)
    assert 4 * max(largest) <= memory
    if n % b == d % b == 0:
        assert moved == 4 * n * n * d // b + n * n + n * d + 2 * n


@pytest.mark.parametrize(("memory", "millions"), [(4096, 1141.9), (16384, 605.0), (65536, 336.6)])
def test_square_tiling_of_8192_tokens(memory, millions):
    assert algorithms.square_tiling_words(8192, 128, memory) / 1e6 == pytest.approx(millions, abs=0.05)


def test_below_d_squared_everything_falls_as_one_over_the_root_of_memory():
    n, d = 2**20, 2**11
    of, low, high = words(n, d), d**2 // 2**14, d**2 // 2**12
    assert slope(lambda m: bounds.small_memory(of, m), low, high) == pytest.approx(-0.5, abs=0.02)
    assert slope(lambda m: algorithms.square_tiling_words(n, d, m), low, high) == pytest.approx(-0.5, abs=0.02)
    assert slope(lambda m: algorithms.square_tiling_bytes(of, m), low, high) == pytest.approx(-0.5, abs=0.02)
    assert {lower_bounds(of, m).active for m in (low, high)} == {"small_memory"}


def test_above_d_squared_everything_falls_as_one_over_memory():
    n, d = 2**22, 2**6
    of, low, high = words(n, d), 2**8 * d**2, 2**10 * d**2
    assert slope(lambda m: bounds.pebble(of, m), low, high) == pytest.approx(-1, abs=0.02)
    assert slope(lambda m: algorithms.flash_words(n, d, m), low, high) == pytest.approx(-1, abs=0.02)
    assert slope(lambda m: algorithms.flash_bytes(of, m), low, high) == pytest.approx(-1, abs=0.02)
    assert {lower_bounds(of, m).active for m in (low, high)} == {"pebble"}


def test_the_better_algorithm_changes_near_a_quarter_of_d_squared():
    n, d = 2**16, 2**8
    assert algorithms.square_tiling_words(n, d, d**2 // 8) < algorithms.flash_words(n, d, d**2 // 8)
    assert algorithms.square_tiling_words(n, d, d**2 // 2) > algorithms.flash_words(n, d, d**2 // 2)


def test_constants_far_from_d_squared():
    n, d = 2**24, 2**7
    large, small = 2**10 * d**2, 2**-8 * d**2
    assert algorithms.flash_words(n, d, int(large)) / lower_bounds(words(n, d), large).greatest == pytest.approx(4, rel=0.05)
    assert algorithms.square_tiling_words(n, d, int(small)) / lower_bounds(words(n, d), small).greatest < 4.5


@given(n=st.integers(1, 3000), d=st.integers(1, 300), memory=st.integers(4, 10**6), values=st.sampled_from([256, 2**16, 2**32]))
def test_no_bound_is_above_what_an_algorithm_moves(n, d, memory, values):
    least = lower_bounds(words(n, d), memory).greatest
    assert least <= algorithms.square_tiling_words(n, d, memory)
    if memory >= 4 * d + 3:
        assert least <= algorithms.flash_words(n, d, memory)
    assert bounds.communication(n, d, memory, values) <= algorithms.square_tiling_words(n, d, memory)


WIDTHS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@given(n=st.integers(1, 10**5), d=st.integers(1, 300), memory=st.integers(64, 10**7), q=WIDTHS, k=WIDTHS, v=WIDTHS, o=WIDTHS)
def test_no_bound_of_mixed_widths_is_above_what_an_algorithm_moves(n, d, memory, q, k, v, o):
    of = words(n, d, q=q, k=k, v=v, o=o, sums=4.0)
    least = lower_bounds(of, memory).greatest
    assert least <= algorithms.flash_bytes(of, memory) * (1 + 1e-9)
    assert least <= algorithms.square_tiling_bytes(of, memory) * (1 + 1e-9)


@pytest.mark.parametrize(("q", "k", "millions"), [(2, 2, 14.5), (1, 1, 4.2), (1, 0.5, 2.0)])
def test_bytes_of_the_pebble_game_with_227_kilobytes(q, k, millions):
    of = words(8192, 128, q=q, k=k, v=k, o=2.0, sums=4.0)
    assert bounds.pebble(of, 227 * 1024) / 1e6 == pytest.approx(millions, abs=0.06)


def test_widths_of_q_and_k_enter_as_their_product():
    halves, bytes_ = words(2**14, 64, q=2.0, k=0.5), words(2**14, 64, q=1.0, k=1.0)
    for bound in (bounds.pebble, bounds.small_memory):
        assert bound(halves, 4096) == pytest.approx(bound(bytes_, 4096), rel=1e-3)
    wide, narrow = (bounds.pebble(words(2**18, 64, q=width, k=width), 2**20) for width in (2.0, 1.0))
    assert wide == pytest.approx(4 * narrow, rel=0.1), "16-bit operands, four times the bound of bytes"


def test_any_algorithm_is_bound_where_elements_are_more_than_tokens():
    assert bounds.communication(2**12, 64, 2**14, 2**16) == 2**24 * 2**12 / 2**17 - 2**14
    assert bounds.communication(2**12, 64, 1024, 2**16) == 2**21 - 1024
    assert bounds.communication(2**12, 64, 1024, 256) == 0
    for memory in (64, 4096, 2**16, 2**20):
        assert bounds.communication(2**14, 64, memory, 2**16) <= bounds.pebble(words(2**14, 64), memory)


def test_each_processor_may_begin_with_its_memory_full():
    of = words(2**14, 64)
    one, four = (bounds.pebble(of, 2**14, processors) for processors in (1, 4))
    assert one - four == pytest.approx(3 * (2**14 - 1))
    for memory in (0.5, 2**14):
        assert bounds.pebble(of, memory, 10**13) == 0 == bounds.small_memory(of, memory, 10**13)


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", [name for name in preset_names() if "fp8" not in name and name != "fireq"])
def test_no_kernel_moves_less_than_the_bound(name, target):
    kernel = tq.compile(preset(name), head_dim=64, causal=True, shared_heads=2, target=target)
    workload = Workload(heads=4, n_q=3000, n_k=4000)
    for _, moved in io_model.launches(kernel, workload):
        for memory, processors in ((TARGETS[target].fast_bytes, TARGETS[target].multiprocessors), (2**16, 1)):
            found = lower_bounds(io_model.problem(kernel, workload), memory, processors)
            assert found.greatest <= moved.total


def brute(n_q, n_k, left, right):
    pairs = [
        (i, j)
        for i in range(n_q)
        for j in range(n_k)
        if (right is None or j <= i + n_k - n_q + right) and (left is None or j >= i + n_k - n_q - left)
    ]
    return len(pairs), len({i for i, _ in pairs}), len({j for _, j in pairs})


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 9), (20, 20), (31, 12), (12, 31)])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (4, 0), (3, 5), (0, 0)])
def test_scores_queries_and_keys_are_those_that_the_reach_leaves(n_q, n_k, window):
    left, right = window
    kernel = tq.compile("int8", head_dim=64, window=left is not None, causal=right == 0, shared_heads=2)
    found = io_model.problem(kernel, Workload(heads=6, batch=2, n_q=n_q, n_k=n_k, window=window))
    scores, queries, keys = brute(n_q, n_k, left, right)
    assert (found.scores, found.queries, found.keys, found.outputs) == (12 * scores, 12 * queries, 6 * keys, 12 * n_q)
    assert (found.q, found.k, found.v, found.o) == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("name", "dtype", "widths"),
    [
        ("kv-int4", torch.float16, (1, 0.5, 0.5, 2)),
        ("kv-int2-kivi", torch.bfloat16, (2, 0.25, 0.25, 2)),
        ("int8-fp16", torch.float32, (1, 1, 2, 4)),
        ("none", torch.float16, (4, 4, 4, 2)),
    ],
)
def test_operands_are_as_wide_as_their_codes(name, dtype, widths):
    kernel = tq.compile(name, head_dim=64, dtype=dtype, return_lse=True)
    found = io_model.problem(kernel, Workload(heads=1, n_q=10, n_k=20))
    assert (found.q, found.k, found.v, found.o) == widths
    q, k, v, o = widths
    assert bounds.compulsory(found) == 64 * (10 * q + 20 * (k + v) + 10 * o) + 40


def test_a_standing_compares_with_the_same_attention_in_16_bits():
    kernel = tq.compile("int8", head_dim=128, causal=True, shared_heads=4)
    found = io_model.standing(kernel, Workload(heads=8, n_q=4096, n_k=4096))
    assert 1.8 < found.sixteen_bit.total / found.traffic.total < 2
    assert found.intensity / found.sixteen_bit_intensity == pytest.approx(found.sixteen_bit.total / found.traffic.total)
    assert found.operations == 8 * 4 * 128 * 4096 * 4097 // 2
    assert found.memory == (256 + 228) * 1024 and found.bounds.active == "compulsory"
    assert found.above_bound == found.traffic.total / found.bounds.compulsory
    assert found.milliseconds(3.35e9) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lower_bounds(words(8, 8), 0), "memory: 0; give bytes of fast memory above 0"),
        (lambda: lower_bounds(words(8, 8), math.inf), "memory: inf"),
        (lambda: lower_bounds(words(8, 8), 64, 0), "processors: 0 is not a whole number from 1"),
        (lambda: algorithms.side(3), "memory: 3 is not a whole number from 4: four squares need"),
        (lambda: algorithms.flash_words(8, 8, 30), "a query of 8 channels needs 35 words"),
    ],
)
def test_memories_that_hold_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
