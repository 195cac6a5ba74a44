"""The 16-bit ends of a KV cache: the first tokens of each sequence, and the newest in a ring."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokquant.autocast import in_their_types
from tokquant.features import Features
from tokquant.reference import matmul_kept
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

    def __init__(
        self, shape: tuple[int, int, int], sink: int, recent: int, unit: int, dtype: torch.dtype, device: torch.device
    ):
        batch, heads, head_dim = shape
        self.sink, self.recent, self.unit, self.ring = sink, recent, unit, recent + unit - 1
        self.slots = sink + self.ring
        self.k = torch.zeros(batch, heads, self.slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * self.k.numel() * self.k.element_size()

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
        if (slots == slots[0]).all():
            at = slice(slots[0], slots[0] + 1)
            self.k[:, :, at], self.v[:, :, at] = k, v
        else:
            rows = np.arange(len(slots))
            self.put(k, v, (rows, np.zeros_like(rows), slots))

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
        slots = self._slot(packed[rows, None] + step)
        k, v = (_joined(*each, rows, slots, source) for each in ((self.k, k), (self.v, v)))
        return Split(moved, rows, k, v, kept)

    def put(self, k: Tensor, v: Tensor, kept: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Write the tokens that stay."""
        if len(kept[0]):
            rows, tokens, slots = (_at(each, k) for each in kept)
            self.k[rows, :, slots] = k[rows, :, tokens]
            self.v[rows, :, slots] = v[rows, :, tokens]

    def restore(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write tokens `[1, H_kv, n, D]` that follow `packed` ones, of those after the sink."""
        slots = _at(self._slot(packed + np.arange(k.shape[2])), k)
        self.k[sequence, :, slots], self.v[sequence, :, slots] = k[0], v[0]

    def fill(self, sequence: int, packed: int, k: Tensor, v: Tensor) -> None:
        """Write all that is here of a sequence, as `tokens` gives it."""
        first = min(self.sink, k.shape[2])
        self.k[sequence, :, :first], self.v[sequence, :, :first] = k[0, :, :first], v[0, :, :first]
        self.restore(sequence, packed, k[:, :, first:], v[:, :, first:])

    def tokens(self, sequence: int, length: int, packed: int) -> tuple[Tensor, Tensor]:
        """What is here of a sequence, in its order: K and V `[1, H_kv, n, D]`."""
        ends = np.arange(min(length, self.sink)), self._slot(np.arange(packed, max(length - self.sink, packed)))
        slots = _at(np.concatenate(ends), self.k)
        return self.k[sequence : sequence + 1, :, slots], self.v[sequence : sequence + 1, :, slots]

    def fork(self, sequences: np.ndarray) -> "Windows":
        """A copy of these sequences' windows."""
        forked = object.__new__(Windows)
        forked.__dict__.update(self.__dict__)
        rows = _at(sequences, self.k)
        with torch.inference_mode(False):  # as for a new cache
            forked.k, forked.v = self.k[rows], self.v[rows]
        return forked

    def attention(self, q: Tensor, lengths: np.ndarray, packed: np.ndarray, features: Features) -> tuple[Tensor, Tensor]:
        """Attention to what is here: out `[B, H_q, n_q, D]` and natural LSE, float32; query i is at `lengths - n_q + i`."""
        (b, heads, n_q, d), kv_heads = q.shape, self.k.shape[1]
        slot = np.arange(self.ring)
        newest = self.sink + packed[:, None] + (slot - packed[:, None]) % max(self.ring, 1)
        position = np.concatenate([np.broadcast_to(np.arange(self.sink), (b, self.sink)), newest], axis=1)
        position = np.where(position < lengths[:, None], position, -1)[:, None, None]  # [B, 1, 1, slots]
        query = (lengths[:, None] + np.arange(-n_q, 0))[:, None, :, None]  # [B, 1, n_q, 1]
        attends = (position >= 0) & (position <= query)
        left, _ = features.reach()
        if left is not None:
            attends &= position >= query - left

        grouped = q.float().reshape(b, kv_heads, -1, d)
        with in_their_types(q.device):
            s = (grouped @ self.k.float().mT).reshape(b, heads, n_q, -1) * features.scale
            if features.softcap is not None:
                s = features.softcap * torch.tanh(s / features.softcap)
            s = torch.where(_at(attends, q), s, -torch.inf)
            lse = s.logsumexp(dim=-1)
            p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
            kept = matmul_kept if q.device.type == "cpu" else _matmul_kept
            return kept(p.reshape(b, kv_heads, -1, self.slots), self.v.float()).reshape(q.shape), lse

    def _slot(self, place: np.ndarray) -> np.ndarray:
        return self.sink + place % max(self.ring, 1)


def _matmul_kept(p: Tensor, v: Tensor) -> Tensor:
    """`reference.matmul_kept`, which waits for a device to say whether anything is not finite, without waiting."""
    finite = v.isfinite()
    product, reached = (p @ torch.cat([torch.where(finite, v, 0.0), (~finite).to(v.dtype)], dim=-1)).chunk(2, dim=-1)
    return torch.where(reached > 0, float("nan"), product)


def _joined(window: Tensor, x: Tensor, rows: np.ndarray, slots: np.ndarray, source: np.ndarray) -> Tensor:
    """Tokens `source` of these rows of `x` `[B, H, n, D]`, and where that is below 0 the window's slots: `[rows, H, M, D]`."""
    found = x[_at(rows[:, None], x), :, _at(np.clip(source, 0, x.shape[2] - 1), x)]  # [rows, M, H, D]
    row, step = np.nonzero(source < 0)
    if len(row):
        found[_at(row, x), _at(step, x)] = window[_at(rows[row], x), :, _at(slots[row, step], x)]
    return found.transpose(1, 2)


def _at(index: np.ndarray, x: Tensor) -> Tensor:
    return to_device(index, x.device)
