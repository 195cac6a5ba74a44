"""The store of pages for Triton kernels, which quantize tokens into pages and attend to the codes where they are."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokquant.errors import UnsupportedError
from tokquant.features import Features
from tokquant.kernels import launch, quantize_task, targets, tuned
from tokquant.kernels.decode_launch import Call, keys_seen
from tokquant.kernels.decode_plan import DecodePlan, check_pages, decode_plan, eight_bits
from tokquant.kernels.page_layout import FEW, PackedPages
from tokquant.kernels.quantize import quantize_queries
from tokquant.kernels.slots import TritonSlots
from tokquant.kernels.triton.operands import Table
from tokquant.kernels.wanted import PLAIN, Wanted
from tokquant.pages import Store
from tokquant.schemes import Operand
from tokquant.transfer import capturing


class TritonPages(Store[PackedPages]):
    """A store whose pages are written and read by Triton kernels.

    Raises SchemeError for a scheme that depends on later tokens, UnsupportedError for one that no kernel supports.
    """

    replayable = True
    slots = TritonSlots

    def _begin(self) -> None:
        if not launch.available(self.device):
            raise UnsupportedError(
                f"backend: 'triton' needs a GPU, and the cache is on {self.device}; use another device, set TRITON_INTERPRET=1 "
                "before Python starts, or use backend='reference'"
            )
        check_pages(self.scheme, self.page)
        self.interpreted, self._target = launch.interpreted(), targets.of(self.device)
        self._tokens_last = eight_bits(self._plan(PLAIN, 1))  # raises for what no kernel supports
        for spec in (self.scheme.k, self.scheme.v):
            if lacking := quantize_task.lacking(spec, self.head_dim, None if self.interpreted else self._target):
                raise UnsupportedError(f"{lacking}; use backend='reference'")
        self._lost = torch.zeros(1, dtype=torch.int32, device=self.device)  # set to 1 by kernels if a scale overflows its type

    def _part(self, spec: Operand, pages: int) -> PackedPages:
        return PackedPages(spec, self, pages, tokens_last=spec.role == "v" and self._tokens_last)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        """As `Store.write`. On a GPU, writes of up to 16 tokens or in a graph do not raise; `check` or a larger write does."""
        with launch.on(k.device):
            paged = Table(table, table.stride(0), first, counts)
            checked = [part.write(x, paged, self._lost) for part, x in ((self._k, k), (self._v, v))]
        if any(checked) and (k.device.type != "cuda" or k.shape[2] > FEW) and not capturing(k.device):
            self.check()

    def check(self) -> None:
        if bool(self._lost):
            self._lost.zero_()
            kinds = " and ".join(f"{x.role}'s {x.scale_dtype}" for x in (self.scheme.k, self.scheme.v) if x.scaled)
            raise ValueError(f"a value that was appended is too large for scale_dtype, {kinds}; use scale_dtype: fp32")

    def attention(self, q: Tensor, table: Tensor, lengths: Tensor, features: Features, **options: Any) -> tuple[Tensor, Tensor]:
        """As `Store.attention`. Where `longest` is None, it is the number of tokens that a row of the table has pages for.

        `deterministic` splits keys the same way on every device and in every batch, and ignores tuning.

        Raises UnsupportedError for a mask, a bias or sinks.
        """
        return self.prepare(q, table, lengths, features, **options).run()

    def prepare(
        self,
        q: Tensor,
        table: Tensor,
        lengths: Tensor,
        features: Features,
        *,
        offset: Tensor | None = None,
        longest: int | None = None,
        deterministic: bool = False,
    ) -> Call:
        """Prepare the launch of `attention`, with its arguments. Raises as that."""
        launch.check(q.device, features)
        if features.mask is not None or features.bias is not None:
            raise UnsupportedError("mask, bias: kernels that read pages take neither; use causal and window")
        if features.sinks is not None:
            raise UnsupportedError(
                "sinks: kernels that read pages take none; use tokquant.decode, which applies them to the result"
            )
        b, heads, n_q, _ = q.shape
        wanted, arguments = Wanted.of(features, True), launch.arguments_of(features)
        longest = table.shape[1] * self.page if longest is None else longest
        planned = partial(self._plan, wanted, heads // self.kv_heads, n_q, newer=offset is not None)
        # tuning entries for any number of runs have the name of the kernel for one, as one run becomes several while keys grow
        plan = planned(one_run=True)
        seen = keys_seen(longest, n_q, arguments.left)
        config, split = (plan.config, None) if deterministic else tuned.choose(plan, q.device, b * heads, n_q, seen)
        return Call(
            planned=planned,
            config=config,
            split=split,
            scheme=self.scheme,
            target=self._target,
            wanted=wanted,
            q=quantize_queries(q, self._k.shared(b), self.scheme, self.scales),
            k=self._k.argument(),
            v=self._v.argument(),
            table=Table(table, table.stride(0), lengths, newer=offset),
            features=arguments,
            scale=features.scale,
            longest=longest,
        )

    def _plan(
        self, wanted: Wanted, shared_heads: int, n_q: int = 1, *, newer: bool = False, one_run: bool = True
    ) -> DecodePlan:
        plan = decode_plan(
            self.scheme,
            head_dim=self.head_dim,
            dtype=self.dtype,
            page=self.page,
            shared_heads=shared_heads,
            wanted=wanted,
            rows=64 if n_q * shared_heads > 32 else 32 if n_q * shared_heads > 16 else 16,
            one_run=one_run,
            newer=newer,
            interpreted=self.interpreted,
            target=self._target,
        )
        launch.check_products(plan)
        return plan
