"""Tokens in 16 bits, in numbered slots beside the pages of a KV cache: where they lie, and attention to them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.autocast import in_their_types
from tokquant.features import Features
from tokquant.reference import matmul_kept
from tokquant.transfer import to_device

Place = tuple[np.ndarray | int, ...]


class Slots:
    """K and V of the tokens in the slots of each sequence, as kernels of a backend read them. Here, for torch: as they come.

    A backend lays out `k` and `v` as views `[B, H_kv, *slots, *channels]`, where `_places` finds the slots, and may attend by
    its own kernels.
    """

    def __init__(self, batch: int, heads: int, count: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.batch, self.heads, self.count, self.head_dim = batch, heads, count, head_dim
        self.dtype, self.device = dtype, device
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            self.k, self.v = self._room()

    def _room(self) -> tuple[Tensor, Tensor]:
        made = torch.zeros(2, self.batch, self.heads, self.count, self.head_dim, dtype=self.dtype, device=self.device)
        return made[0], made[1]

    def _places(self, slots: np.ndarray | int) -> tuple[Place, Place]:
        """Where these slots are in the dimensions of K's and of V's."""
        return (slots,), (slots,)

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def get(self, sequences: np.ndarray, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """K and V `[..., H_kv, D]` of these slots of these sequences `[...]`, as arrays broadcast."""
        at = self._at(sequences, slots)
        found = (x[index] for x, index in zip((self.k, self.v), at, strict=True))
        k, v = (x.flatten(np.broadcast(sequences, slots).ndim + 1)[..., : self.head_dim] for x in found)
        return k, v

    def put(self, sequences: np.ndarray | slice, slots: np.ndarray | int, k: Tensor, v: Tensor) -> None:
        """Write K and V `[n, H_kv, D]` to n slots, or to one slot of every sequence."""
        at = self._at(sequences, slots)
        for x, index, tokens in zip((self.k, self.v), at, (k, v), strict=True):
            x[index] = tokens

    def _at(self, sequences: np.ndarray | slice, slots: np.ndarray | int) -> list[Any]:
        """What indexes `k` and `v`."""

        def there(x: Any) -> Any:
            return to_device(x, self.device) if isinstance(x, np.ndarray) else x

        return [(there(sequences), slice(None), *map(there, place)) for place in self._places(slots)]

    def fork(self, sequences: np.ndarray) -> "Slots":
        """A copy of these sequences' slots."""
        forked = type(self)(len(sequences), self.heads, self.count, self.head_dim, self.dtype, self.device)
        rows = to_device(sequences, self.device)
        forked.k.copy_(self.k[rows])
        forked.v.copy_(self.v[rows])
        return forked

    def attention(
        self, q: Tensor, attends: np.ndarray, features: Features, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of q `[B, H_q, n_q, D]` to the slots that it `attends` to `[B, 1, n_q, slots]`, merged with that to other
        keys, which came `before`: out `[B, H_q, n_q, D]` and natural LSE, float32, perhaps in the memory of those.

        What is in other slots reaches nothing, even if it is not a number. Of the features, scale and softcap.
        """
        return self.define(q, attends, features, before)

    def define(
        self, q: Tensor, attends: np.ndarray, features: Features, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same in torch, in float32."""
        every = np.arange(self.batch)[:, None], np.arange(self.count)[None]
        k, v = (x.transpose(1, 2).float() for x in self.get(*every))
        grouped = q.float().reshape(q.shape[0], self.heads, -1, self.head_dim)
        with in_their_types(q.device):
            s = (grouped @ k.mT).reshape(*q.shape[:3], -1) * features.scale
            if features.softcap is not None:
                s = features.softcap * torch.tanh(s / features.softcap)
            s = torch.where(to_device(attends, q.device), s, -torch.inf)
            lse = s.logsumexp(dim=-1)
            p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
            out = matmul_kept(p.reshape(*grouped.shape[:3], -1), v).reshape(q.shape)
        return (out, lse) if before is None else merged(before, (out, lse))


def nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, H, N, D]` to no keys, float32: its output and its LSE."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)


def merged(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to all keys, of output and natural LSE of that to parts of them."""
    lse = torch.stack([each for _, each in parts]).logsumexp(dim=0)
    total = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.stack([out * torch.exp(each - total)[..., None] for out, each in parts]).sum(dim=0), lse
