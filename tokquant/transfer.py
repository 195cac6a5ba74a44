"""Copies small arrays from the CPU to a GPU without waiting, and refuses to in a CUDA graph, which would repeat old values."""

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import UnsupportedError


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """`x` as a tensor on the device; on a CPU it shares memory with `x`.

    Raises UnsupportedError while a CUDA graph is captured, because every replay would copy from the same memory.
    """
    refuse_capture(device, "lengths and places, which are counted on the CPU,")
    if device.type == "cpu":
        return torch.from_numpy(x)
    if device.type != "cuda":
        return torch.from_numpy(x).to(device)
    # a copy from pageable memory would wait for the GPU's queue; torch keeps pinned memory until the copy is done
    return torch.from_numpy(np.ascontiguousarray(x)).pin_memory().to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is capturing a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise UnsupportedError during the capture of a CUDA graph, in which `what` would be the same at every replay."""
    if capturing(device):
        raise UnsupportedError(f"{what} would be the same at every replay of a CUDA graph; leave this call out of the graph")
