"""The 16-bit tokens of a KV cache, in panels, and attention to them by a C++ kernel."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokquant.blocks import LANES
from tokquant.features import Features
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.launch import feature_arguments, run
from tokquant.kernels.cpu.plan import plan
from tokquant.kernels.slots import unquantized
from tokquant.kernels.wanted import Wanted
from tokquant.slots import SlotIndex, Slots, attention_to_nothing


class CpuSlots(Slots):
    """Slots in the panels of `tokquant.blocks`; P is float32.

    `k` is a view `[B, H_kv, panels, 16, words, channels of a word]`, `v` a view
    `[B, H_kv, tiles, words, tokens of a word, panels, 16]`.
    """

    def _allocate(self) -> tuple[Tensor, Tensor]:
        self.scheme = unquantized(self.dtype, p="fp32")
        first, d, in_word, tile = (self.batch, self.heads), self.head_dim, 4 // self.dtype.itemsize, self.scheme.key_tile
        k = torch.zeros(*first, -(-self.count // LANES), -(-d // in_word), LANES, in_word, dtype=self.dtype, device="cpu")
        v = torch.zeros(
            *first, -(-self.count // tile), -(-d // LANES), tile // in_word, LANES, in_word, dtype=self.dtype, device="cpu"
        )
        return k.permute(0, 1, 2, 4, 3, 5), v.permute(0, 1, 2, 4, 6, 3, 5)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """NumPy views: of `k` with one element per word, of `v` with one per value."""
        return _bits(self.k).view(np.int32)[..., 0], _bits(self.v)

    def put(self, sequences: np.ndarray | slice, slots: np.ndarray | int, k: Tensor, v: Tensor) -> None:
        # NumPy finds the places of a few tokens several times as fast as torch
        (keys, values), (k_index, v_index) = self._arrays, self._slot_indices(slots)
        words = _bits(_padded(k, self.k.shape[4:].numel()))
        keys[sequences, :, *k_index] = np.ascontiguousarray(words).view(np.int32)
        panels = self.v.shape[5:]
        values[sequences, :, *v_index] = _bits(_padded(v, panels.numel())).reshape(*v.shape[:2], *panels)

    def _slot_indices(self, slots: np.ndarray | int) -> tuple[SlotIndex, SlotIndex]:
        (words, in_word), tile = self.v.shape[3:5], self.scheme.key_tile
        return (slots // LANES, slots % LANES), (slots // tile, slots // in_word % words, slots % in_word)

    def attention(
        self, q: Tensor, mask: np.ndarray, features: Features, onto: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = onto or attention_to_nothing(q)
        masked = replace(features, causal=False, window=None, mask=torch.from_numpy(mask))
        wanted = replace(Wanted.of(masked, True), beside=True)
        planned = plan(self.scheme, head_dim=self.head_dim, dtype=self.dtype, wanted=wanted, instructions=build.instructions())
        words = 4 // self.dtype.itemsize
        (b, heads, n_q, _), kv_heads = q.shape, self.heads
        run(planned, feature_arguments(masked) | dict(
            batch=b, heads=heads, kv_heads=kv_heads, n_q=n_q, n_k=self.count, threads=torch.get_num_threads(),
            scale=features.scale, softcap=features.softcap, table=None, pages=0, page=0, lengths=None, newer=None,
            q=q.float().contiguous(), out=out, lse=lse,
            k=self.k, k_page=self.k.stride(0) // words, k_head=self.k.stride(1) // words,
            v=self.v, v_page=self.v.stride(0) // words, v_head=self.v.stride(1) // words,
        ))  # fmt: skip
        return out, lse


def _padded(tokens: Tensor, channels: int) -> Tensor:
    """Tokens `[n, H_kv, D]`, with zeros up to this number of channels."""
    missing = channels - tokens.shape[2]
    return torch.nn.functional.pad(tokens, (0, missing)) if missing else tokens


def _bits(x: Tensor) -> np.ndarray:
    """A NumPy view of the bits as integers, because NumPy has no bfloat16."""
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).numpy()
