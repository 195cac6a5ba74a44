"""Where torch's autocast is kept out: it would multiply float32 in 16 bits, and joins no 16-bit type other than its own."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_their_types(device: torch.device) -> AbstractContextManager:
    """A block in which tensors are multiplied and joined as they are."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` of tensors as they are."""
    with in_their_types(parts[0].device):
        return torch.cat(tuple(parts), dim=dim)
