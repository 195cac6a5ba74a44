"""Pages of a KV cache for C++ kernels: codes in panels, written and read where they lie."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokquant import blocks
from tokquant.errors import UnsupportedError
from tokquant.features import Features
from tokquant.kernels.cpu import build, quantize_plan
from tokquant.kernels.cpu.bound import Bound
from tokquant.kernels.cpu.launch import laid_out, of_channels, of_scales, start
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
    """Pages in panels, as `tokquant.blocks` says, each page with panels of its own."""

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
        self._last: dict[Any, tuple[Bound, CpuPlan, dict[str, Any]]] = {}
        """The last kernels that ran, that of Q and that of attention: steps of decoding differ in nothing but tensors."""

    def _part(self, spec: Operand, pages: int) -> "_Panels":
        return _Panels(spec, self, pages)

    def grow(self, pages: int) -> None:
        self._last.clear()
        super().grow(pages)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        for panels, x in ((self._k, k), (self._v, v)):
            if counts is None:
                panels.write(x, table, first)
            else:
                for b, n in enumerate(counts.tolist()):
                    if n:
                        panels.write(x[b : b + 1, :, :n], table[b : b + 1], first[b : b + 1])

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
        """As `Store.attention`; results depend neither on threads nor on the batch."""
        if not (features.mask is None and features.bias is None and features.sinks is None):
            raise UnsupportedError(
                "mask, bias, sinks: kernels of a cache have none; use window, or tokquant.attention on tensors"
            )
        left, right = features.reach()
        if q.shape[2] == 1 and right == 0:
            right = None  # nothing is later than the last query
        out, lse = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in (q.shape, q.shape[:3]))
        n_k = int(lengths.max()) if longest is None else longest
        given: dict[str, Any] = dict(
            n_k=n_k, threads=torch.get_num_threads(), out=out, lse=lse, table=table, pages=table.shape[1], lengths=lengths,
            newer=offset, left=left, right=right, scale=features.scale, softcap=features.softcap,
        )  # fmt: skip
        asked = (q.shape, left is None, right is None, features.softcap is None, build.instructions())
        if asked in self._last:
            bind, made, fixed = self._last[asked]
            if bind(q):
                start(made, fixed | given)
                return out, lse
        (b, heads, n_q, d), kv_heads = q.shape, self._k.shape[1]
        kq = self._k.any_token(b)
        qq, bound = queries(q, frame_of_queries(q, kq, kq.frame), kq, self.scheme, self.scales)
        fields = laid_out(qq, self.scheme)
        fixed = fields | self._k.fields | self._v.fields | self._v.of_sequences(b)
        fixed |= dict(batch=b, heads=heads, kv_heads=kv_heads, n_q=n_q, page=self.page)
        wanted = Wanted(left=left is not None, right=right is not None, softcap=features.softcap is not None, lse=True)
        made = plan(self.scheme, head_dim=d, dtype=q.dtype, wanted=wanted, instructions=asked[-1])
        start(made, fixed | given)
        if bound is not None and bound.fills(x for x in fields.values() if isinstance(x, Tensor)):
            self._last = {asked: (bound, made, fixed)}
        return out, lse


class _Panels(Part):
    """`codes`, K's `[pages, H_kv, panels, words, 16]`, V's with tiles before the panels; and scales and zeros as
    `tokquant.pages.part_sizes` says. V's scales are below zero for tokens whose codes all are zero."""

    def __init__(self, spec: Operand, store: Store, pages: int):
        super().__init__(spec, store, pages)
        self.as_bytes = as_bytes(self.scheme, spec.role)
        self.bits = blocks.bits_of(spec.format, spec.format.of(self.dtype).stored, self.as_bytes)
        self.weighted = spec.role == "v" and place(spec) == "p"
        self.parts = {}
        self.grow(pages)

    def grow(self, pages: int) -> None:
        self.shape = torch.Size((pages, *self.shape[1:]))
        found = part_sizes(self.spec, self.shape, self.dtype)
        _, heads, page, d = self.shape
        words, panels = 32 // self.bits, -(-d // blocks.LANES)
        if self.spec.role == "k":
            codes = (page // blocks.LANES, -(-d // words), blocks.LANES)
        else:
            codes = (page // self.scheme.key_tile, panels, self.scheme.key_tile // words, blocks.LANES)  # type: ignore[assignment]
        found["codes"] = ((pages, heads, *codes), torch.int32)
        for name, (size, kind) in found.items():
            # the pages of a head one after another: those of a sequence mostly are neighbours, which memory likes
            size = (size[1], size[0], *size[2:])
            larger = (
                torch.zeros(size, dtype=torch.uint8 if kind.itemsize == 1 else kind, device="cpu").view(kind).transpose(0, 1)
            )
            if name in self.parts:
                old = self.parts[name]
                indexable(larger)[: len(old)] = indexable(old)
            self.parts[name] = larger
        for name in ("bound", "fields"):
            self.__dict__.pop(name, None)  # what has pointers to the old ones

    @cached_property
    def given(self) -> dict[str, Tensor]:
        """Scales and zeros that are the same for every token."""
        if self.spec.scale != "static" or self.scales is None:
            return {}
        like = torch.empty(1, device="cpu").expand(1, self.shape[1], 1, self.shape[3])
        found = {"scale": self.scales.scale(self.spec, like), "zero": self.scales.zero(self.spec, like)}
        return {name: x.contiguous() for name, x in found.items() if x is not None}

    @cached_property
    def bound(self) -> Bound | None:
        """The kernel that writes tokens here; None where the definition has to quantize them."""
        task = task_of(self.scheme, self.spec.role, self.shape[3], self.dtype, self.frame.steps(), paged=True)
        if task is None:
            return None
        given = {**self.parts, **self.given, "offset": self.frame.offset, "balance": self.frame.balance}
        return Bound(quantize_plan.plan(task, build.instructions()), given, self.shape[2])

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What an attention kernel reads here, by the names in its text."""
        role, codes, scales = self.spec.role, self.parts["codes"], self.parts | self.given
        found: dict[str, Any] = {role: codes, f"{role}_page": codes.stride(0), f"{role}_head": codes.stride(1)}
        return found | (of_scales(role, scales["scale"], scales.get("zero")) if "scale" in scales else {})

    def of_sequences(self, batch: int) -> dict[str, Any]:
        """What an attention kernel reads of V for each of so many sequences."""
        like = self.any_token(batch)
        found = {} if like.offset is None else {"v_mean": of_channels(like, like.offset)}
        if place(self.spec) == "output":
            found |= {"v_scale": of_channels(like, like.scale)}  # type: ignore[arg-type]
            found |= {} if like.origin is None else {"v_zero": of_channels(like, like.origin)}
        return found

    def any_token(self, batch: int) -> QuantizedTensor:
        """A token of each of so many sequences, for what does not change from token to token."""
        return self.operand({"codes": torch.empty(1, device="cpu").expand(batch, self.shape[1], 1, self.shape[3])}, 1, batch)

    def write(self, x: Tensor, table: Tensor, first: Tensor) -> None:
        if self.bound is not None and self.bound(x, table, first):
            return
        # the definition says what does not fit, or does what no kernel does
        coded = in_frame(x, self.frame, self.spec, self.scales)
        for b in range(len(x)):
            parts = {name: part[b : b + 1] for name, part in stored_parts(coded).items()}
            place = first[b] + torch.arange(x.shape[2])
            self.put(table[b, place // self.shape[2]], place % self.shape[2], self.operand(parts, x.shape[2]))

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        touched, inside = page.unique_consecutive(), int(slot[0])
        whole = self._patterns(touched)
        codes = x.spec.format.unpack(x.codes, x.shape[3])
        whole[:, inside : inside + x.shape[2]] = blocks.patterns(codes, x.spec.format, self.bits, self.as_bytes, x.spec.role)[0]
        by_page = whole.unflatten(1, (-1, self.shape[2])).transpose(0, 1)  # [pages, H_kv, page, D]
        if x.spec.role == "k":
            self.parts["codes"][touched] = blocks.of_keys(by_page, self.bits)
        else:
            self.parts["codes"][touched] = blocks.of_values(by_page, self.bits, self.scheme.key_tile)
        for name, part in stored_parts(x).items():
            if name == "codes":
                continue
            if name == "scale" and self.weighted:
                nothing = (x.code_values() == 0).all(dim=-1, keepdim=True)
                part = torch.where(nothing, -part.float(), part.float()).to(part.dtype)
            rows = self.parts[name]
            tokens = self.shape[2] // rows.shape[2]
            indexable(rows)[page[::tokens], :, slot[::tokens] // tokens] = indexable(part)[0].transpose(0, 1)

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        found = {}
        for name, part in self.parts.items():
            if name != "codes":
                rows = -(-tokens * part.shape[2] // self.shape[2])
                found[name] = indexable(part)[pages].transpose(0, 1).flatten(1, 2)[None, :, :rows].view(part.dtype)
        if self.weighted:
            found["scale"] = found["scale"].float().abs().to(found["scale"].dtype)
        words = self.parts["codes"][pages].transpose(0, 1).flatten(1, 2)[None]
        x = self.operand({"codes": words, **found}, tokens)
        return replace(x, codes=canonical(replace(x, layout="blocks")).codes)

    def _patterns(self, pages: Tensor) -> Tensor:
        """`[H_kv, tokens, D]` of whole pages."""
        words = self.parts["codes"][pages].transpose(0, 1).flatten(1, 2)
        back = blocks.keys_of if self.spec.role == "k" else blocks.values_of
        return back(words[None], self.bits, len(pages) * self.shape[2], self.shape[3])[0].contiguous()
