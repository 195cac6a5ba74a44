"""The 16-bit tokens of a KV cache, in the panels that a C++ kernel attends to."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokquant.blocks import LANES
from tokquant.features import Features
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.launch import of_features, start
from tokquant.kernels.cpu.plan import plan
from tokquant.kernels.slots import of_type
from tokquant.kernels.wanted import Wanted
from tokquant.slots import Place, Slots, nothing


class CpuSlots(Slots):
    """Slots in panels, as `tokquant.blocks` says: views `[B, H_kv, panels, 16, words, tokens' channels in a word]` of K, and
    `[B, H_kv, tiles, words, tokens in a word, panels, 16]` of V. P is float32."""

    def _room(self) -> tuple[Tensor, Tensor]:
        self.scheme = of_type(self.dtype, p="fp32")
        first, d, each, tile = (self.batch, self.heads), self.head_dim, 4 // self.dtype.itemsize, self.scheme.key_tile
        k = torch.zeros(*first, -(-self.count // LANES), -(-d // each), LANES, each, dtype=self.dtype, device="cpu")
        v = torch.zeros(
            *first, -(-self.count // tile), -(-d // LANES), tile // each, LANES, each, dtype=self.dtype, device="cpu"
        )
        return k.permute(0, 1, 2, 4, 3, 5), v.permute(0, 1, 2, 4, 6, 3, 5)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`k`, a word an element, and `v` as NumPy sees them."""
        return _bits(self.k).view(np.int32)[..., 0], _bits(self.v)

    def put(self, sequences: np.ndarray | slice, slots: np.ndarray | int, k: Tensor, v: Tensor) -> None:
        # NumPy finds the places of a few tokens several times as fast as torch
        (keys, values), (at_k, at_v) = self._arrays, self._places(slots)
        words = _bits(_padded(k, self.k.shape[4:].numel()))
        keys[sequences, :, *at_k] = np.ascontiguousarray(words).view(np.int32)
        panels = self.v.shape[5:]
        values[sequences, :, *at_v] = _bits(_padded(v, panels.numel())).reshape(*v.shape[:2], *panels)

    def _places(self, slots: np.ndarray | int) -> tuple[Place, Place]:
        (words, each), tile = self.v.shape[3:5], self.scheme.key_tile
        return (slots // LANES, slots % LANES), (slots // tile, slots // each % words, slots % each)

    def attention(
        self, q: Tensor, attends: np.ndarray, features: Features, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = before or nothing(q)
        seen = replace(features, causal=False, window=None, mask=torch.from_numpy(attends))
        wanted = replace(Wanted.of(seen, True), beside=True)
        made = plan(self.scheme, head_dim=self.head_dim, dtype=self.dtype, wanted=wanted, instructions=build.instructions())
        words = 4 // self.dtype.itemsize
        (b, heads, n_q, _), kv_heads = q.shape, self.heads
        start(made, of_features(seen) | dict(
            batch=b, heads=heads, kv_heads=kv_heads, n_q=n_q, n_k=self.count, threads=torch.get_num_threads(),
            scale=features.scale, softcap=features.softcap, table=None, pages=0, page=0, lengths=None, newer=None,
            q=q.float().contiguous(), out=out, lse=lse,
            k=self.k, k_page=self.k.stride(0) // words, k_head=self.k.stride(1) // words,
            v=self.v, v_page=self.v.stride(0) // words, v_head=self.v.stride(1) // words,
        ))  # fmt: skip
        return out, lse


def _padded(tokens: Tensor, channels: int) -> Tensor:
    """Tokens `[n, H_kv, D]` with so many channels."""
    more = channels - tokens.shape[2]
    return torch.nn.functional.pad(tokens, (0, more)) if more else tokens


def _bits(x: Tensor) -> np.ndarray:
    """The same memory: NumPy has no bfloat16."""
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).numpy()
