"""The growing sequences of a KV cache: their lengths, and how tokens move between 16-bit windows and packed pages."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import CacheFullError
from tokquant.features import Features
from tokquant.pages import Store, attention_by_reading
from tokquant.paging import BlockTable
from tokquant.reservation import Reservation
from tokquant.schemes import QuantScheme
from tokquant.slots import attention_to_nothing
from tokquant.tensor import QuantizedTensor
from tokquant.transfer import capturing, refuse_capture, to_device
from tokquant.windows import Windows

COUNTED = (
    "the lengths of a KVCache, which are counted on the CPU where reserve() has left no room, for counts, and for more than a "
    "page of tokens,"
)
"""What a CUDA graph cannot capture, for the error message."""


class Sequences:
    """A batch of sequences. Each is, from its oldest token on, a 16-bit sink, tokens packed in pages, and a 16-bit ring.

    Lengths are counted on the CPU; after `reserve`, on a GPU, by the device, and copied here when they are asked for. Callers
    have checked the arguments. Where the store or the page allocator raises, nothing has changed.
    """

    def __init__(self, store: Store, table: BlockTable, windows: Windows, device: torch.device):
        self.store, self.table, self.windows, self.device = store, table, windows, device
        self._lengths, self._packed = (np.zeros(len(table.page_counts), np.int32) for _ in range(2))
        # tokens that every sequence can take before anything but its lengths changes, into its last page or into its ring
        self._page_room = self._ring_room = 0
        self._reserved = False
        """Whether pages are reserved for tokens to come."""
        # what graphs are captured with; kept when its pages are given back, as replays still write to its memory
        self._reservation: Reservation | None = None
        self._former: list[Reservation] = []  # earlier ones, which graphs captured back then still write to

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence `[B]`."""
        self._sync_lengths()
        return self._lengths

    @property
    def packed(self) -> np.ndarray:
        """Tokens of each sequence that lie in pages `[B]`."""
        self._sync_lengths()
        return self._packed

    def append(self, k: Tensor, v: Tensor, counts: np.ndarray | None) -> None:
        """Append the first `counts[b]` of these tokens `[B, H_kv, n, D]` to sequence b, all n where None.

        The usual steps of decoding come first: into reserved pages, into the last page, into the ring.
        """
        batch, n = k.shape[0], k.shape[2]
        if counts is None and self._append_reserved(k, v):
            return
        refuse_capture(self.device, COUNTED)
        if counts is None and n <= self._page_room:
            self.store.write(k, v, self.table.tensor(self.device), self._tensor(self._packed))
            self._page_room -= n
            self._lengths += n
            self._packed += n
            return
        self._release()
        if counts is None and n == 1 and self._ring_room:
            self.windows.push(k, v, self._lengths)
            self._ring_room -= 1
            self._lengths += 1
            return
        counts = np.full(batch, n) if counts is None else counts
        split = self.windows.split(k, v, self._lengths, self._packed, counts)
        with self.table.allocate(self._packed, split.newly_packed):
            if most := split.k.shape[2]:
                moved, rows = split.newly_packed[split.rows], split.rows
                table, first = self.table.tensor(self.device), self._tensor(self._packed[rows])
                table = table if len(rows) == batch else table[to_device(rows, self.device)]
                self.store.write(split.k, split.v, table, first, None if (moved == most).all() else self._tensor(moved))
        self.windows.put(k, v, split.kept)
        self._lengths += counts.astype(np.int32)
        self._packed += split.newly_packed.astype(np.int32)
        self._count_room()

    def reserve(self, tokens: int, longest: int | None) -> None:
        """Reserve pages for `tokens` more of every sequence; where graphs can be captured, let the device count lengths.

        Raises ValueError where a sequence could outgrow what an earlier graph was captured for.
        """
        pool, reservation, lengths = self.table.pool, self._reservation, self.lengths
        allocation = self.table.allocate(lengths, np.full(len(lengths), tokens))
        if not self.store.replayable:
            with allocation:
                self._reserved = True
            return self._count_room()
        most = int(lengths.max()) + tokens
        columns = max(-(-max(most, longest or 0) // pool.page), int(self.table.page_counts.max()))
        if reservation is not None and longest is None:
            if reservation.captured and columns > reservation.columns:
                captured = reservation.columns * pool.page
                text = f"{tokens}, so a sequence may have {most}, and a CUDA graph was captured for {captured}"
                raise ValueError(f"tokens: {text}; truncate or evict it, or give longest= and capture another")
            columns = max(columns, reservation.columns)
        with allocation:  # the spare page may be one too many
            if reservation is None or reservation.columns != columns:
                reservation = Reservation(len(lengths), columns, pool.spare, self.store)
        if self._reservation is not None and self._reservation is not reservation and self._reservation.captured:
            self._reservation.end()
            self._former.append(self._reservation)
        reservation.begin(self.table.pages, self.table.page_counts, lengths)
        self._reservation, self._page_room, self._reserved = reservation, 0, True  # no room: appends go to the reservation

    def truncate(self, lengths: np.ndarray) -> None:
        """Keep the first `lengths[b]` tokens; of a block that is cut, the tokens kept go back to 16 bits, dequantized."""
        self._release()
        sink, unit, page = self.windows.sink, self.windows.unit, self.table.pool.page
        for b in np.nonzero(lengths < self._lengths)[0].tolist():
            left = max(int(lengths[b]) - sink, 0)
            packed = left // unit * unit
            if packed < self._packed[b]:
                if left > packed:
                    k, v = self.read(b, packed // page * page, packed + unit)
                    cut = slice(packed % page, packed % page + left - packed)
                    self.windows.restore(b, packed, k.dequantize()[:, :, cut], v.dequantize()[:, :, cut])
                self._packed[b] = packed
                self.table.truncate(b, packed)
            self._lengths[b] = lengths[b]
        self._count_room()

    def forget(self, keep: int) -> np.ndarray:
        """Free whole pages of the oldest tokens, but none of the `keep` newest; return how many tokens of each are gone."""
        self._release()
        page = self.table.pool.page
        pages = np.maximum(self._lengths - min(keep, 2**31 - 1), 0) // page
        if self.windows.slot_count:  # a token's slot depends on its position, counted from the first token
            pages = np.zeros_like(pages)
        for b in np.nonzero(pages)[0].tolist():
            self.table.forget(b, int(pages[b]))
        self._lengths -= pages * page
        self._packed -= pages * page
        if pages.any():
            self._count_room()
        return pages * page

    def fork(self, chosen: np.ndarray) -> "Sequences":
        """A copy of the `chosen` sequences: pages are shared, windows copied."""
        self._release()
        forked = copy.copy(self)
        forked._reservation, forked._former = None, []
        forked.table, forked.windows = self.table.fork(chosen), self.windows.fork(chosen)
        forked._lengths, forked._packed = self._lengths[chosen], self._packed[chosen]
        # no page is exclusive any more
        self._page_room = forked._page_room = forked._ring_room = 0
        return forked

    def fill(self, contents: list[tuple[QuantizedTensor | None, QuantizedTensor | None, Tensor, Tensor]]) -> None:
        """Fill empty sequences, each from packed K and V (None where there are none) and 16-bit K and V of its windows."""
        packed = np.array([0 if k is None else k.shape[2] for k, *_ in contents], np.int32)
        with self.table.allocate(self._packed, packed):
            for b, (k, v, *ends) in enumerate(contents):
                if k is not None and v is not None:
                    self.store.store(self.table.tensor(self.device)[b], 0, k, v)
                self.windows.fill(b, int(packed[b]), *ends)
                self._lengths[b] = packed[b] + ends[0].shape[2]
        self._packed = packed

    def read(self, b: int, first: int, end: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Packed K and V of sequence b, from token `first`, which begins a page, to `end`."""
        # to the store, a row of the table from any page on is a sequence
        return self.store.read(self.table.tensor(self.device)[b, first // self.table.pool.page :], end - first)

    def ends(self, b: int) -> tuple[Tensor, Tensor]:
        """K and V of sequence b in 16 bits: first the sink, then the newest."""
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
        if self._reservation is not None and self._reserved and by_reading is None:
            return self._reservation.attention(q, features, deterministic)
        refuse_capture(self.device, COUNTED)
        self._sync_lengths()  # once: each time waits for the device
        found = None
        if longest := int(self._packed.max()):
            table, lengths, offset = self.places()
            if by_reading is None:
                options: dict[str, Any] = dict(offset=offset, longest=longest, deterministic=deterministic)
                found = self.store.attention(q, table, lengths, features, **options)
            else:
                found = attention_by_reading(self.store, *by_reading, q, table, lengths, features, offset)
        if self.windows.slot_count and (self._lengths > self._packed).any():
            slots, (left, _) = self.windows.slots, features.reach()
            mask = self.windows.mask(self._lengths, self._packed, q.shape[2], left)
            found = (slots.attention if by_reading is None else slots.attention_in_torch)(q, mask, features, found)
        return attention_to_nothing(q) if found is None else found

    def places(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where a store finds the packed tokens: page table, packed lengths, and how many newer tokens lie in the ring."""
        offset = None
        if self.windows.slot_count:
            newer = self._lengths - self._packed - np.minimum(self._lengths, self.windows.sink)
            offset = self._tensor(newer) if newer.any() else None
        return self.table.tensor(self.device), self._tensor(self._packed), offset

    def _count_room(self) -> None:
        """Count the tokens that `append` can take without looking again where they go."""
        self._page_room, self._ring_room = self.table.room_left(self._packed), 0
        if self.windows.slot_count:
            self._ring_room = self.windows.room_left(self._lengths, self._packed)
            self._page_room = self._page_room if self.windows.bypassed(self._lengths) else 0

    def _tensor(self, x: np.ndarray) -> Tensor:
        return to_device(x.astype(np.int32, copy=False), self.device)

    def _append_reserved(self, k: Tensor, v: Tensor) -> bool:
        """Append to reserved pages whose tokens the device counts; False where there are none, or not enough."""
        reservation, n = self._reservation, k.shape[2]
        if reservation is None or not self._reserved or n > self.table.pool.page:
            return False
        if capturing(self.device):  # whether replays will fit is not known yet; `_sync_lengths` finds those that did not
            reservation.append(k, v)
            return True
        if not reservation.fits(n, self.lengths):
            return False
        reservation.append(k, v)
        self._lengths += n
        self._packed += n
        return True

    def _sync_lengths(self) -> None:
        """Read back the lengths that replays have changed. Raises CacheFullError, once, where tokens were lost."""
        if self._reservation is None:
            return
        refuse_capture(self.device, "the lengths of a KVCache, which the CPU would be told,")
        for reservation in (self._reservation, *self._former):
            if not reservation.captured:
                continue
            lengths, lost = reservation.read_lengths()
            if reservation is self._reservation and self._reserved:
                self._lengths, self._packed = lengths, lengths.copy()
            if lost.size and reservation is not self._reservation:
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
        if self._reservation.captured:
            self.store.check()

    def _release(self) -> None:
        """Read back the lengths that replays have changed, and free the reserved pages that hold no tokens."""
        self._sync_lengths()
        if not self._reserved:
            return
        if self._reservation is not None:
            self._reservation.end()
        for b, tokens in enumerate(self._packed.tolist()):
            self.table.truncate(b, tokens)
        self._reserved = False
        self._count_room()
