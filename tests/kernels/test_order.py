"""Which programs start first, as the kernels themselves number them: those with most to do."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.io_model import Workload
from tokquant.kernels import launch, targets
from tokquant.kernels.compile import Kernel
from tokquant.kernels.order import abreast
from tokquant.kernels.wanted import Wanted
from tokquant.tuning.work import work

MB = 2**20


@pytest.mark.parametrize(
    ("heads", "kv_heads", "megabytes", "expected"),
    [
        (32, 32, 8, 32),  # all fit in 25 of 50 MB,
        (32, 32, 32, 16),  # 25 of them,
        (32, 32, 3200, 1),  # or none
        (32, 8, 32, 16),  # 6 heads of K are read by 24 heads
        (32, 8, 3200, 4),  # which share one in any case
        (128, 128, 0, 128),
        (26, 26, 104, 2),  # 6 fit, of which 2 divide 26
        (7, 7, 60, 1),
    ],
)
def test_as_many_heads_start_side_by_side_as_half_of_the_cache_holds(heads, kv_heads, megabytes, expected):
    assert abreast(heads, kv_heads, megabytes * MB, 50 * MB) == expected


@pytest.fixture
def tiles(interpreter, monkeypatch):
    """Tiles of keys that each program of a launch has computed, in the order that a GPU starts them."""
    found, at, builder = Counter(), [], interpreter.interpreter_builder
    place, dot = builder.set_grid_idx, builder.create_dot

    def placed(x, y, z):
        at[:] = [(z, y, x)]
        found[z, y, x] += 0
        place(x, y, z)

    def counted(*arguments):
        found[at[0]] += 1
        return dot(*arguments)

    monkeypatch.setattr(builder, "set_grid_idx", placed)
    monkeypatch.setattr(builder, "create_dot", counted)

    def of_the_last_launch():
        in_order = [count // 2 for _, count in sorted(found.items())]  # of Q K^T and P V
        found.clear()
        return in_order

    return of_the_last_launch


REACHES = {
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (150, None)},
    "a window to the left": {"window": (150, None)},
    "all keys": {},
}


@pytest.mark.parametrize("given", REACHES.values(), ids=REACHES)
def test_programs_start_as_the_planner_has_it_with_the_longest_of_all_heads(given, tiles, monkeypatch):
    scheme = tq.preset("int8-fast")
    operands = tq.quantize(*qkv(300, 420, 32, heads=4, kv_heads=2, batch=2), scheme, backend="triton")
    features = features_of(*operands[:2], **given)
    expected = launch.prepare(*operands, scheme, features, return_lse=False).run()[0]
    # half of the cache holds five of eight heads of Q: four side by side, and then the other four
    kv_bytes = operands[1].codes.nbytes + operands[2].codes.nbytes
    small = replace(targets.DEFAULT, cache_size=2 * (kv_bytes * 5 // 8))
    monkeypatch.setattr(targets, "of", lambda device: small)
    call = launch.prepare(*operands, scheme, features, return_lse=False)
    kernel = Kernel.of(call.plan, scheme, 32, torch.float32, small, Wanted.of(features, False))
    tiles()
    assert torch.equal(call.run()[0], expected)
    ran, does = tiles(), work(kernel, Workload.of(*operands[:2], features))
    score = kernel.config.block_m * kernel.config.block_n
    assert call.grid == ((4, 3, 2) if "causal" in given else (3, 4, 2)) and does.programs == len(ran) == 24
    turn = ran[: len(does.scores)]
    assert len(turn) == (12 if "causal" in given else 3) and turn == sorted(turn, reverse=True)
    assert ran == [each // score for each in does.scores] * (24 // len(turn))


def test_sequences_of_their_own_lengths_start_with_the_longest_of_all(tiles, monkeypatch):
    q, k, v = (torch.randn(700, heads, 32) for heads in (2, 1, 1))
    starts = torch.tensor([0, 130, 130, 520, 700], dtype=torch.int32)
    tiles()
    tq.attention_varlen(q, k, v, "int8-fast", cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, backend="triton")
    ran = [count for count in tiles() if count]
    assert ran == sorted(ran, reverse=True) and len(ran) == 2 * (2 + 4 + 2) and sum(ran) == 2 * (1 + 2 + 1 + 2 + 3 + 4 + 1 + 2)
