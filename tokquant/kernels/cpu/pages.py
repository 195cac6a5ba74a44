"""The store of pages for C++ kernels, which quantize tokens into panels and attend to the codes where they are."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tokquant import blocks
from tokquant.errors import UnsupportedError
from tokquant.features import Features
from tokquant.kernels.cpu import build, quantize_plan
from tokquant.kernels.cpu.bound import BoundKernel
from tokquant.kernels.cpu.launch import operand_arguments, per_channel, run, scale_arguments
from tokquant.kernels.cpu.plan import CpuPlan, plan
from tokquant.kernels.cpu.quantize import queries
from tokquant.kernels.cpu.quantize_plan import task_of
from tokquant.kernels.cpu.slots import CpuSlots
from tokquant.kernels.wanted import Wanted
from tokquant.pages import Part, Store, indexable, part_sizes, stored_parts
from tokquant.quantize import frame_of_queries, in_frame
from tokquant.schemes import Operand
from tokquant.schemes.placement import as_bytes, place
from tokquant.tensor import QuantizedTensor, canonical


class CpuPages(Store["_Panels"]):
    """Pages in the panels of `tokquant.blocks`; no panel spans two pages."""

    slots = CpuSlots

    def _begin(self) -> None:
        scheme, page = self.scheme, self.page
        if self.device.type != "cpu":
            raise UnsupportedError(
                f"backend: 'cpu' keeps pages in memory, not on {self.device}; use device='cpu' or 'reference'"
            )
        if page % scheme.key_tile:
            raise UnsupportedError(
                f"cache.page: {page} tokens are no whole tiles of {scheme.key_tile} keys, which P of scheme {scheme.name!r} "
                f"has its scales for; use page: {scheme.key_tile} or backend='reference'"
            )
        self._last_step: dict[Any, tuple[Callable[[Tensor], bool], CpuPlan, dict[str, Any]]] = {}
        """By shape and features of the last call: what prepares Q where the kernel reads it, and returns whether it could; the
        kernel's plan; and the arguments that do not change."""

    def _part(self, spec: Operand, pages: int) -> "_Panels":
        return _Panels(spec, self, pages)

    def grow(self, pages: int) -> None:
        self._last_step.clear()
        super().grow(pages)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        for part, x in ((self._k, k), (self._v, v)):
            if counts is None:
                part.write(x, table, first)
            else:
                for b, n in enumerate(counts.tolist()):
                    if n:
                        part.write(x[b : b + 1, :, :n], table[b : b + 1], first[b : b + 1])

    def attention(
        self,
        q: Tensor,
        table: Tensor,
        lengths: Tensor,
        features: Features,
        *,
        offset: Tensor | None = None,
        longest: int | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `Store.attention`. Results never depend on the number of threads or on the batch."""
        if not (features.mask is None and features.bias is None and features.sinks is None):
            raise UnsupportedError(
                "mask, bias, sinks: kernels that read pages take none; use window, or tokquant.attention on tensors"
            )
        left, right = features.reach()
        if q.shape[2] == 1 and right == 0:
            right = None  # no key is after the last query
        out, lse = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in (q.shape, q.shape[:3]))
        n_k = int(lengths.max()) if longest is None else longest
        changing: dict[str, Any] = dict(
            n_k=n_k, threads=torch.get_num_threads(), out=out, lse=lse, table=table, pages=table.shape[1], lengths=lengths,
            newer=offset, left=left, right=right, scale=features.scale, softcap=features.softcap,
        )  # fmt: skip
        key = (q.shape, left is None, right is None, features.softcap is None, build.instructions())
        if key in self._last_step:
            prepare_q, planned, fixed = self._last_step[key]
            if prepare_q(q):
                run(planned, fixed | changing)
                return out, lse
        (b, heads, n_q, d), kv_heads = q.shape, self._k.shape[1]
        kq = self._k.any_token(b)
        qq, bound = queries(q, frame_of_queries(q, kq, kq.frame), kq, self.scheme, self.scales)
        of_q = operand_arguments(qq, self.scheme)
        fixed = of_q | self._k.arguments | self._v.arguments | self._v.sequence_arguments(b)
        fixed |= dict(batch=b, heads=heads, kv_heads=kv_heads, n_q=n_q, page=self.page)
        wanted = Wanted(left=left is not None, right=right is not None, softcap=features.softcap is not None, lse=True)
        planned = plan(self.scheme, head_dim=d, dtype=q.dtype, wanted=wanted, instructions=key[-1])
        run(planned, fixed | changing)
        if bound is not None and bound.uses(x for x in of_q.values() if isinstance(x, Tensor)):
            self._last_step = {key: (bound, planned, fixed)}
        elif qq.codes.data_ptr() == q.data_ptr() and qq.dtype != torch.float32:  # as it is, which the kernel reads in float32
            self._last_step = {key: (partial(_copied, of_q["q"]), planned, fixed)}  # type: ignore[arg-type]
        return out, lse


class _Panels(Part):
    """Pages of K or V in panels.

    Codes of K are `[pages, H_kv, panels, words, 16]`, those of V `[pages, H_kv, tiles, panels, words, 16]`. Scales and zeros
    have the shapes of `tokquant.pages.part_sizes`. V scales per token are negative where all codes are zero.
    """

    def __init__(self, spec: Operand, store: Store, pages: int):
        super().__init__(spec, store, pages)
        self.as_bytes = as_bytes(self.scheme, spec.role)
        self.bits = blocks.bits_of(spec.format, spec.format.of(self.dtype).stored, self.as_bytes)
        self.weighted = spec.role == "v" and place(spec) == "p"
        self.parts = {}
        self.grow(pages)

    def grow(self, pages: int) -> None:
        self.shape = torch.Size((pages, *self.shape[1:]))
        sizes = part_sizes(self.spec, self.shape, self.dtype)
        _, heads, page, d = self.shape
        in_word, panels = 32 // self.bits, -(-d // blocks.LANES)
        if self.spec.role == "k":
            codes = (page // blocks.LANES, -(-d // in_word), blocks.LANES)
        else:
            codes = (page // self.scheme.key_tile, panels, self.scheme.key_tile // in_word, blocks.LANES)  # type: ignore[assignment]
        sizes["codes"] = ((pages, heads, *codes), torch.int32)
        for name, (size, kind) in sizes.items():
            # heads outermost: the pages of a sequence are mostly consecutive, so reading those of a head is sequential
            size = (size[1], size[0], *size[2:])
            larger = (
                torch.zeros(size, dtype=torch.uint8 if kind.itemsize == 1 else kind, device="cpu").view(kind).transpose(0, 1)
            )
            if name in self.parts:
                old = self.parts[name]
                indexable(larger)[: len(old)] = indexable(old)
            self.parts[name] = larger
        for name in ("append_kernel", "arguments"):
            self.__dict__.pop(name, None)  # cached properties that have pointers to the old tensors

    @cached_property
    def static_scales(self) -> dict[str, Tensor]:
        """Static scales and zeros; empty where they are dynamic."""
        if self.spec.scale != "static" or self.scales is None:
            return {}
        like = torch.empty(1, device="cpu").expand(1, self.shape[1], 1, self.shape[3])
        static = {"scale": self.scales.scale(self.spec, like), "zero": self.scales.zero(self.spec, like)}
        return {name: x.contiguous() for name, x in static.items() if x is not None}

    @cached_property
    def append_kernel(self) -> BoundKernel | None:
        """The kernel that quantizes tokens into these pages; None where torch has to."""
        task = task_of(self.scheme, self.spec.role, self.shape[3], self.dtype, self.frame.steps(), paged=True)
        if task is None:
            return None
        tensors = {**self.parts, **self.static_scales, "offset": self.frame.offset, "balance": self.frame.balance}
        return BoundKernel(quantize_plan.plan(task, build.instructions()), tensors, self.shape[2])

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of an attention kernel that are these pages."""
        role, codes, scales = self.spec.role, self.parts["codes"], self.parts | self.static_scales
        arguments: dict[str, Any] = {role: codes, f"{role}_page": codes.stride(0), f"{role}_head": codes.stride(1)}
        return arguments | (scale_arguments(role, scales["scale"], scales.get("zero")) if "scale" in scales else {})

    def sequence_arguments(self, batch: int) -> dict[str, Any]:
        """The arguments of an attention kernel that V has per sequence: its offset, and scales and zeros of the output."""
        like = self.any_token(batch)
        arguments = {} if like.offset is None else {"v_mean": per_channel(like, like.offset)}
        if place(self.spec) == "output":
            arguments |= {"v_scale": per_channel(like, like.scale)}  # type: ignore[arg-type]
            arguments |= {} if like.origin is None else {"v_zero": per_channel(like, like.origin)}
        return arguments

    def any_token(self, batch: int) -> QuantizedTensor:
        """One uninitialized token for each of `batch` sequences, for what all tokens share."""
        return self.operand({"codes": torch.empty(1, device="cpu").expand(batch, self.shape[1], 1, self.shape[3])}, 1, batch)

    def write(self, x: Tensor, table: Tensor, first: Tensor) -> None:
        if self.append_kernel is not None and self.append_kernel(x, table, first):
            return
        # torch raises for a value that overflows its type, and quantizes what no kernel can
        coded = in_frame(x, self.frame, self.spec, self.scales)
        for b in range(len(x)):
            parts = {name: part[b : b + 1] for name, part in stored_parts(coded).items()}
            position = first[b] + torch.arange(x.shape[2], device="cpu")
            self.put(table[b, position // self.shape[2]], position % self.shape[2], self.operand(parts, x.shape[2]))

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        pages, start = page.unique_consecutive(), int(slot[0])
        whole = self._patterns(pages)
        codes = x.spec.format.unpack(x.codes, x.shape[3])
        whole[:, start : start + x.shape[2]] = blocks.patterns(codes, x.spec.format, self.bits, self.as_bytes, x.spec.role)[0]
        by_page = whole.unflatten(1, (-1, self.shape[2])).transpose(0, 1)  # [pages, H_kv, page, D]
        if x.spec.role == "k":
            self.parts["codes"][pages] = blocks.of_keys(by_page, self.bits)
        else:
            self.parts["codes"][pages] = blocks.of_values(by_page, self.bits, self.scheme.key_tile)
        for name, part in stored_parts(x).items():
            if name == "codes":
                continue
            if name == "scale" and self.weighted:
                all_zero = (x.code_values() == 0).all(dim=-1, keepdim=True)
                part = torch.where(all_zero, -part.float(), part.float()).to(part.dtype)
            rows = self.parts[name]
            tokens = self.shape[2] // rows.shape[2]
            indexable(rows)[page[::tokens], :, slot[::tokens] // tokens] = indexable(part)[0].transpose(0, 1)

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        parts = {}
        for name, part in self.parts.items():
            if name != "codes":
                rows = -(-tokens * part.shape[2] // self.shape[2])
                parts[name] = indexable(part)[pages].transpose(0, 1).flatten(1, 2)[None, :, :rows].view(part.dtype)
        if self.weighted:
            parts["scale"] = parts["scale"].float().abs().to(parts["scale"].dtype)
        words = self.parts["codes"][pages].transpose(0, 1).flatten(1, 2)[None]
        x = self.operand({"codes": words, **parts}, tokens)
        return replace(x, codes=canonical(replace(x, layout="blocks")).codes)

    def _patterns(self, pages: Tensor) -> Tensor:
        """The bit patterns `[H_kv, tokens, D]` of these pages' codes, as `blocks.patterns` makes them."""
        words = self.parts["codes"][pages].transpose(0, 1).flatten(1, 2)
        unpack = blocks.keys_of if self.spec.role == "k" else blocks.values_of
        return unpack(words[None], self.bits, len(pages) * self.shape[2], self.shape[3])[0].contiguous()


def _copied(to: Tensor, q: Tensor) -> bool:
    to.copy_(q)
    return True
