"""The only place that starts a CPU kernel that quantizes, bound to where codes go: a call says no more than what comes."""

import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokquant.kernels.cpu.launch import load, steps
from tokquant.kernels.cpu.plan import CpuPlan

AS_FLOATS = frozenset({"offset", "balance", "fold", "k_offset", "k_origin"})
"""What a kernel reads beside the tokens, as contiguous float32."""
OF_CALL = ("batch", "heads", "n", "threads", "x", "x_batch", "x_head", "x_row", "table", "pages", "page", "first")
"""What every call says anew: the arguments that a kernel's text has first."""


class Bound:
    """A kernel with everything filled in but the tokens. Calls of one must not run at the same time.

    Args:
        made: the kernel's plan.
        given: tensors by the names in its text, None where there is none.
            codes: Q `[B, H, N, bytes]`; K `[B, H, panels, words, 16]` and V `[B, H, tiles, panels, words, 16]` as
            `tokquant.blocks` says, contiguous from the third dimension on. With pages, the first dimension is pages.
            scale, zero: in the scale's type, `[B, H, rows, columns]`, 1 in place of a dimension that shares them. V per token
            has a minus sign where all codes are zero.
            offset `[B | 1, H, rows, D]`; balance `[B | 1, H, 1, D]`; fold, k_offset and k_origin `[B, H, 1, D]`.
            What it fills beside codes: logit_offset `[B, H, N, 1]`, and code_sum like that or, of V, for each tile
            `[B, H, tiles, D]` int32; met `[B, H, N, D]`.
        page: tokens of a page, a multiple of 16, of V's tile and of blocks that share a scale; 0 where there are none.
    """

    def __init__(self, made: CpuPlan, given: Mapping[str, Tensor | None], page: int = 0):
        self._function, names, self._pack = load(made)
        self._lost = ctypes.c_int32(0)
        kept = {name: x.float().contiguous() if name in AS_FLOATS else x for name, x in given.items() if x is not None}
        self._kept = kept  # what the kernel has pointers to
        values = {name: x.data_ptr() for name, x in kept.items()}
        values["lost"] = ctypes.addressof(self._lost)
        values["codes_page"], values["codes_head"] = steps(kept["codes"])
        if "scale" in kept:
            values["scale_page"], values["scale_head"] = steps(kept["scale"])
        if "offset" in kept:
            values["offset_batch"], values["offset_rows"] = steps(kept["offset"])[0], kept["offset"].shape[2]
        if "balance" in kept:
            values["balance_batch"] = steps(kept["balance"])[0]
        self._fixed = [values[name] for name in names[len(OF_CALL) :]]
        self._page = page

    def fills(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of these are what a call writes or reads, and no copies of it."""
        own = {x.data_ptr() for x in self._kept.values()}
        return all(x.data_ptr() in own for x in tensors)

    def __call__(self, x: Tensor, table: Tensor | None = None, first: Tensor | None = None) -> bool:
        """Quantize `x` `[B, H, N, D]`. Returns whether every type held its values; where not, the definition says which.

        With pages, `table` `[B, pages]` says which page holds the tokens from `page * i` on, and `first` `[B]` at which place
        the first new token of each sequence comes; both int32 and contiguous. Only what belongs to these tokens is written.
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        (batch, heads, n, _), (x_batch, x_head, x_row, _) = x.shape, x.stride()
        pages, table_at = (0, 0) if table is None else (table.shape[1], table.data_ptr())
        of_call = batch, heads, n, torch.get_num_threads(), x.data_ptr(), x_batch, x_head, x_row, table_at, pages, self._page
        self._lost.value = 0
        self._function(self._pack(*of_call, 0 if first is None else first.data_ptr(), *self._fixed))
        return not self._lost.value
