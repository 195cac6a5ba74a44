"""The schedule of a launch: against one that goes from event to event, and by hand."""

import random
import re
from pathlib import Path

import pytest

from tokquant.kernels.order import abreast
from tokquant.kernels.targets import DEFAULT
from tokquant.tuning.schedule import MANY, busy


def event_by_event(scores, processors, resident, clocks):
    """Programs on multiprocessors that share their time, each given to the one with most room as soon as there is any."""
    waiting, running, now = list(scores), [[] for _ in range(processors)], 0.0
    while waiting or any(running):
        while waiting and min(map(len, running)) < resident:
            min(running, key=len).append(waiting.pop(0))
        step = min(min(each) * clocks(len(each)) for each in running if each)
        now += step
        for each in running:
            each[:] = [left for left in (score - step / clocks(len(each)) for score in each) if left > 1e-6]
    return now


@pytest.mark.parametrize("seed", range(12))
def test_programs_take_what_they_take_event_by_event(seed):
    chance = random.Random(seed)
    processors, resident, floor = chance.randint(1, 9), chance.randint(1, 3), chance.choice([1, 2])
    scores = [chance.randint(1, 10**6) for _ in range(chance.randint(1, 60))]

    def clocks(programs):
        return 0.25 * max(programs, floor)

    expected = event_by_event(scores, processors, resident, clocks)
    assert busy(len(scores), scores, processors, resident, clocks) == pytest.approx(expected)


def one_each(programs):
    return programs


def test_a_program_that_begins_late_is_waited_for_and_the_longest_first_are_not():
    assert busy(5, [1, 1, 1, 1, 4], 2, 1, one_each) == 6 and busy(5, [4, 1, 1, 1, 1], 2, 1, one_each) == 4


def test_two_on_one_multiprocessor_share_it_until_the_shorter_ends():
    assert busy(2, [3, 5], 1, 2, one_each) == 8 and busy(3, [3, 5, 4], 2, 2, one_each) == 7


def test_scores_begin_again_where_there_are_more_programs():
    assert busy(6, [2, 1], 3, 1, one_each) == busy(6, [2, 1, 2, 1, 2, 1], 3, 1, one_each)


@pytest.mark.parametrize("scores", [[1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 1, 1, 30]])
def test_very_many_programs_take_their_mean_within_a_hundredth(scores):
    most = MANY * 8 // len(scores) * len(scores)
    exact, mean = (busy(count, scores, 8, 1, one_each) / count for count in (most, most + len(scores)))
    assert mean == pytest.approx(exact, rel=0.015)


def test_the_page_about_kernels_has_what_an_order_of_programs_comes_to():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = re.findall(r"(?m)^\| (\d+), (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page)
    assert len(rows) == 7
    for heads, tokens, *expected in rows:
        blocks = range(1, int(tokens) // 128 + 1)
        up, down = ([blocks_seen + 1 for blocks_seen in order] for order in (blocks, blocks[::-1]))
        side = abreast(int(heads), int(heads), int(heads) * int(tokens) * 2 * 128, DEFAULT.cache_size)
        programs = int(heads) * len(up)
        least = max(sum(up) * int(heads) / DEFAULT.multiprocessors, max(up))
        orders = up, down, [score for score in down for _ in range(side)]
        shares = [busy(programs, order, DEFAULT.multiprocessors, 1, one_each) / least for order in orders]
        assert [f"{share:.2f}" for share in shares] == expected, (heads, tokens)
