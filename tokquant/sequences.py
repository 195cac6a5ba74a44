"""Sequences that grow: how many tokens each has, which of them are packed, and what moves when tokens come and go."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.features import Features
from tokquant.pages import Store, attention_by_reading
from tokquant.paging import BlockTable
from tokquant.schemes import QuantScheme
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import to_device
from tokquant.windows import Windows


class Sequences:
    """A batch of them: from its oldest token on each is a sink, what is packed in pages, and a ring.

    Nothing is checked here but for what the store and the allocator refuse, and that leaves no trace.
    """

    def __init__(self, store: Store, table: BlockTable, windows: Windows, device: torch.device):
        self.store, self.table, self.windows, self.device = store, table, windows, device
        self.lengths, self.packed = (np.zeros(len(table.held), np.int32) for _ in range(2))
        self._own = self._waits = 0

    def append(self, k: Tensor, v: Tensor, counts: np.ndarray | None) -> None:
        """Add the first `counts[b]` of these tokens `[B, H_kv, n, D]`, all where None."""
        batch, n = k.shape[0], k.shape[2]
        if counts is None and n <= self._own:
            self.store.write(k, v, self.table.tensor(self.device), self._tensor(self.packed))
            self._own -= n
            self.lengths += n
            self.packed += n
            return
        if counts is None and n == 1 and self._waits:
            self.windows.push(k, v, self.lengths)
            self._waits -= 1
            self.lengths += 1
            return
        given = np.full(batch, n) if counts is None else counts
        split = self.windows.split(k, v, self.lengths, self.packed, given)
        with self.table.room(self.packed, split.moved):
            if most := split.k.shape[2]:
                moved, rows = split.moved[split.rows], split.rows
                table, first = self.table.tensor(self.device), self._tensor(self.packed[rows])
                table = table if len(rows) == batch else table[to_device(rows, self.device)]
                self.store.write(split.k, split.v, table, first, None if (moved == most).all() else self._tensor(moved))
        self.windows.put(k, v, split.kept)
        self.lengths += given.astype(np.int32)
        self.packed += split.moved.astype(np.int32)
        self._foresee()

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep so many tokens of each; those of a block that is cut go back to 16 bits, as what their codes say."""
        sink, together, page = self.windows.sink, self.windows.unit, self.table.pool.page
        for b in np.nonzero(lengths < self.lengths)[0].tolist():
            left = max(int(lengths[b]) - sink, 0)
            packed = left // together * together
            if packed < self.packed[b]:
                if left > packed:
                    k, v = self.read(b, packed // page * page, packed + together)
                    cut = slice(packed % page, packed % page + left - packed)
                    self.windows.restore(b, packed, k.dequantize()[:, :, cut], v.dequantize()[:, :, cut])
                self.packed[b] = packed
                self.table.cut(b, packed)
            self.lengths[b] = lengths[b]
        self._foresee()

    def forget(self, keep: int) -> np.ndarray:
        """Let go of whole pages of the oldest tokens, but of the `keep` newest; how many tokens of each that were."""
        page = self.table.pool.page
        pages = np.maximum(self.lengths - min(keep, 2**31 - 1), 0) // page
        if self.windows.slots:  # whose places are counted from the first token
            pages = np.zeros_like(pages)
        for b in np.nonzero(pages)[0].tolist():
            self.table.forget(b, int(pages[b]))
        self.lengths -= pages * page
        self.packed -= pages * page
        if pages.any():
            self._foresee()
        return pages * page

    def fork(self, chosen: np.ndarray) -> "Sequences":
        """These sequences once more: pages shared, windows copied."""
        forked = copy.copy(self)
        forked.table, forked.windows = self.table.fork(chosen), self.windows.fork(chosen)
        forked.lengths, forked.packed = self.lengths[chosen], self.packed[chosen]
        self._own = forked._own = forked._waits = 0
        return forked

    def fill(self, contents: list[tuple[QuantizedTensor | None, QuantizedTensor | None, Tensor, Tensor]]) -> None:
        """Begin with K and V that are packed (None where nothing is), and those of the windows, of each sequence."""
        packed = np.array([0 if k is None else k.shape[2] for k, *_ in contents], np.int32)
        with self.table.room(self.packed, packed):
            for b, (k, v, *ends) in enumerate(contents):
                if k is not None and v is not None:
                    self.store.store(self.table.tensor(self.device)[b], 0, k, v)
                self.windows.fill(b, int(packed[b]), *ends)
                self.lengths[b] = packed[b] + ends[0].shape[2]
        self.packed = packed

    def read(self, b: int, first: int, end: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V packed from token `first`, which begins a page, to `end`."""
        # a row of the table from any page on is that of a sequence
        return self.store.read(self.table.tensor(self.device)[b, first // self.table.pool.page :], end - first)

    def ends(self, b: int) -> tuple[Tensor, Tensor]:
        """K and V in 16 bits: first the sink, then the newest."""
        return self.windows.tokens(b, int(self.lengths[b]), int(self.packed[b]))

    def attention(
        self,
        q: Tensor,
        features: Features,
        by_reading: tuple[QuantScheme, LayerScales | None] | None = None,
        deterministic: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:
        """Attention to what is packed and to the windows: out and natural LSE of each, float32.

        Given a scheme and its scales the emulation attends to what the store reads, in place of the store.
        """
        parts = []
        if longest := int(self.packed.max()):
            table, lengths, offset = self.places()
            if by_reading is None:
                options: dict[str, Any] = dict(offset=offset, longest=longest, deterministic=deterministic)
                parts.append(self.store.attention(q, table, lengths, features, **options))
            else:
                parts.append(attention_by_reading(self.store, *by_reading, q, table, lengths, features, offset))
        if self.windows.slots and (self.lengths > self.packed).any():
            parts.append(self.windows.attention(q, self.lengths, self.packed, features))
        return parts

    def places(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a store is told of what is packed: the table, how many tokens, and how many newer ones lie elsewhere."""
        offset = None
        if self.windows.slots:
            newer = self.lengths - self.packed - np.minimum(self.lengths, self.windows.sink)
            offset = self._tensor(newer) if newer.any() else None
        return self.table.tensor(self.device), self._tensor(self.packed), offset

    def _foresee(self) -> None:
        """How many tokens go on as the last one did: every sequence into a page of its own, or into its ring."""
        self._own, self._waits = self.table.left(self.packed), 0
        if self.windows.slots:
            self._waits = self.windows.left(self.lengths, self.packed)
            self._own = self._own if self.windows.passes(self.lengths) else 0

    def _tensor(self, x: np.ndarray) -> Tensor:
        return to_device(x.astype(np.int32, copy=False), self.device)
