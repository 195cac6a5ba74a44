"""Sequences that grow: how many tokens each has, which of them are packed, and what moves when tokens come and go."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.ahead import Ahead
from tokquant.calibration.scales import LayerScales
from tokquant.errors import CacheFullError
from tokquant.features import Features
from tokquant.pages import Store, attention_by_reading
from tokquant.paging import BlockTable
from tokquant.schemes import QuantScheme
from tokquant.slots import nothing
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import capturing, refuse_capture, to_device
from tokquant.windows import Windows

COUNTED = (
    "the lengths of a KVCache, which are counted on the CPU where reserve() has left no room, for counts, and for more than a "
    "page of tokens,"
)
"""What a CUDA graph cannot capture."""


class Sequences:
    """A batch of them: from its oldest token on each is a sink, what is packed in pages, and a ring.

    Nothing is checked here but for what the store and the allocator refuse, and that leaves no trace.
    """

    def __init__(self, store: Store, table: BlockTable, windows: Windows, device: torch.device):
        self.store, self.table, self.windows, self.device = store, table, windows, device
        self._lengths, self._packed = (np.zeros(len(table.held), np.int32) for _ in range(2))
        self._own = self._waits = 0
        self._reserved = False
        """Whether pages are held for tokens to come."""
        self._ahead: Ahead | None = None
        self._former: list[Ahead] = []  # what graphs were captured with, and would write to

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        self._look()
        return self._lengths

    @property
    def packed(self) -> np.ndarray:
        """Those of them in pages."""
        self._look()
        return self._packed

    def append(self, k: Tensor, v: Tensor, counts: np.ndarray | None) -> None:
        """Add the first `counts[b]` of these tokens `[B, H_kv, n, D]`, all where None."""
        batch, n = k.shape[0], k.shape[2]
        if counts is None and self._append_ahead(k, v):
            return
        refuse_capture(self.device, COUNTED)
        if counts is None and n <= self._own:
            self.store.write(k, v, self.table.tensor(self.device), self._tensor(self._packed))
            self._own -= n
            self._lengths += n
            self._packed += n
            return
        self._let_go()
        if counts is None and n == 1 and self._waits:
            self.windows.push(k, v, self._lengths)
            self._waits -= 1
            self._lengths += 1
            return
        given = np.full(batch, n) if counts is None else counts
        split = self.windows.split(k, v, self._lengths, self._packed, given)
        with self.table.room(self._packed, split.moved):
            if most := split.k.shape[2]:
                moved, rows = split.moved[split.rows], split.rows
                table, first = self.table.tensor(self.device), self._tensor(self._packed[rows])
                table = table if len(rows) == batch else table[to_device(rows, self.device)]
                self.store.write(split.k, split.v, table, first, None if (moved == most).all() else self._tensor(moved))
        self.windows.put(k, v, split.kept)
        self._lengths += given.astype(np.int32)
        self._packed += split.moved.astype(np.int32)
        self._foresee()

    def reserve(self, tokens: int, longest: int | None) -> None:
        """Hold pages for so many more tokens of each, and where graphs can be captured count on the device.

        Raises ValueError where sequences would be longer than a graph was captured for.
        """
        pool, ahead, lengths = self.table.pool, self._ahead, self.lengths
        room = self.table.room(lengths, np.full(len(lengths), tokens))
        if not self.store.replayable:
            with room:
                self._reserved = True
            return self._foresee()
        most = int(lengths.max()) + tokens
        columns = max(-(-max(most, longest or 0) // pool.page), int(self.table.held.max()))
        if ahead is not None and longest is None:
            if ahead.captured and columns > ahead.columns:
                text = f"{tokens}, so a sequence may have {most}, and a CUDA graph was captured for {ahead.columns * pool.page}"
                raise ValueError(f"tokens: {text}; truncate or evict it, or give longest= and capture another")
            columns = max(columns, ahead.columns)
        with room:
            if ahead is None or ahead.columns != columns:
                ahead = Ahead(len(lengths), columns, pool.spare, self.store)
        if self._ahead is not None and self._ahead is not ahead and self._ahead.captured:
            self._ahead.end()
            self._former.append(self._ahead)
        ahead.begin(self.table.numbers, self.table.held, lengths)
        self._ahead, self._own, self._reserved = ahead, 0, True  # what comes next goes there

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep so many tokens of each; those of a block that is cut go back to 16 bits, as what their codes say."""
        self._let_go()
        sink, together, page = self.windows.sink, self.windows.unit, self.table.pool.page
        for b in np.nonzero(lengths < self._lengths)[0].tolist():
            left = max(int(lengths[b]) - sink, 0)
            packed = left // together * together
            if packed < self._packed[b]:
                if left > packed:
                    k, v = self.read(b, packed // page * page, packed + together)
                    cut = slice(packed % page, packed % page + left - packed)
                    self.windows.restore(b, packed, k.dequantize()[:, :, cut], v.dequantize()[:, :, cut])
                self._packed[b] = packed
                self.table.cut(b, packed)
            self._lengths[b] = lengths[b]
        self._foresee()

    def forget(self, keep: int) -> np.ndarray:
        """Let go of whole pages of the oldest tokens, but of the `keep` newest; how many tokens of each that were."""
        self._let_go()
        page = self.table.pool.page
        pages = np.maximum(self._lengths - min(keep, 2**31 - 1), 0) // page
        if self.windows.slots:  # whose places are counted from the first token
            pages = np.zeros_like(pages)
        for b in np.nonzero(pages)[0].tolist():
            self.table.forget(b, int(pages[b]))
        self._lengths -= pages * page
        self._packed -= pages * page
        if pages.any():
            self._foresee()
        return pages * page

    def fork(self, chosen: np.ndarray) -> "Sequences":
        """These sequences once more: pages shared, windows copied."""
        self._let_go()
        forked = copy.copy(self)
        forked._ahead, forked._former = None, []
        forked.table, forked.windows = self.table.fork(chosen), self.windows.fork(chosen)
        forked._lengths, forked._packed = self._lengths[chosen], self._packed[chosen]
        self._own = forked._own = forked._waits = 0
        return forked

    def fill(self, contents: list[tuple[QuantizedTensor | None, QuantizedTensor | None, Tensor, Tensor]]) -> None:
        """Begin with K and V that are packed (None where nothing is), and those of the windows, of each sequence."""
        packed = np.array([0 if k is None else k.shape[2] for k, *_ in contents], np.int32)
        with self.table.room(self._packed, packed):
            for b, (k, v, *ends) in enumerate(contents):
                if k is not None and v is not None:
                    self.store.store(self.table.tensor(self.device)[b], 0, k, v)
                self.windows.fill(b, int(packed[b]), *ends)
                self._lengths[b] = packed[b] + ends[0].shape[2]
        self._packed = packed

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
    ) -> tuple[Tensor, Tensor]:
        """Attention to what is packed and to the windows: out and natural LSE, float32.

        Given a scheme and its scales the emulation attends to what the store reads, in place of the store.
        """
        if self._ahead is not None and self._reserved and by_reading is None:
            return self._ahead.attention(q, features, deterministic)
        refuse_capture(self.device, COUNTED)
        self._look()  # once: each time waits for the device
        found = None
        if longest := int(self._packed.max()):
            table, lengths, offset = self.places()
            if by_reading is None:
                options: dict[str, Any] = dict(offset=offset, longest=longest, deterministic=deterministic)
                found = self.store.attention(q, table, lengths, features, **options)
            else:
                found = attention_by_reading(self.store, *by_reading, q, table, lengths, features, offset)
        if self.windows.slots and (self._lengths > self._packed).any():
            memory, (left, _) = self.windows.memory, features.reach()
            attends = self.windows.attends(self._lengths, self._packed, q.shape[2], left)
            found = (memory.attention if by_reading is None else memory.define)(q, attends, features, found)
        return nothing(q) if found is None else found

    def places(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a store is told of what is packed: the table, how many tokens, and how many newer ones lie elsewhere."""
        offset = None
        if self.windows.slots:
            newer = self._lengths - self._packed - np.minimum(self._lengths, self.windows.sink)
            offset = self._tensor(newer) if newer.any() else None
        return self.table.tensor(self.device), self._tensor(self._packed), offset

    def _foresee(self) -> None:
        """How many tokens go on as the last one did: every sequence into a page of its own, or into its ring."""
        self._own, self._waits = self.table.left(self._packed), 0
        if self.windows.slots:
            self._waits = self.windows.left(self._lengths, self._packed)
            self._own = self._own if self.windows.passes(self._lengths) else 0

    def _tensor(self, x: np.ndarray) -> Tensor:
        return to_device(x.astype(np.int32, copy=False), self.device)

    def _append_ahead(self, k: Tensor, v: Tensor) -> bool:
        """Add tokens to the room ahead, if there is any for them."""
        ahead, n = self._ahead, k.shape[2]
        if ahead is None or not self._reserved or n > self.table.pool.page:
            return False
        if capturing(self.device):
            ahead.append(k, v)
            return True
        if not ahead.fits(n, self.lengths):
            return False
        ahead.append(k, v)
        self._lengths += n
        self._packed += n
        return True

    def _look(self) -> None:
        """Count what replays have appended. Raises CacheFullError, once, where some of it is lost."""
        if self._ahead is None:
            return
        refuse_capture(self.device, "the lengths of a KVCache, which the CPU would be told,")
        for ahead in (self._ahead, *self._former):
            if not ahead.captured:
                continue
            counted, lost = ahead.counted()
            if ahead is self._ahead and self._reserved:
                self._lengths, self._packed = counted, counted.copy()
            if lost.size and ahead is not self._ahead:
                raise CacheFullError(
                    "a CUDA graph that was captured before reserve() got another longest was replayed, and what it appended is "
                    "lost; replay one that was captured since"
                )
            if lost.size:
                b = lost[0]
                raise CacheFullError(
                    f"replays of a CUDA graph appended more to sequence {b} than was reserved; it has its first "
                    f"{self._lengths[b]} tokens. Reserve more before so many replays, and again after anything else has "
                    "changed the cache"
                )
        if self._ahead.captured:
            self.store.check()

    def _let_go(self) -> None:
        """Count what replays have appended, and give back the pages that are held for tokens to come."""
        self._look()
        if not self._reserved:
            return
        if self._ahead is not None:
            self._ahead.end()
        for b, tokens in enumerate(self._packed.tolist()):
            self.table.cut(b, tokens)
        self._reserved = False
        self._foresee()
