"""Pages of a KV cache: which are free, who holds which, and copies made before a shared one is written."""

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
    """Pages of one store and how many sequences hold each. Caches that were forked share a pool."""

    def __init__(self, store: Store, page: int, pages: int, fixed: bool):
        self.store, self.page, self.fixed = store, page, fixed
        self.holders = np.zeros(pages, np.int32)
        self.free = list(range(pages))[::-1]
        self._spare: int | None = None

    @property
    def spare(self) -> int:
        """A page for what nobody is to read. Raises CacheFullError where none is free at first."""
        if self._spare is None:
            [self._spare] = self.take(1)
        return self._spare

    def take(self, wanted: int) -> list[int]:
        """Free pages, lowest numbers first. Raises CacheFullError, before anything changes, where there are too few."""
        if wanted > len(self.free):
            self._grow(wanted)
        pages = [self.free.pop() for _ in range(wanted)]
        self.holders[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """One more holder for each."""
        np.add.at(self.holders, pages, 1)

    def give(self, pages: Iterable[int]) -> None:
        """One holder fewer for each; what nobody holds is free."""
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
    """The pages of each sequence of a batch, in order: token t of what is packed lies in page `numbers[b, t // page]`."""

    def __init__(self, pool: Pool, batch: int):
        self.pool = pool
        self.numbers = np.zeros((batch, 1), np.int32)
        self.held = np.zeros(batch, np.int64)
        self._tensor: Tensor | None = None

    def __del__(self):
        for row, held in zip(self.numbers, self.held, strict=True):
            self.pool.give(row[:held])

    def tensor(self, device: torch.device) -> Tensor:
        """The numbers, int32 `[B, columns]`, on the store's device."""
        if self._tensor is None:
            self._tensor = to_device(self.numbers, device)
        return self._tensor

    @contextmanager
    def room(self, first: np.ndarray, counts: np.ndarray) -> Iterator[None]:
        """Hold, inside, pages of one's own for `counts[b]` tokens from token `first[b]`; whatever raises leaves no trace.

        Raises CacheFullError before anything changes.
        """
        page, pool = self.pool.page, self.pool
        ends = -(-(first + counts) // page)
        changes: list[tuple[int, int, int | None]] = []
        leaving: Counter[int] = Counter()
        for b in np.nonzero(counts)[0].tolist():
            for column in range(int(first[b]) // page, int(ends[b])):
                old = int(self.numbers[b, column]) if column < self.held[b] else None
                if old is None or pool.holders[old] - leaving[old] > 1:
                    changes.append((b, column, old))
                    leaving.update([] if old is None else [old])
        taken = pool.take(len(changes))
        if (missing := int(ends.max()) - self.numbers.shape[1]) > 0:
            self.numbers = np.pad(self.numbers, ((0, 0), (0, max(missing, self.numbers.shape[1]))))
        self._tensor = None if changes else self._tensor
        held = self.held.copy()
        try:
            for (b, column, old), new in zip(changes, taken, strict=True):
                if old is not None:
                    pool.store.copy(old, new)
                self.numbers[b, column] = new
                self.held[b] = max(self.held[b], column + 1)
            yield
        except BaseException:
            for b, column, old in changes:
                self.numbers[b, column] = old or 0
            self.held, self._tensor = held, None
            pool.give(taken)
            raise
        pool.give(old for _, _, old in changes if old is not None)

    def left(self, tokens: np.ndarray) -> int:
        """Tokens that each sequence, of so many, can append to a page of its own."""
        page = self.pool.page
        last = self.numbers[np.arange(len(tokens)), np.maximum(self.held - 1, 0)]
        own = (self.held > 0) & (self.pool.holders[last] == 1)
        return int(np.where(own, self.held * page - tokens, 0).min())

    def tokens(self, tokens: np.ndarray) -> int:
        """Of sequences of so many tokens, those in all pages, shared ones once."""
        filled: dict[int, int] = {}
        for row, held, n in zip(self.numbers, self.held, tokens.tolist(), strict=True):
            for column, page in enumerate(row[:held].tolist()):
                filled[page] = max(filled.get(page, 0), min(self.pool.page, max(n - column * self.pool.page, 0)))
        return sum(filled.values())

    def cut(self, b: int, tokens: int) -> None:
        """Let go of the pages that lie behind so many tokens."""
        keep = -(-tokens // self.pool.page)
        self.pool.give(self.numbers[b, keep : self.held[b]])
        self.held[b] = keep

    def forget(self, b: int, pages: int) -> None:
        """Let go of a sequence's first pages."""
        left = self.held[b] - pages
        self.pool.give(self.numbers[b, :pages])
        self.numbers[b, :left] = self.numbers[b, pages : self.held[b]]
        self.held[b], self._tensor = left, None

    def fork(self, sequences: np.ndarray) -> "BlockTable":
        """A table of these sequences, whose pages are shared until one of them is written."""
        forked = BlockTable(self.pool, len(sequences))
        forked.numbers, forked.held = self.numbers[sequences], self.held[sequences]
        for row, held in zip(forked.numbers, forked.held, strict=True):
            self.pool.share(row[:held])
        return forked
