"""Memory of a kernel: the tensors that it gets as arguments, or the shared memory of a block."""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch

Array = np.ndarray


RESERVED = 1024
"""Bytes of shared memory that GPUs from compute capability 8.0 on reserve for the system; the kernel's part follows them."""


class OutOfBounds(Exception):
    """An access outside of all allocations, or at an address that is not a multiple of its size."""


class Memory:
    """Allocations, by address. An access must lie in one of them and be aligned."""

    def __init__(self, pieces: Iterable[tuple[int, Array]]):
        """`pieces` are allocations, which may not overlap: pairs of an address and the bytes there."""
        self.pieces = sorted(pieces, key=lambda piece: piece[0])
        self.starts = np.array([start for start, _ in self.pieces], np.uint64)

    def load(self, addresses: Array, size: int, wanted: Array) -> Array:
        """Read `[threads, size]` bytes; zeros for threads where `wanted` is false."""
        data = np.zeros((len(addresses), size), np.uint8)
        for threads, piece_bytes, offsets in self._accesses(addresses, size, wanted):
            data[threads] = piece_bytes[offsets]
        return data

    def store(self, addresses: Array, data: Array, wanted: Array) -> None:
        """Write `[threads, size]` bytes, for threads where `wanted` is true."""
        for threads, piece_bytes, offsets in self._accesses(addresses, data.shape[1], wanted):
            piece_bytes[offsets] = data[threads]

    def _accesses(self, addresses: Array, size: int, wanted: Array):
        """For each allocation that is accessed: the indices of the threads, its bytes, and the threads' offsets into them."""
        addresses = addresses.astype(np.uint64)
        threads = np.flatnonzero(wanted)
        if (addresses[threads] % size).any():
            raise OutOfBounds(f"{size} bytes at {[hex(each) for each in addresses[threads] if each % size][:4]}: not aligned")
        piece = np.searchsorted(self.starts, addresses[threads], "right").astype(np.int64) - 1
        for each in np.unique(piece):
            piece_threads = threads[piece == each]
            start, piece_bytes = self.pieces[each] if each >= 0 else (0, np.empty(0, np.uint8))
            offsets = (addresses[piece_threads] - np.uint64(start)).astype(np.int64)
            if (offsets + size > len(piece_bytes)).any():
                beyond = int((offsets + size).max()) - len(piece_bytes)
                raise OutOfBounds(f"{size} bytes, of which {beyond} lie beyond {len(piece_bytes)} at {start:#x}")
            yield piece_threads, piece_bytes, offsets[:, None] + np.arange(size)


def of_tensors(tensors: Iterable[torch.Tensor]) -> Memory:
    """The memory of these tensors. The gaps between them are out of bounds."""
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
