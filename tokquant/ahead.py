"""Room that sequences hold ahead of their tokens, counted on the device: what a CUDA graph fills by itself."""

import numpy as np
import torch
from torch import Tensor

from tokquant.features import Features
from tokquant.pages import Store
from tokquant.transfer import capturing, to_device


class Ahead:
    """A table of pages and lengths, in memory of the device that stays where it is.

    Appending and attending read and write nothing else that changes, so each replay of a graph goes on where the last ended.
    Behind the pages of a sequence the table names a spare one, which nobody reads: replays beyond the room harm no token.

    Args:
        columns: pages that a sequence has at most.
        spare: the number of that page.
    """

    def __init__(self, batch: int, columns: int, spare: int, store: Store):
        self.columns, self._spare, self._store = columns, spare, store
        self.captured = False
        """Whether replays may append to it."""
        self._room = np.zeros(batch, np.int64)
        # at most a page of tokens, which begin one behind the room, reaches into two columns
        shapes = (batch, columns + 2), (batch,), (batch,)
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            self._table, self._lengths, self._most = (
                torch.zeros(shape, dtype=torch.int32, device=store.device) for shape in shapes
            )

    def begin(self, pages: np.ndarray, held: np.ndarray, lengths: np.ndarray) -> None:
        """Go on with sequences of such lengths, each in its first `held` of these pages `[B, n]`."""
        table = np.full(self._table.shape, self._spare)
        for row, own, count in zip(table, pages, held, strict=True):
            row[:count] = own[:count]
        self._room = held * self._store.page
        # one token more than there is room for tells that some were lost
        for x, given in ((self._table, table), (self._lengths, lengths), (self._most, self._room + 1)):
            x.copy_(to_device(given.astype(np.int32), x.device))

    def end(self) -> None:
        """Hold nothing: replays from now on are beyond the room."""
        nothing = np.zeros_like(self._room)
        self.begin(nothing[:, None], nothing, nothing)

    def fits(self, n: int, lengths: np.ndarray) -> bool:
        """Whether each of sequences so long has room for n tokens."""
        return bool((lengths + n <= self._room).all())

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `[B, H_kv, n, D]`, n at most a page, to every sequence."""
        self.captured |= capturing(self._store.device)
        self._store.write(k, v, self._table, self._lengths)
        torch.minimum(self._lengths.add_(k.shape[2]), self._most, out=self._lengths)

    def attention(self, q: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
        """As `Store.attention`, launched for sequences that fill all columns."""
        self.captured |= capturing(self._store.device)
        longest = self.columns * self._store.page
        return self._store.attention(q, self._table, self._lengths, features, longest=longest, deterministic=deterministic)

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths, for which the device is waited for, and of which sequences tokens were lost, which is told once."""
        counted = self._lengths.cpu().numpy()
        lost = np.nonzero(counted > self._room)[0]
        counted = np.minimum(counted, self._room).astype(np.int32)
        if lost.size:
            self._lengths.copy_(to_device(counted, self._lengths.device))
        return counted, lost
