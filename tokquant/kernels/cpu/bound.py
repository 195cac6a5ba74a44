"""Runs C++ kernels that quantize. A kernel is bound once to the memory of its outputs; a call passes only new tokens."""

import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tokquant.kernels.cpu.launch import load, steps
from tokquant.kernels.cpu.plan import CpuPlan

FLOAT_INPUTS = frozenset({"offset", "balance", "fold", "k_offset", "k_origin"})
"""Names of inputs beside the tokens, which are passed as contiguous float32."""
CALL_ARGUMENTS = ("batch", "heads", "n", "threads", "x", "x_batch", "x_head", "x_row", "table", "pages", "page", "first")
"""Names of the arguments that differ from call to call. They are the first ones in a kernel's text."""


class BoundKernel:
    """A kernel with all arguments but the tokens. It must not be called from two threads at the same time.

    Args:
        planned: the kernel's plan.
        tensors: inputs and outputs by their names in the kernel's text; None for those that the kernel does not have.
            codes: Q `[B, H, N, bytes]`; K `[B, H, panels, words, 16]` and V `[B, H, tiles, panels, words, 16]` in the layout
            of `tokquant.blocks`, contiguous from the third dimension on. With pages, the first dimension is pages.
            scale, zero: in the scale's type, `[B, H, rows, columns]`, with size 1 for dimensions that share scales. A V scale
            per token is negative where all codes are zero.
            Other inputs: offset `[B | 1, H, rows, D]`; balance `[B | 1, H, 1, D]`; fold, k_offset, k_origin `[B, H, 1, D]`.
            Other outputs: logit_offset `[B, H, N, 1]`; code_sum, of Q `[B, H, N, 1]`, of V `[B, H, tiles, D]` int32; met, Q
            as products read it, `[B, H, N, D]`.
        page: tokens of a page, a multiple of 16, of V's tile and of blocks that share a scale; 0 without pages.
    """

    def __init__(self, planned: CpuPlan, tensors: Mapping[str, Tensor | None], page: int = 0):
        self._function, names, self._pack = load(planned)
        self._lost = ctypes.c_int32(0)
        passed = {name: x.float().contiguous() if name in FLOAT_INPUTS else x for name, x in tensors.items() if x is not None}
        self._passed = passed  # the kernel has pointers to these
        values = {name: x.data_ptr() for name, x in passed.items()}
        values["lost"] = ctypes.addressof(self._lost)
        values["codes_page"], values["codes_head"] = steps(passed["codes"])
        if "scale" in passed:
            values["scale_page"], values["scale_head"] = steps(passed["scale"])
        if "offset" in passed:
            values["offset_batch"], values["offset_rows"] = steps(passed["offset"])[0], passed["offset"].shape[2]
        if "balance" in passed:
            values["balance_batch"] = steps(passed["balance"])[0]
        self._fixed = [values[name] for name in names[len(CALL_ARGUMENTS) :]]
        self._page = page

    def uses(self, tensors: Iterable[Tensor]) -> bool:
        """Whether calls read or write the memory of all these tensors, rather than copies."""
        addresses = {x.data_ptr() for x in self._passed.values()}
        return all(x.data_ptr() in addresses for x in tensors)

    def __call__(self, x: Tensor, table: Tensor | None = None, first: Tensor | None = None) -> bool:
        """Quantize `x` `[B, H, N, D]`. Returns False if a value overflowed its type; the quantization in torch then says which.

        With pages, `table` `[B, pages]` is the block table and `first` `[B]` the position of each sequence's first new token,
        both int32 and contiguous. Only the memory of these tokens is written.
        """
        if x.stride(3) != 1:
            x = x.contiguous()
        (batch, heads, n, _), (x_batch, x_head, x_row, _) = x.shape, x.stride()
        pages, address = (0, 0) if table is None else (table.shape[1], table.data_ptr())
        values = batch, heads, n, torch.get_num_threads(), x.data_ptr(), x_batch, x_head, x_row, address, pages, self._page
        self._lost.value = 0
        self._function(self._pack(*values, 0 if first is None else first.data_ptr(), *self._fixed))
        return not self._lost.value
