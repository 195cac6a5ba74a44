"""What is counted on the CPU, for kernels of a GPU to read: no copy waits, and none is frozen in a CUDA graph."""

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import UnsupportedError


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """`x` where the device reads it; on a CPU the same memory.

    Raises UnsupportedError while a CUDA graph is captured, which would read that memory again at each replay.
    """
    refuse_capture(device, "lengths and places, which are counted on the CPU,")
    if device.type == "cpu":
        return torch.from_numpy(x)
    if device.type != "cuda":
        return torch.from_numpy(x).to(device)
    # from pageable memory a copy waits for all that the GPU has to do; pinned memory torch keeps until it is read
    return torch.from_numpy(np.ascontiguousarray(x)).pin_memory().to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise UnsupportedError where a CUDA graph is being captured, for `what` would be the same at every replay."""
    if capturing(device):
        raise UnsupportedError(f"{what} would be the same at every replay of a CUDA graph; leave this call out of the graph")
