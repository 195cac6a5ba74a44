"""Where torch's autocast is kept out: it would multiply float32 in 16 bits, and joins no 16-bit type other than its own."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _available(kind: str) -> bool:
    """Whether torch has an autocast for devices of this kind."""
    return torch.amp.is_autocast_available(kind)


# torch 2.11 cannot trace it; as torch.compiler.assume_constant_result would, which imports the whole compiler
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_their_types(device: torch.device) -> AbstractContextManager:
    """A block in which tensors are multiplied and joined as they are."""
    return torch.autocast(device.type, enabled=False) if _available(device.type) else nullcontext()


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` of tensors as they are."""
    with in_their_types(parts[0].device):
        return torch.cat(tuple(parts), dim=dim)


def as_torch_takes_them(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Q, K and V as torch's own attention takes them: within torch.autocast in its type, but for float64; else as they are.

    For what stands in its place: within autocast a model's rotated Q and K are float32 and V, of a product, is not.
    """
    kind = tensors[0].device.type
    if not _available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    to = torch.get_autocast_dtype(kind)
    return tuple(x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
