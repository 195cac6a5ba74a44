"""The features of an attention call (mask, window, softcap, bias ...), and which pairs of query and key they let attend."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokquant.bias import Bias


@dataclass(frozen=True, kw_only=True)
class Features:
    """The arguments of `attention` other than the operands, checked and with defaults filled in."""

    scale: float
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: Tensor | None = None
    """`[B, H_q, N_q, N_k]`, boolean (True = attend) or additive."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """`[H_q]`, in natural logarithms."""
    bias: Bias | None = None
    """In natural logarithms, added after the softcap."""

    def kept(self, rows: slice, keys: slice, n_q: int, n_k: int, device: torch.device) -> Tensor | None:
        """Boolean mask of the pairs that attend, broadcastable to `[B, H_q, rows, keys]`; None if all of them do."""
        kept = None
        if self.causal or self.window:
            # bottom-right: the last query sees the last key
            i = torch.arange(rows.start, rows.stop, device=device)[:, None] + (n_k - n_q)
            j = torch.arange(keys.start, keys.stop, device=device)[None, :]
            left, right = self.reach()
            kept = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=device)
            if left is not None:
                kept &= j >= i - left
            if right is not None:
                kept &= j <= i + right
            kept = None if bool(kept.all()) else kept
        if self.mask is not None and self.mask.dtype == torch.bool:
            mask = self.mask[:, :, rows, keys]
            kept = mask if kept is None else kept & mask
        return kept

    def spans(self, rows: slice, n_q: int, n_k: int, tile: int) -> Iterator[slice]:
        """The key tiles that some of these rows can see under causality and window."""
        left, right = self.reach()
        first = 0 if left is None else max(0, rows.start + n_k - n_q - left)
        last = n_k if right is None else min(n_k, rows.stop + n_k - n_q + right)
        for start in range(first // tile * tile, last, tile):
            yield slice(start, min(start + tile, n_k))

    def of_heads(self, heads: slice) -> "Features":
        """The features for a slice of Q's heads."""
        return replace(
            self,
            mask=None if self.mask is None else self.mask[:, heads],
            sinks=None if self.sinks is None else self.sinks[heads],
            bias=None if self.bias is None else self.bias.of_heads(heads),
        )

    def reach(self) -> tuple[int | None, int | None]:
        """How many keys a query sees before and after its own position; None where there is no limit."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0
        return left, right
