"""The allocator of pages: nothing is lost, nothing is held twice, and a full pool changes nothing."""

import numpy as np
import pytest

from tokquant.errors import CacheFullError
from tokquant.paging import BlockTable, Pool


class Written:
    """A store that notes what each page holds."""

    def __init__(self, pages):
        self.pages = [None] * pages

    def grow(self, pages):
        self.pages += [None] * (pages - len(self.pages))

    def copy(self, source, target):
        self.pages[target] = self.pages[source]


def table_of(batch=2, pages=4, fixed=True, page=16):
    store = Written(pages)
    return BlockTable(Pool(store, page, pages, fixed), batch), store


def fill(table, first, counts, error=None):
    with table.allocate(np.array(first), np.array(counts)):
        if error:
            raise error


def rows(table):
    return [row[:held].tolist() for row, held in zip(table.pages, table.page_counts, strict=True)]


def test_pages_of_a_fresh_pool_come_in_order():
    table, _ = table_of(batch=1, pages=3)
    fill(table, [0], [40])
    assert rows(table) == [[0, 1, 2]]


def test_a_sequence_takes_pages_for_its_tokens_and_no_more():
    table, _ = table_of()
    fill(table, [0, 0], [16, 17])
    assert [len(row) for row in rows(table)] == [1, 2] and len(table.pool.free) == 1
    fill(table, [16, 17], [0, 15])
    assert [len(row) for row in rows(table)] == [1, 2]


def test_what_is_cut_is_free_again():
    table, _ = table_of()
    fill(table, [0, 0], [32, 32])
    table.truncate(0, 17)
    assert not table.pool.free
    table.truncate(0, 16)
    table.truncate(1, 0)
    assert len(table.pool.free) == 3 and rows(table)[1] == []


def test_a_full_pool_says_how_full_and_changes_nothing():
    table, _ = table_of()
    fill(table, [0, 0], [16, 32])
    before = rows(table), list(table.pool.free)
    with pytest.raises(CacheFullError, match="2 more pages of 16 tokens are needed, and 1 of 4 are free; evict or truncate"):
        fill(table, [16, 32], [16, 16])
    assert (rows(table), table.pool.free) == before


def test_a_pool_that_may_grow_does_and_keeps_what_it_has():
    table, store = table_of(pages=2, fixed=False)
    fill(table, [0, 0], [16, 16])
    store.pages[:] = "ab"
    fill(table, [16, 16], [64, 16])
    assert rows(table)[0][0] == 0 and rows(table)[1][0] == 1 and store.pages[:2] == ["a", "b"]
    assert len({page for row in rows(table) for page in row}) == 7


def test_a_write_that_fails_leaves_no_trace():
    table, _ = table_of(pages=8)
    fill(table, [0, 0], [20, 8])
    other = table.fork(np.array([0, 1]))
    before = rows(table), rows(other), sorted(table.pool.free), table.pool.holders.tolist()
    with pytest.raises(ValueError, match="no"):
        fill(table, [20, 8], [30, 1], error=ValueError("no"))
    assert (rows(table), rows(other), sorted(table.pool.free), table.pool.holders.tolist()) == before


def test_a_shared_page_is_copied_by_the_one_that_writes_first():
    table, store = table_of(batch=1, pages=3)
    fill(table, [0], [20])
    store.pages[:2] = "ab"
    other = table.fork(np.array([0]))
    assert rows(other) == rows(table) == [[0, 1]]
    fill(other, [20], [1])
    assert rows(other) == [[0, 2]] and rows(table) == [[0, 1]] and store.pages[2] == "b"
    fill(table, [20], [1])  # by now its own
    assert rows(table) == [[0, 1]] and not table.pool.free


def test_the_last_of_two_that_write_at_once_keeps_the_page():
    table, _ = table_of(batch=1, pages=2)
    fill(table, [0], [4])
    pair = table.fork(np.array([0, 0]))
    table.truncate(0, 0)
    fill(pair, [4, 4], [1, 1])
    assert sorted(rows(pair)) == [[0], [1]] and not table.pool.free


def test_pages_whose_table_is_gone_are_free():
    table, _ = table_of(batch=1, pages=3)
    fill(table, [0], [20])
    other = table.fork(np.array([0, 0, 0]))
    assert table.pool.holders.tolist() == [4, 4, 0]
    del other
    assert table.pool.holders.tolist() == [1, 1, 0]
    pool = table.pool
    del table
    assert sorted(pool.free) == [0, 1, 2]


def test_room_in_ones_own_pages_is_counted():
    table, _ = table_of(batch=2, pages=4)
    fill(table, [0, 0], [3, 16])
    assert table.room_left(np.array([3, 16])) == 0
    fill(table, [3, 16], [0, 9])
    assert table.room_left(np.array([3, 25])) == 7
    other = table.fork(np.array([1]))
    assert table.room_left(np.array([3, 25])) == 0
    del other
    assert table.room_left(np.array([3, 25])) == 7


def test_tokens_of_shared_pages_count_once():
    table, _ = table_of(batch=2, pages=4)
    fill(table, [0, 0], [20, 5])
    assert table.count_tokens(np.array([20, 5])) == 25
    pair = table.fork(np.array([0, 0]))
    assert pair.count_tokens(np.array([20, 20])) == 20
    assert pair.count_tokens(np.array([18, 20])) == 20


def holders_of(tables, pages):
    """How many of these tables' rows hold each page."""
    return np.bincount([page for table in tables for row in rows(table) for page in row], minlength=pages)


@pytest.mark.parametrize("seed", range(5))
def test_holders_are_what_tables_hold_whatever_happens(seed):
    chance = np.random.default_rng(seed)
    tables, tokens = [table_of(batch=3, pages=12)[0]], [np.zeros(3, int)]
    pool, full = tables[0].pool, 0
    for _ in range(200):
        at = int(chance.integers(len(tables)))
        held = tokens[at]
        match chance.integers(5):
            case 0 | 1:
                counts = chance.integers(0, 30, len(held))
                try:
                    fill(tables[at], held, counts)
                    held += counts
                except CacheFullError:
                    full += 1
            case 2:
                b = int(chance.integers(len(held)))
                held[b] = chance.integers(0, held[b] + 1)
                tables[at].truncate(b, int(held[b]))
            case 3:
                chosen = chance.integers(0, len(held), chance.integers(1, 5))
                tables.append(tables[at].fork(chosen))
                tokens.append(held[chosen])
            case 4 if len(tables) > 1:
                del tables[at], tokens[at]
        assert [table.page_counts.tolist() for table in tables] == [(-(-lengths // 16)).tolist() for lengths in tokens]
        counted = holders_of(tables, 12)
        assert counted.tolist() == pool.holders.tolist() and sorted(pool.free) == np.nonzero(counted == 0)[0].tolist()
    assert full
