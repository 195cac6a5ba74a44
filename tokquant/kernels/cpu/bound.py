"""The only place that starts a CPU kernel that quantizes, bound to where codes go: a call says no more than what comes."""

import ctypes
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.launch import load
from tokquant.kernels.cpu.quantize_plan import Task, plan
from tokquant.kernels.launch import steps

READ = ("offset", "balance", "fold", "k_offset", "k_origin")
"""What a kernel reads beside the tokens, as contiguous float32."""


class Bound:
    """A kernel with everything filled in but the tokens. Calls of one must not run at the same time.

    Args:
        task: what the kernel does; `lacking` has nothing against it.
        codes: Q `[B, H, N, bytes]`; K `[B, H, panels, words, 16]` and V `[B, H, tiles, panels, words, 16]` as `tokquant.blocks`
            says, contiguous from the third dimension on. With pages, the first dimension is pages.
        scale, zero: in the scale's type, `[B, H, rows, columns]`, 1 in place of a dimension that shares them. V per token has
            a minus sign where all codes are zero.
        page: tokens of a page, a multiple of 16, of V's tile and of blocks that share a scale; 0 where there are none.
        more: other tensors that the kernel's text names: `offset [B | 1, H, rows, D]`; `balance [B | 1, H, 1, D]`; `fold`,
            `k_offset` and `k_origin [B, H, 1, D]`; and what it fills: `logit_offset [B, H, N, 1]`, and `code_sum` like that
            or, of V, for each tile `[B, H, tiles, D]` int32.
    """

    def __init__(
        self,
        task: Task,
        codes: Tensor,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        *,
        page: int = 0,
        more: Mapping[str, Tensor | None] = MappingProxyType({}),
    ):
        self._function, arguments = load(plan(task, build.instructions()))
        self._lost = ctypes.c_int32(0)
        given = {"codes": codes, "scale": scale, "zero": zero, **more}
        kept = {name: x.float().contiguous() if name in READ else x for name, x in given.items() if x is not None}
        self._kept = kept  # what the kernel has pointers to
        values = {name: x.data_ptr() for name, x in kept.items()}
        values |= {"codes_page": codes.stride(0), "codes_head": codes.stride(1), "page": page}
        if scale is not None:
            values |= dict(zip(("scale_page", "scale_head"), steps(scale), strict=False))
        if (offset := kept.get("offset")) is not None:
            values |= {"offset_batch": steps(offset)[0], "offset_rows": offset.shape[2]}
        if (balance := kept.get("balance")) is not None:
            values["balance_batch"] = steps(balance)[0]
        values["lost"] = ctypes.addressof(self._lost)
        self._arguments = arguments(**{name: value for name, value in values.items() if name in arguments.names})
        self._reference = ctypes.byref(self._arguments)

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
        a = self._arguments
        a.batch, a.heads, a.n, _ = x.shape
        a.x_batch, a.x_head, a.x_row, _ = x.stride()
        a.x = x.data_ptr()
        a.threads = torch.get_num_threads()
        self._lost.value = 0
        if table is not None:
            a.table, a.pages = table.data_ptr(), table.shape[1]
        if first is not None:
            a.first = first.data_ptr()
        self._function(self._reference)
        return not self._lost.value
