"""Storage for the 16-bit tokens of a KV cache, in numbered slots, and attention to them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.autocast import no_autocast
from tokquant.features import Features
from tokquant.reference import matmul_kept
from tokquant.transfer import to_device

SlotIndex = tuple[np.ndarray | int, ...]
"""Indices into the slot dimensions of K or of V."""


class Slots:
    """K and V of 16-bit tokens: `count` slots for each sequence of a batch. This class stores plain tensors, for torch.

    A subclass may store them as the kernels of its backend read them, and attend by these: `k` and `v` are then views
    `[B, H_kv, *slots, *channels]`, and `_slot_indices` maps the number of a slot to indices.
    """

    def __init__(self, batch: int, heads: int, count: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.batch, self.heads, self.count, self.head_dim = batch, heads, count, head_dim
        self.dtype, self.device = dtype, device
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            self.k, self.v = self._allocate()

    def _allocate(self) -> tuple[Tensor, Tensor]:
        both = torch.zeros(2, self.batch, self.heads, self.count, self.head_dim, dtype=self.dtype, device=self.device)
        return both[0], both[1]

    def _slot_indices(self, slots: np.ndarray | int) -> tuple[SlotIndex, SlotIndex]:
        """Indices of these slots in the slot dimensions of `k` and of `v`."""
        return (slots,), (slots,)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def get(self, sequences: np.ndarray, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """K and V `[..., H_kv, D]` at these sequences and slots, two index arrays that broadcast to `[...]`."""
        indices = self._indices(sequences, slots)
        selected = (x[index] for x, index in zip((self.k, self.v), indices, strict=True))
        k, v = (x.flatten(np.broadcast(sequences, slots).ndim + 1)[..., : self.head_dim] for x in selected)
        return k, v

    def put(self, sequences: np.ndarray | slice, slots: np.ndarray | int, k: Tensor, v: Tensor) -> None:
        """Write K and V `[n, H_kv, D]` of n tokens, to n slots or to the same slot of n sequences."""
        indices = self._indices(sequences, slots)
        for x, index, tokens in zip((self.k, self.v), indices, (k, v), strict=True):
            x[index] = tokens

    def _indices(self, sequences: np.ndarray | slice, slots: np.ndarray | int) -> list[Any]:
        """The indices of these sequences and slots in `k` and in `v`, on their device."""

        def on_device(x: Any) -> Any:
            return to_device(x, self.device) if isinstance(x, np.ndarray) else x

        return [(on_device(sequences), slice(None), *map(on_device, index)) for index in self._slot_indices(slots)]

    def fork(self, sequences: np.ndarray) -> "Slots":
        """A copy of the slots of these sequences."""
        forked = type(self)(len(sequences), self.heads, self.count, self.head_dim, self.dtype, self.device)
        rows = to_device(sequences, self.device)
        forked.k.copy_(self.k[rows])
        forked.v.copy_(self.v[rows])
        return forked

    def attention(
        self, q: Tensor, mask: np.ndarray, features: Features, onto: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of q `[B, H_q, n_q, D]` to slots: out `[B, H_q, n_q, D]` and natural LSE, float32.

        Args:
            mask: `[B, 1, n_q, slots]`, True where a query sees a slot. Other slots may hold anything, NaN included.
            features: only scale and softcap are used.
            onto: output and LSE of attention to other keys, which the result is merged with, perhaps in place.
        """
        return self.attention_in_torch(q, mask, features, onto)

    def attention_in_torch(
        self, q: Tensor, mask: np.ndarray, features: Features, onto: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`attention` in torch, in float32."""
        all_slots = np.arange(self.batch)[:, None], np.arange(self.count)[None]
        k, v = (x.transpose(1, 2).float() for x in self.get(*all_slots))
        grouped = q.float().reshape(q.shape[0], self.heads, -1, self.head_dim)
        with no_autocast(q.device):
            s = (grouped @ k.mT).reshape(*q.shape[:3], -1) * features.scale
            if features.softcap is not None:
                s = features.softcap * torch.tanh(s / features.softcap)
            s = torch.where(to_device(mask, q.device), s, -torch.inf)
            lse = s.logsumexp(dim=-1)
            p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
            out = matmul_kept(p.reshape(*grouped.shape[:3], -1), v).reshape(q.shape)
        return (out, lse) if onto is None else merge(onto, (out, lse))


def attention_to_nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of queries `[B, H, N, D]` that see no key, float32: zeros and -inf."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the outputs and natural LSEs of attention to disjoint sets of keys into those of attention to all."""
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(dim=0)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.stack([out * torch.exp(part_lse - finite)[..., None] for out, part_lse in parts]).sum(dim=0), lse
