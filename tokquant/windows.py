"""The 16-bit ends of a KV cache: the first tokens of each sequence, and the newest in a ring."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokquant.slots import Slots
from tokquant.transfer import to_device


@dataclass(frozen=True)
class Split:
    """Where tokens go that were appended: some to pages, the others into slots of the windows."""

    moved: np.ndarray
    """Tokens that are packed, for each sequence `[B]`."""
    rows: np.ndarray
    """The sequences of which some are."""
    k: Tensor
    """Those tokens `[rows, H_kv, most that move, D]`, the ones that waited in the ring first."""
    v: Tensor
    kept: tuple[np.ndarray, np.ndarray, np.ndarray]
    """For each new token that stays: its sequence, its place among the new ones, its slot."""


class Windows:
    """K and V of the first `sink` tokens of each sequence, and of the newest ones that are not packed.

    Slots are `sink` in front, then a ring: token t after the sink lies in slot `sink + t % ring`. Tokens are packed `unit` at
    a time, as soon as `recent` of them stay.
    """

    def __init__(self, sink: int, recent: int, unit: int, made: Callable[[int], Slots]):
        self.sink, self.recent, self.unit, self.ring = sink, recent, unit, recent + unit - 1
        self.slots = sink + self.ring
        self.memory = made(self.slots)

    def passes(self, lengths: np.ndarray) -> bool:
        """Whether what comes next goes to pages at once."""
        return not self.ring and bool((lengths >= self.sink).all())

    def left(self, lengths: np.ndarray, packed: np.ndarray) -> int:
        """Tokens that every sequence can append before any of its own are packed; none while a sink is not full."""
        waiting = lengths - self.sink - packed
        return int((self.ring - waiting).min()) if (lengths >= self.sink).all() else 0

    def push(self, k: Tensor, v: Tensor, lengths: np.ndarray) -> None:
        """Add one token `[B, H_kv, 1, D]` to each ring that has room."""
        slots = self._slot(lengths - self.sink)
        k, v = k[:, :, 0], v[:, :, 0]
        if (slots == slots[0]).all():
            self.memory.put(slice(None), int(slots[0]), k, v)
        else:
            self.memory.put(np.arange(len(slots)), slots, k, v)

    def split(self, k: Tensor, v: Tensor, lengths: np.ndarray, packed: np.ndarray, counts: np.ndarray) -> Split:
        """Where the first `counts[b]` of these tokens `[B, H_kv, n, D]` go, for sequences of such lengths."""
        sink = self.sink
        end = np.maximum(lengths + counts - sink, 0)  # of the tokens after the sink
        waiting = end - packed
        moved = np.where(waiting >= self.recent + self.unit, (waiting - self.recent) // self.unit * self.unit, 0)

        token = lengths[:, None] + np.arange(k.shape[2])
        place = token - sink
        stays = (token < (lengths + counts)[:, None]) & ((place < 0) | (place >= (packed + moved)[:, None]))
        rows, tokens = np.nonzero(stays)
        slots = np.where(token < sink, token, self._slot(place))[rows, tokens]
        kept = (rows, tokens, slots)

        rows, step = np.nonzero(moved)[0], np.arange(moved.max())
        source = (packed + sink - lengths)[rows, None] + step  # among the new tokens; below 0 in the ring
        if not len(rows):
            return Split(moved, rows, k[:0, :, :0], v[:0, :, :0], kept)
        if len(rows) == len(moved) and source[0, 0] >= 0 and (source[:, 0] == source[0, 0]).all():
            moving = slice(source[0, 0], source[0, 0] + len(step))
            return Split(moved, rows, k[:, :, moving], v[:, :, moving], kept)
        waited = np.nonzero(source < 0)
        old = self.memory.get(rows[waited[0]], self._slot(packed[rows[waited[0]]] + waited[1]))
        k, v = (_joined(x, rows, source, tokens, waited) for x, tokens in zip((k, v), old, strict=True))
        return Split(moved, rows, k, v, kept)

    def put(self, k: Tensor, v: Tensor, kept: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Write the tokens that stay."""
        if len(kept[0]):
            rows, tokens, slots = kept
            at = to_device(rows, k.device), slice(None), to_device(tokens, k.device)
            self.memory.put(rows, slots, k[at], v[at])

    def restore(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write tokens `[1, H_kv, n, D]` that follow `packed` ones, of those after the sink."""
        self._write(sequence, self._slot(packed + np.arange(k.shape[2])), k, v)

    def fill(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write all that is here of a sequence, as `tokens` gives it."""
        first = min(self.sink, k.shape[2])
        self._write(sequence, np.arange(first), k[:, :, :first], v[:, :, :first])
        self.restore(sequence, packed, k[:, :, first:], v[:, :, first:])

    def tokens(self, sequence: int, length: int, packed: int) -> tuple[Tensor, Tensor]:
        """What is here of a sequence, in its order: K and V `[1, H_kv, n, D]`."""
        ends = np.arange(min(length, self.sink)), self._slot(np.arange(packed, max(length - self.sink, packed)))
        k, v = self.memory.get(np.array([sequence]), np.concatenate(ends))
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def fork(self, sequences: np.ndarray) -> "Windows":
        """A copy of these sequences' windows."""
        forked = object.__new__(Windows)
        forked.__dict__.update(self.__dict__)
        forked.memory = self.memory.fork(sequences)
        return forked

    def attends(self, lengths: np.ndarray, packed: np.ndarray, n_q: int, left: int | None) -> np.ndarray:
        """Which slots query i, at `lengths - n_q + i`, sees: `[B, 1, n_q, slots]`; `left` tokens before its own, or all."""
        b, slot = len(lengths), np.arange(self.ring)
        newest = self.sink + packed[:, None] + (slot - packed[:, None]) % max(self.ring, 1)
        position = np.concatenate([np.broadcast_to(np.arange(self.sink), (b, self.sink)), newest], axis=1)
        position = np.where(position < lengths[:, None], position, -1)[:, None, None]  # [B, 1, 1, slots]
        query = (lengths[:, None] + np.arange(-n_q, 0))[:, None, :, None]  # [B, 1, n_q, 1]
        attends = (position >= 0) & (position <= query)
        return attends if left is None else attends & (position >= query - left)

    def _write(self, sequence: int, slots: np.ndarray, k: Tensor, v: Tensor) -> None:
        """Tokens `[1, H_kv, n, D]` of a sequence to these slots."""
        self.memory.put(np.array([sequence]), slots, k[0].transpose(0, 1), v[0].transpose(0, 1))

    def _slot(self, place: np.ndarray) -> np.ndarray:
        return self.sink + place % max(self.ring, 1)


def _joined(x: Tensor, rows: np.ndarray, source: np.ndarray, old: Tensor, waited: tuple[np.ndarray, ...]) -> Tensor:
    """Tokens `source` of these rows of `x` `[B, H, n, D]`, but `old` `[_, H, D]` at the places of those that waited:
    `[rows, H, M, D]`."""
    found = x[_at(rows[:, None], x), :, _at(np.clip(source, 0, x.shape[2] - 1), x)]  # [rows, M, H, D]
    found[tuple(_at(place, x) for place in waited)] = old
    return found.transpose(1, 2)


def _at(index: np.ndarray, x: Tensor) -> Tensor:
    return to_device(index, x.device)
