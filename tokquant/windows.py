"""The 16-bit windows of a KV cache: the first tokens of each sequence, and the newest in a ring."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokquant.slots import Slots
from tokquant.transfer import to_device


@dataclass(frozen=True)
class Split:
    """Where an append puts tokens: those to pack now go to pages, the other new ones into slots."""

    newly_packed: np.ndarray
    """Tokens of each sequence to pack now `[B]`: the oldest in its ring, then new ones."""
    rows: np.ndarray
    """The sequences with tokens to pack."""
    k: Tensor
    """These tokens `[rows, H_kv, n, D]` in order, where n is the largest of `newly_packed`."""
    v: Tensor
    kept: tuple[np.ndarray, np.ndarray, np.ndarray]
    """For each new token that stays in 16 bits: its sequence, its index among the new ones, its slot."""


class Windows:
    """K and V of the first `sink` tokens of each sequence, and of the newest ones, which are not packed yet.

    The first `sink` slots hold the sink, the others are a ring: token t after the sink is in slot `sink + t % ring`. The oldest
    tokens of the ring are packed `unit` at a time, as soon as `recent` newer ones remain.

    `packed` counts the packed tokens of each sequence, `lengths` all its tokens, sink included.
    """

    def __init__(self, sink: int, recent: int, unit: int, make_slots: Callable[[int], Slots]):
        self.sink, self.recent, self.unit, self.ring = sink, recent, unit, recent + unit - 1
        self.slot_count = sink + self.ring
        self.slots = make_slots(self.slot_count)

    def bypassed(self, lengths: np.ndarray) -> bool:
        """Whether every sequence packs new tokens at once: there is no ring, and the sinks are full."""
        return not self.ring and bool((lengths >= self.sink).all())

    def room_left(self, lengths: np.ndarray, packed: np.ndarray) -> int:
        """Tokens that every sequence can append to its ring before some must be packed; 0 while a sink is not full."""
        waiting = lengths - self.sink - packed
        return int((self.ring - waiting).min()) if (lengths >= self.sink).all() else 0

    def push(self, k: Tensor, v: Tensor, lengths: np.ndarray) -> None:
        """Append one token `[B, H_kv, 1, D]` to every ring. All must have room."""
        slots = self._slot(lengths - self.sink)
        k, v = k[:, :, 0], v[:, :, 0]
        if (slots == slots[0]).all():
            self.slots.put(slice(None), int(slots[0]), k, v)
        else:
            self.slots.put(np.arange(len(slots)), slots, k, v)

    def split(self, k: Tensor, v: Tensor, lengths: np.ndarray, packed: np.ndarray, counts: np.ndarray) -> Split:
        """Decide where the first `counts[b]` of these new tokens `[B, H_kv, n, D]` of sequence b go."""
        sink = self.sink
        end = np.maximum(lengths + counts - sink, 0)  # number of tokens after the sink
        waiting = end - packed
        newly_packed = np.where(waiting >= self.recent + self.unit, (waiting - self.recent) // self.unit * self.unit, 0)

        token = lengths[:, None] + np.arange(k.shape[2])
        place = token - sink  # among the tokens after the sink
        stays = (token < (lengths + counts)[:, None]) & ((place < 0) | (place >= (packed + newly_packed)[:, None]))
        rows, tokens = np.nonzero(stays)
        slots = np.where(token < sink, token, self._slot(place))[rows, tokens]
        kept = (rows, tokens, slots)

        rows, step = np.nonzero(newly_packed)[0], np.arange(newly_packed.max())
        source = (packed + sink - lengths)[rows, None] + step  # index among the new tokens; negative for tokens in the ring
        if not len(rows):
            return Split(newly_packed, rows, k[:0, :, :0], v[:0, :, :0], kept)
        if len(rows) == len(newly_packed) and source[0, 0] >= 0 and (source[:, 0] == source[0, 0]).all():
            new = slice(source[0, 0], source[0, 0] + len(step))
            return Split(newly_packed, rows, k[:, :, new], v[:, :, new], kept)
        in_ring = np.nonzero(source < 0)
        old = self.slots.get(rows[in_ring[0]], self._slot(packed[rows[in_ring[0]]] + in_ring[1]))
        k, v = (_joined(x, rows, source, tokens, in_ring) for x, tokens in zip((k, v), old, strict=True))
        return Split(newly_packed, rows, k, v, kept)

    def put(self, k: Tensor, v: Tensor, kept: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Write the tokens that stay in 16 bits, given `Split.kept`."""
        if len(kept[0]):
            rows, tokens, slots = kept
            index = to_device(rows, k.device), slice(None), to_device(tokens, k.device)
            self.slots.put(rows, slots, k[index], v[index])

    def restore(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write tokens `[1, H_kv, n, D]` of a sequence to its ring, after its first `packed` packed ones."""
        self._write(sequence, self._slot(packed + np.arange(k.shape[2])), k, v)

    def fill(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write all 16-bit tokens `[1, H_kv, n, D]` of a sequence, in the order of `tokens`."""
        first = min(self.sink, k.shape[2])
        self._write(sequence, np.arange(first), k[:, :, :first], v[:, :, :first])
        self.restore(sequence, packed, k[:, :, first:], v[:, :, first:])

    def tokens(self, sequence: int, length: int, packed: int) -> tuple[Tensor, Tensor]:
        """K and V `[1, H_kv, n, D]` of a sequence's 16-bit tokens, the oldest first."""
        ends = np.arange(min(length, self.sink)), self._slot(np.arange(packed, max(length - self.sink, packed)))
        k, v = self.slots.get(np.array([sequence]), np.concatenate(ends))
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def fork(self, sequences: np.ndarray) -> "Windows":
        """A copy of these sequences' windows."""
        forked = object.__new__(Windows)
        forked.__dict__.update(self.__dict__)
        forked.slots = self.slots.fork(sequences)
        return forked

    def mask(self, lengths: np.ndarray, packed: np.ndarray, n_q: int, left: int | None) -> np.ndarray:
        """`[B, 1, n_q, slots]`, True where a query sees a slot: its own token and `left` before it, or all where None.

        Query i is at position `lengths - n_q + i`.
        """
        b, slot = len(lengths), np.arange(self.ring)
        newest = self.sink + packed[:, None] + (slot - packed[:, None]) % max(self.ring, 1)
        position = np.concatenate([np.broadcast_to(np.arange(self.sink), (b, self.sink)), newest], axis=1)
        position = np.where(position < lengths[:, None], position, -1)[:, None, None]  # [B, 1, 1, slots]; -1 in empty slots
        query = (lengths[:, None] + np.arange(-n_q, 0))[:, None, :, None]  # [B, 1, n_q, 1]
        causal = (position >= 0) & (position <= query)
        return causal if left is None else causal & (position >= query - left)

    def _write(self, sequence: int, slots: np.ndarray, k: Tensor, v: Tensor) -> None:
        """Write tokens `[1, H_kv, n, D]` of a sequence to these slots."""
        self.slots.put(np.array([sequence]), slots, k[0].transpose(0, 1), v[0].transpose(0, 1))

    def _slot(self, place: np.ndarray) -> np.ndarray:
        return self.sink + place % max(self.ring, 1)


def _joined(x: Tensor, rows: np.ndarray, source: np.ndarray, old: Tensor, in_ring: tuple[np.ndarray, ...]) -> Tensor:
    """The tokens to pack `[rows, H, M, D]`: `old` `[_, H, D]`, from the ring, at the places `in_ring`; else tokens `source`
    `[rows, M]` of the new ones `x` `[B, H, n, D]`."""
    tokens = x[_index(rows[:, None], x), :, _index(np.clip(source, 0, x.shape[2] - 1), x)]  # [rows, M, H, D]
    tokens[tuple(_index(place, x) for place in in_ring)] = old
    return tokens.transpose(1, 2)


def _index(positions: np.ndarray, x: Tensor) -> Tensor:
    return to_device(positions, x.device)
