"""Code that must not run under torch.autocast: it would multiply float32 in 16 bits, and cannot join other 16-bit types."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _available(device_type: str) -> bool:
    """Whether torch has an autocast for devices of this type."""
    return torch.amp.is_autocast_available(device_type)


# torch 2.11 cannot trace it; set as torch.compiler.assume_constant_result would, which imports the whole compiler
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context without torch.autocast: tensors are multiplied and joined in their own types."""
    return torch.autocast(device.type, enabled=False) if _available(device.type) else nullcontext()


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` in the tensors' own types, also under torch.autocast."""
    with no_autocast(parts[0].device):
        return torch.cat(tuple(parts), dim=dim)


def cast_by_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast Q, K and V as torch.autocast does for torch's attention: to its type, except float64; unchanged outside autocast.

    Replacements of torch's attention need this: under autocast a model's rotated Q and K are float32, while V, the output of
    a linear layer, is not.
    """
    device_type = tensors[0].device.type
    if not _available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
