"""Allocates the pages of a KV cache: a pool with reference counts, and block tables that copy shared pages on write."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import CacheFullError
from tokquant.pages import Store
from tokquant.transfer import to_device


class Pool:
    """The free pages of one store, and the reference counts of the others. A cache and its forks share a pool."""

    def __init__(self, store: Store, page: int, pages: int, fixed: bool):
        self.store, self.page, self.fixed = store, page, fixed
        self.holders = np.zeros(pages, np.int32)  # sequences that hold each page
        self.free = list(range(pages))[::-1]
        self._spare: int | None = None

    @property
    def spare(self) -> int:
        """A page to write what nobody reads, taken at the first call, which raises CacheFullError if none is free."""
        if self._spare is None:
            [self._spare] = self.take(1)
        return self._spare

    def take(self, wanted: int) -> list[int]:
        """Take `wanted` free pages, the last freed first. Raises CacheFullError, before any change, where there are fewer."""
        if wanted > len(self.free):
            self._grow(wanted)
        pages = [self.free.pop() for _ in range(wanted)]
        self.holders[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """Add one holder to each page."""
        np.add.at(self.holders, pages, 1)

    def give(self, pages: Iterable[int]) -> None:
        """Remove one holder from each page; pages without holders are free again."""
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(int(page))

    def _grow(self, wanted: int) -> None:
        pages = len(self.holders)
        if self.fixed:
            raise CacheFullError(
                f"the cache is full: {wanted} more pages of {self.page} tokens are needed, and {len(self.free)} of {pages} are "
                "free; evict or truncate sequences, or make a cache of a larger capacity"
            )
        larger = max(2 * pages, pages + wanted - len(self.free))
        with torch.inference_mode(False):  # as for a new cache
            self.store.grow(larger)
        self.holders = np.pad(self.holders, (0, larger - pages))
        self.free[:0] = range(larger - 1, pages - 1, -1)


class BlockTable:
    """The block table of a batch: packed token t of sequence b is in page `pages[b, t // page]`.

    Only the first `page_counts[b]` entries of row b are valid.
    """

    def __init__(self, pool: Pool, batch: int):
        self.pool = pool
        self.pages = np.zeros((batch, 1), np.int32)
        self.page_counts = np.zeros(batch, np.int64)
        self._tensor: Tensor | None = None

    def __del__(self):
        for row, count in zip(self.pages, self.page_counts, strict=True):
            self.pool.give(row[:count])

    def tensor(self, device: torch.device) -> Tensor:
        """The table, int32 `[B, columns]`, on the store's device."""
        if self._tensor is None:
            self._tensor = to_device(self.pages, device)
        return self._tensor

    @contextmanager
    def allocate(self, first: np.ndarray, counts: np.ndarray) -> Iterator[None]:
        """Give sequence b exclusive pages for `counts[b]` tokens from token `first[b]`, copying those that it shares.

        If the body of the `with` raises, the table is as it was before. Raises CacheFullError before anything changes.
        """
        page, pool = self.pool.page, self.pool
        ends = -(-(first + counts) // page)
        changes: list[tuple[int, int, int | None]] = []
        replaced: Counter[int] = Counter()
        for b in np.nonzero(counts)[0].tolist():
            for column in range(int(first[b]) // page, int(ends[b])):
                old = int(self.pages[b, column]) if column < self.page_counts[b] else None
                if old is None or pool.holders[old] - replaced[old] > 1:
                    changes.append((b, column, old))
                    replaced.update([] if old is None else [old])
        taken = pool.take(len(changes))
        if (missing := int(ends.max()) - self.pages.shape[1]) > 0:
            self.pages = np.pad(self.pages, ((0, 0), (0, max(missing, self.pages.shape[1]))))
        self._tensor = None if changes else self._tensor
        page_counts = self.page_counts.copy()
        try:
            for (b, column, old), new in zip(changes, taken, strict=True):
                if old is not None:
                    pool.store.copy(old, new)
                self.pages[b, column] = new
                self.page_counts[b] = max(self.page_counts[b], column + 1)
            yield
        except BaseException:
            for b, column, old in changes:
                self.pages[b, column] = old or 0
            self.page_counts, self._tensor = page_counts, None
            pool.give(taken)
            raise
        pool.give(old for _, _, old in changes if old is not None)

    def room_left(self, lengths: np.ndarray) -> int:
        """Tokens that every sequence, of these packed lengths, can append to its last page without allocating."""
        page = self.pool.page
        last = self.pages[np.arange(len(lengths)), np.maximum(self.page_counts - 1, 0)]
        exclusive = (self.page_counts > 0) & (self.pool.holders[last] == 1)
        return int(np.where(exclusive, self.page_counts * page - lengths, 0).min())

    def count_tokens(self, lengths: np.ndarray) -> int:
        """Tokens in all pages of sequences of these packed lengths. A shared page counts once."""
        filled: dict[int, int] = {}
        for row, count, n in zip(self.pages, self.page_counts, lengths.tolist(), strict=True):
            for column, page in enumerate(row[:count].tolist()):
                filled[page] = max(filled.get(page, 0), min(self.pool.page, max(n - column * self.pool.page, 0)))
        return sum(filled.values())

    def truncate(self, b: int, tokens: int) -> None:
        """Release the pages of sequence b that hold none of its first `tokens` tokens."""
        keep = -(-tokens // self.pool.page)
        self.pool.give(self.pages[b, keep : self.page_counts[b]])
        self.page_counts[b] = keep

    def forget(self, b: int, pages: int) -> None:
        """Release the first `pages` pages of sequence b."""
        left = self.page_counts[b] - pages
        self.pool.give(self.pages[b, :pages])
        self.pages[b, :left] = self.pages[b, pages : self.page_counts[b]]
        self.page_counts[b], self._tensor = left, None

    def fork(self, sequences: np.ndarray) -> "BlockTable":
        """A table of these sequences, which shares their pages. `allocate` copies a shared page before it is written."""
        forked = BlockTable(self.pool, len(sequences))
        forked.pages, forked.page_counts = self.pages[sequences], self.page_counts[sequences]
        for row, count in zip(forked.pages, forked.page_counts, strict=True):
            self.pool.share(row[:count])
        return forked
