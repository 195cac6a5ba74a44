"""Memory as a kernel sees it: the tensors that it is given and nothing else, and the shared memory of a block."""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch

Array = np.ndarray


RESERVED = 1024
"""Bytes of shared memory that a GPU from compute capability 8.0 keeps for the system: a kernel's own begin behind them."""


class OutOfBounds(Exception):
    """An access outside of all allocations, or at an address that is not a multiple of its size."""


class Memory:
    """Pieces of memory by their addresses."""

    def __init__(self, pieces: Iterable[tuple[int, Array]]):
        """From pairs of an address and the bytes there, which may not overlap."""
        self.pieces = sorted(pieces, key=lambda piece: piece[0])
        self.starts = np.array([start for start, _ in self.pieces], np.uint64)

    def load(self, addresses: Array, size: int, wanted: Array) -> Array:
        """`[threads, size]` bytes; zeros for threads that want none."""
        found = np.zeros((len(addresses), size), np.uint8)
        for threads, held, places in self._held(addresses, size, wanted):
            found[threads] = held[places]
        return found

    def store(self, addresses: Array, data: Array, wanted: Array) -> None:
        """Write `[threads, size]` bytes."""
        for threads, held, places in self._held(addresses, data.shape[1], wanted):
            held[places] = data[threads]

    def _held(self, addresses: Array, size: int, wanted: Array):
        """For each piece: which threads want some of it, its bytes, and where these lie."""
        addresses = addresses.astype(np.uint64)
        threads = np.flatnonzero(wanted)
        if (addresses[threads] % size).any():
            raise OutOfBounds(f"{size} bytes at {[hex(each) for each in addresses[threads] if each % size][:4]}: not aligned")
        piece = np.searchsorted(self.starts, addresses[threads], "right").astype(np.int64) - 1
        for each in np.unique(piece):
            those = threads[piece == each]
            start, held = self.pieces[each] if each >= 0 else (0, np.empty(0, np.uint8))
            offsets = (addresses[those] - np.uint64(start)).astype(np.int64)
            if (offsets + size > len(held)).any():
                beyond = int((offsets + size).max()) - len(held)
                raise OutOfBounds(f"{size} bytes, of which {beyond} lie beyond {len(held)} at {start:#x}")
            yield those, held, offsets[:, None] + np.arange(size)


def of_tensors(tensors: Iterable[torch.Tensor]) -> Memory:
    """The memory of these tensors, and nothing between them."""
    spans = []
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return Memory((start, np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))) for start, end in joined)
