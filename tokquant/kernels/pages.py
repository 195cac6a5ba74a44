"""Keys and values in pages, kept and read by Triton kernels: no copy of them is ever decoded in memory.

A page holds for each head, contiguously,

    codes   [page, W]: K's, and V's where P V is a product of 16 bits; W stored elements hold a token's channels
            [W, page]: V's for a product of 8 bits, tokens permuted in groups of 16 so that P keeps its registers
    sides   [rows, 1 or 2, columns]: scales, and zeros behind them, rows and columns as the granularity says

so that a token is appended without touching another, and takes the bits that the scheme says. The scale of a token of V whose
codes are all zero is kept below zero: its weight in P is next to nothing (see `quantize.log2_weight`).
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError
from tokquant.kernels import generate, launch, quantize_plan, targets
from tokquant.kernels.decode_plan import DecodePlan, check_pages, decode_plan, eight_bits, sides_shape
from tokquant.kernels.plan import WHOLE, Wanted
from tokquant.kernels.quantize import quantize_queries
from tokquant.kernels.quantize_plan import Task
from tokquant.kernels.triton.merge import merge
from tokquant.kernels.triton.operands import Coded, Pages, Source, Table, Turned
from tokquant.pages import operand
from tokquant.quantize import with_sums
from tokquant.reference import Features
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.placement import place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor

RUN = 512
"""Keys that a program takes where results must depend on nothing but the sequence."""

SHORTEST = 256
"""Keys that are worth a program of their own."""

FEW = 16
"""New tokens for which small programs are launched, and nobody waits to see whether their scales fit."""


class TritonPages:
    """A store of pages for `tokquant.KVCache`, as `tokquant.pages.Store` says; kernels of `scheme` write and read them.

    Args:
        kv_heads, head_dim, dtype: of the tensors that are written.
        pages, page: how many, and tokens of each.
        scales: of the layer, for a scheme with static parts.

    Raises SchemeError for a scheme that sees later tokens, UnsupportedError for what no kernel does.
    """

    def __init__(
        self,
        scheme: QuantScheme,
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pages: int,
        page: int,
        scales: LayerScales | None = None,
    ):
        if not launch.available(device):
            raise UnsupportedError(
                f"backend: 'triton' needs a GPU, and the cache is on {device}; use another device, set TRITON_INTERPRET=1 "
                "before Python starts, or use backend='reference'"
            )
        check_pages(scheme, page)
        self.scheme, self.scales, self.page = scheme, scales, page
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self._target = None if launch.interpreted() else targets.of(device)
        plan = self._plan(Wanted(), 1)  # which refuses what no kernel does
        self._k = _Pool(scheme.k, self, device, pages, tokens_last=False)
        self._v = _Pool(scheme.v, self, device, pages, tokens_last=eight_bits(plan))
        for pool in (self._k, self._v):
            if lacking := quantize_plan.lacking(pool.spec, head_dim, self._target):
                raise UnsupportedError(f"{lacking}; use backend='reference'")
        self._lost = torch.zeros(1, dtype=torch.int32, device=device)

    def grow(self, pages: int) -> None:
        """A pool of so many pages, contents kept."""
        for pool in (self._k, self._v):
            pool.grow(pages)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        """Quantize k and v `[B, H_kv, n, D]` of any strides, and write `counts[b]` tokens (n where None) from `first[b]`.

        Where a scheme has blocks, both are multiples of them. Raises ValueError where a scale does not fit; on a GPU, for up
        to 16 tokens, only once `check` or a larger write looks.
        """
        with _on(k.device):
            for pool, x in ((self._k, k), (self._v, v)):
                pool.write(x, Table(table, table.stride(0), first, counts), self._lost)
        if k.device.type != "cuda" or k.shape[2] > FEW:
            self.check()

    def check(self) -> None:
        """Wait for what was written, and raise ValueError where a scale or a zero did not fit its type."""
        if bool(self._lost):
            self._lost.zero_()
            kinds = " and ".join(f"{x.role}'s {x.scale_dtype}" for x in (self.scheme.k, self.scheme.v) if x.scaled)
            raise ValueError(f"a value that was appended is too large for scale_dtype, {kinds}; use scale_dtype: fp32")

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
        """Attention of q `[B, H_q, n_q, D]` to `lengths[b]` packed keys: out `[B, H_q, n_q, D]` and natural LSE, float32.

        Query i stands at key `lengths + offset - n_q + i`, offset being how many newer keys lie elsewhere (0 where None).

        Args:
            longest: no length is above it; what all pages of the table hold where None. It saves programs with nothing to do.
            deterministic: bits depend on nothing but the sequence: keys are split alike on every device and in every batch.

        Raises UnsupportedError for a mask or bias.
        """
        launch.check(q.device, features)
        if features.mask is not None or features.bias is not None:
            raise UnsupportedError("mask, bias: no kernel reads them beside pages; use causal and window")
        b, heads, n_q, _ = q.shape
        shared = heads // self.kv_heads
        wanted, given = launch.asked(features, True)
        longest = table.shape[1] * self.page if longest is None else longest
        made = self._plan(wanted, shared, n_q, newer=offset is not None)
        blocks = -(-n_q * shared // made.config.block_m)
        run = _run(longest, b * self.kv_heads * blocks, made.config.block_n, self._target or targets.DEFAULT, deterministic)
        runs = max(1, -(-longest // run))
        if runs > 1:
            made = self._plan(wanted, shared, n_q, newer=offset is not None, one_run=False)
        qq = quantize_queries(q, self._k.shared(b), self.scheme, self.scales)
        parts = torch.empty(runs, *q.shape, dtype=torch.float32, device=q.device)
        lses = torch.empty(runs, *q.shape[:3], dtype=torch.float32, device=q.device)
        arguments = (
            launch.operand(qq),
            self._k.argument(),
            self._v.argument(),
            Table(table, table.stride(0), lengths, newer=offset),
            parts,
            lses,
            given,
            features.scale,
            n_q,
            run,
            made.config.block_m,
            made.config.block_n,
        )
        with _on(q.device):
            generate.load(made)[(blocks * runs, self.kv_heads, b)](*arguments, **made.config.options())
            return (parts[0], lses[0]) if runs == 1 else merged(parts, lses, given.sinks)

    def read(self, table_row: Tensor, tokens: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V of a sequence's first tokens `[1, H_kv, tokens, D]`, in the canonical layout."""
        pages = table_row[: -(-tokens // self.page)]
        return self._k.get(pages, tokens), with_sums(self._v.get(pages, tokens), self.scheme)

    def store(self, table_row: Tensor, first: int, k: QuantizedTensor, v: QuantizedTensor) -> None:
        """Write canonical codes `[1, H_kv, n, D]` from token `first`, which blocks divide."""
        token = torch.arange(first, first + k.shape[2], device=table_row.device)
        for pool, x in ((self._k, k), (self._v, v)):
            pool.put(table_row[token // self.page], token % self.page, x)

    def copy(self, source: int, target: int) -> None:
        """One page's contents to another."""
        for pool in (self._k, self._v):
            for part in pool.growing():
                part[target] = part[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(part.numel() * part.element_size() for pool in (self._k, self._v) for part in pool.growing())

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros for a value of a page that is full."""
        pages = self._k.codes.shape[0]
        return 8 * self.nbytes / (2 * pages * self.kv_heads * self.page * self.head_dim)

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
            interpreted=self._target is None,
            target=self._target or targets.DEFAULT,
        )
        if self._target is None and "tl.bfloat16" in plan.products:
            raise UnsupportedError(
                "dtype: Triton's interpreter multiplies bf16 wrongly; use float16 or float32, or backend='reference'"
            )
        return plan


def merged(parts: Tensor, lses: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over all keys, of that over runs of them: parts `[runs, B, H, n_q, D]` and natural LSEs, float32.

    sinks: `[H]`, natural logits that take their part of the softmax once.
    """
    runs, b, heads, n_q, d = parts.shape
    out, lse = torch.empty_like(parts[0]), torch.empty_like(lses[0])
    rows = b * heads * n_q
    sizes = dict(D=d, D_TILE=1 << (d - 1).bit_length(), SINKS=sinks is not None, BLOCK=16)
    merge[(rows,)](
        parts, lses, sinks, out, lse, runs, rows, n_q, heads, **sizes, num_warps=4, num_stages=2, enable_fp_fusion=True
    )
    return out, lse


def _run(longest: int, programs: int, tile: int, target: targets.Target, deterministic: bool) -> int:
    """Keys of a program: whole tiles, so few that a GPU has several programs for each multiprocessor."""
    if deterministic:
        return max(RUN, tile)
    runs = max(1, min(-(-4 * target.multiprocessors // programs), longest // max(SHORTEST, tile)))
    return max(1, -(-longest // (runs * tile))) * tile


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Pool:
    """Pages of K or of V. One-byte floats are kept as bytes, which torch can index."""

    def __init__(self, spec: Operand, store: TritonPages, device: torch.device, pages: int, *, tokens_last: bool):
        self.spec, self.tokens_last, self._store = spec, tokens_last, store
        heads, d, page = store.kv_heads, store.head_dim, store.page
        precision = spec.format
        own = not spec.scaled and precision.bits == 16 and store.dtype != torch.float32
        self._kind = store.dtype if own else precision.stored
        width = -(-d // precision.packed)
        shape = (pages, heads, width, page) if tokens_last else (pages, heads, page, width)
        self.codes = torch.zeros(shape, dtype=_held(self._kind), device=device)
        column = torch.arange(page, device=device)
        if tokens_last:
            # where the tokens of a page lie
            column = (column & 1) | ((column & 8) >> 2) | ((column & 6) << 1) | (column & -16)
        self._column = column
        self.static = spec.scaled and spec.scale == "static"
        self._like = torch.empty(1, dtype=store.dtype, device=device).expand(1, heads, 1, d)
        known = operand({"codes": self._like}, spec, store.scheme, store.scales, tuple(self._like.shape), store.dtype)
        self._known = replace(known, codes=self._like[:, :, :0])
        self.sides: Tensor | None = None
        self._floats: Tensor | None = None
        if self.static:
            assert known.scale is not None
            pairs = [known.scale] if known.zero is None else [known.scale, known.zero]
            columns = sides_shape(spec, d, page)[2]
            sides = torch.stack([x.expand(1, heads, 1, columns) for x in pairs], dim=3).contiguous()
            self._floats = sides.float()
            self.sides = sides.view(_held(sides.dtype))
        elif spec.scaled:
            kind = SCALE_TYPES[spec.scale_dtype]
            self.sides = torch.zeros(pages, heads, *sides_shape(spec, d, page), dtype=_held(kind), device=device)

    def growing(self) -> list[Tensor]:
        """What has pages."""
        return [self.codes] if self.sides is None or self.static else [self.codes, self.sides]

    def grow(self, pages: int) -> None:
        larger = []
        for part in self.growing():
            larger.append(part.new_zeros(pages, *part.shape[1:]))
            larger[-1][: len(part)] = part
        self.codes = larger[0]
        if len(larger) > 1:
            self.sides = larger[1]

    def argument(self) -> Pages:
        """As the decoding kernel takes them."""
        offset, sides = self._known.offset if self.spec.role == "v" else None, self._scales()
        page = None if sides is None else 0 if self.static else sides.stride(0)
        return Pages(
            self.codes.view(self._kind), self.codes.stride(0), sides, page, None if offset is None else offset.contiguous()
        )

    def shared(self, batch: int) -> QuantizedTensor:
        """What all tokens share, for so many sequences."""
        x = self._known
        scale, zero = (None if each is None else each.expand(batch, -1, -1, -1) for each in (x.scale, x.zero))
        offset = None if x.offset is None else x.offset.expand(batch, -1, -1, -1)
        return replace(x, scale=scale, zero=zero, frame=replace(x.frame, offset=offset))

    def write(self, x: Tensor, table: Table, lost: Tensor) -> None:
        """Quantize `[B, H_kv, n, D]` to where the table says."""
        spec, frame, (b, heads, n, d) = self.spec, self.shared(x.shape[0]).frame, x.shape
        plan = quantize_plan.plan(
            Task(
                spec=spec,
                head_dim=d,
                dtype=x.dtype,
                step="both" if spec.scaled and not self.static else "codes",
                offset_tokens=0 if frame.offset is None else WHOLE,
                rotated=frame.rotated,
                weighted=place(spec) == "p",
                tokens_last=self.tokens_last,
                page=self._store.page,
                few=n <= FEW,
                counted=table.counts is not None,
                interpreted=self._store._target is None,
            )
        )
        codes = self.codes if self._kind.itemsize > 1 else self.codes.view(torch.uint8)
        made = Coded(codes=codes, lost=lost)
        sides = self._floats if self.static else self._scales()
        if sides is not None:
            scale, zero = sides[..., 0, :], None if spec.symmetric else sides[..., 1, :]
            page = 0 if self.static else sides.stride(0)
            made = made._replace(
                scale=scale, zero=zero, scale_batch=page, scale_head=sides.stride(1), scale_row=sides.stride(2)
            )
        given = Turned(offset=None if frame.offset is None else frame.offset.contiguous())
        # n tokens that begin anywhere lie in one tile more, but for a single one
        grid = ((n + plan.tokens - 2) // plan.tokens + 1, heads, b)
        generate.load(plan)[grid](Source(x, *x.stride()), given, made, table, n, plan.tokens, **plan.options())

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        """Codes `[1, H_kv, tokens, D]` of these pages' first tokens."""
        codes = self.codes[pages]
        if self.tokens_last:
            codes = codes[..., self._column].mT
        found = {"codes": self._joined(codes, tokens).view(self._kind)}
        if self.sides is not None and not self.static:
            sides, kind = self.sides[pages], SCALE_TYPES[self.spec.scale_dtype]
            rows = -(-tokens * sides.shape[2] // self._store.page)
            scale = self._joined(sides[..., 0, :], rows).view(kind)
            found["scale"] = scale.float().abs().to(kind) if place(self.spec) == "p" else scale
            if not self.spec.symmetric:
                found["zero"] = self._joined(sides[..., 1, :], rows).view(kind)
        shape = (1, self._store.kv_heads, tokens, self._store.head_dim)
        return operand(found, self.spec, self._store.scheme, self._store.scales, shape, self._store.dtype)

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        """Canonical codes `[1, H_kv, n, D]` to the slots of n tokens."""
        codes = x.codes[0].transpose(0, 1).contiguous().view(self.codes.dtype)
        if self.tokens_last:
            self.codes[page, :, :, self._column[slot]] = codes
        else:
            self.codes[page, :, slot] = codes
        if self.sides is None or self.static:
            return
        assert x.scale is not None
        scale = x.scale
        if place(self.spec) == "p":
            nothing = (x.code_values() == 0).all(dim=-1, keepdim=True) & scale.float().isfinite()
            scale = torch.where(nothing, -scale.float(), scale.float()).to(scale.dtype)
        tokens = self._store.page // self.sides.shape[2]
        page, row = page[::tokens], slot[::tokens] // tokens
        for index, side in enumerate((scale, x.zero)):
            if side is not None:
                self.sides[page, :, row, index] = side[0].transpose(0, 1).contiguous().view(self.sides.dtype)

    def _scales(self) -> Tensor | None:
        return None if self.sides is None else self.sides.view(SCALE_TYPES[self.spec.scale_dtype])

    def _joined(self, x: Tensor, rows: int) -> Tensor:
        # pages [n, H, rows of one, W] -> [1, H, rows, W]
        return x.transpose(0, 1).flatten(1, 2)[None, :, :rows].contiguous()


def _held(kind: torch.dtype) -> torch.dtype:
    return torch.uint8 if kind.itemsize == 1 and kind.is_floating_point else kind
