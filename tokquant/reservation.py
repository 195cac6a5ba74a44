"""Pages reserved ahead of tokens, with lengths counted on the device: what replays of a CUDA graph append to."""

import numpy as np
import torch
from torch import Tensor

from tokquant.features import Features
from tokquant.pages import Store
from tokquant.transfer import capturing, to_device


class Reservation:
    """The page table and the lengths of a batch of sequences, in device memory whose address never changes.

    They are the only state that `append` and `attention` use, so each replay of a captured graph continues where the last one
    ended. Past the pages of a sequence its row of the table holds a spare page, which is never read: a replay that appends
    more than was reserved overwrites no token.

    Args:
        columns: the most pages that one sequence can have.
        spare: number of the spare page.
    """

    def __init__(self, batch: int, columns: int, spare: int, store: Store):
        self.columns, self._spare, self._store = columns, spare, store
        self.captured = False
        """Whether a graph was captured with it, whose replays may append."""
        self._capacity = np.zeros(batch, np.int64)  # tokens of each sequence
        # lengths stop at capacity + 1, so an append of at most a page reaches two columns past the reserved pages
        shapes = (batch, columns + 2), (batch,), (batch,)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            self._table, self._lengths, self._limit = (
                torch.zeros(shape, dtype=torch.int32, device=store.device) for shape in shapes
            )

    def begin(self, pages: np.ndarray, held: np.ndarray, lengths: np.ndarray) -> None:
        """Start from these lengths; sequence b owns the first `held[b]` pages of row b of `pages` `[B, n]`."""
        table = np.full(self._table.shape, self._spare)
        for row, numbers, count in zip(table, pages, held, strict=True):
            row[:count] = numbers[:count]
        self._capacity = held * self._store.page
        # a length of capacity + 1 records an overflow
        for x, values in ((self._table, table), (self._lengths, lengths), (self._limit, self._capacity + 1)):
            x.copy_(to_device(values.astype(np.int32), x.device))

    def end(self) -> None:
        """Give all pages up: every later replay overflows, until `begin`."""
        nothing = np.zeros_like(self._capacity)
        self.begin(nothing[:, None], nothing, nothing)

    def fits(self, n: int, lengths: np.ndarray) -> bool:
        """Whether n more tokens of every sequence fit the reserved pages, given their lengths."""
        return bool((lengths + n <= self._capacity).all())

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append tokens `[B, H_kv, n, D]`, n at most a page, to every sequence."""
        self.captured |= capturing(self._store.device)
        self._store.write(k, v, self._table, self._lengths)
        torch.minimum(self._lengths.add_(k.shape[2]), self._limit, out=self._lengths)

    def attention(self, q: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
        """`Store.attention` on all tokens, with a grid for sequences that fill every column."""
        self.captured |= capturing(self._store.device)
        longest = self.columns * self._store.page
        return self._store.attention(q, self._table, self._lengths, features, longest=longest, deterministic=deterministic)

    def read_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the device; return the lengths, and the sequences that lost tokens to an overflow since the last call."""
        lengths = self._lengths.cpu().numpy()
        overflowed = np.nonzero(lengths > self._capacity)[0]
        lengths = np.minimum(lengths, self._capacity).astype(np.int32)
        if overflowed.size:
            self._lengths.copy_(to_device(lengths, self._lengths.device))
        return lengths, overflowed
