"""The memory of keys or of values in pages, and the kernels that write it.

A page holds for each head, contiguously,

    codes   [page, W]: K's, and V's where P V is a product of 16 bits; W stored elements hold a token's channels
            [W, page]: V's for a product of 8 bits, tokens permuted in groups of 16 so that P keeps its registers
    sides   [rows, 1 or 2, columns]: scales, and zeros behind them, rows and columns as the granularity says

so that a token is appended without touching another, and takes the bits that the scheme says. The scale of a token of V whose
codes are all zero is kept below zero: its weight in P is next to nothing (see `quantize.log2_weight`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from tokquant.kernels import generate, launch, quantize_plan
from tokquant.kernels.decode_plan import sides_shape
from tokquant.kernels.quantize_task import Task
from tokquant.kernels.triton.operands import Coded, Pages, Source, Table, Turned
from tokquant.pages import Part, Store
from tokquant.schemes import Operand
from tokquant.schemes.placement import place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor

FEW = 16
"""New tokens for which small programs are launched, and nobody waits to see whether their scales fit."""


class Pool(Part):
    """Pages of K or of V. One-byte floats are kept as bytes, which torch can index."""

    def __init__(self, spec: Operand, store: Store, pages: int, *, tokens_last: bool):
        super().__init__(spec, store, pages)
        self.tokens_last, self._interpreted = tokens_last, launch.interpreted()
        heads, d, page, device = store.kv_heads, store.head_dim, store.page, store.device
        precision = spec.format
        self._kind = precision.of(store.dtype).stored
        width = -(-d // precision.packed)
        shape = (pages, heads, width, page) if tokens_last else (pages, heads, page, width)
        self.parts = {"codes": torch.zeros(shape, dtype=_held(self._kind), device=device)}
        column = torch.arange(page, device=device)
        if tokens_last:
            # where the tokens of a page lie
            column = (column & 1) | ((column & 8) >> 2) | ((column & 6) << 1) | (column & -16)
        self._column = column
        self.static = spec.scaled and spec.scale == "static"
        like = torch.empty(1, dtype=store.dtype, device=device).expand(1, heads, 1, d)
        known = self.operand({"codes": like}, 1)
        self._known = replace(known, codes=like[:, :, :0])
        self._shared: dict[int, QuantizedTensor] = {}
        self._tasks: dict[tuple[bool, bool], Task] = {}
        self._given: Tensor | None = None
        self._floats: Tensor | None = None
        if self.static:
            assert known.scale is not None
            pairs = [known.scale] if known.zero is None else [known.scale, known.zero]
            columns = sides_shape(spec, d, page)[2]
            self._given = torch.stack([x.expand(1, heads, 1, columns) for x in pairs], dim=3).contiguous()
            self._floats = self._given.float()
        elif spec.scaled:
            kind = _held(SCALE_TYPES[spec.scale_dtype])
            self.parts["sides"] = torch.zeros(pages, heads, *sides_shape(spec, d, page), dtype=kind, device=device)

    @property
    def codes(self) -> Tensor:
        """Of all pages."""
        return self.parts["codes"]

    @property
    def sides(self) -> Tensor | None:
        """Scales and zeros: of all pages, or the static ones; None where there are none."""
        held = self.parts.get("sides")
        return self._given if held is None else held.view(SCALE_TYPES[self.spec.scale_dtype])

    def argument(self) -> Pages:
        """As the decoding kernel takes them."""
        offset, sides = self._known.offset if self.spec.role == "v" else None, self.sides
        page = None if sides is None else 0 if self.static else sides.stride(0)
        return Pages(
            self.codes.view(self._kind), self.codes.stride(0), sides, page, None if offset is None else offset.contiguous()
        )

    def shared(self, batch: int) -> QuantizedTensor:
        """What all tokens share, for so many sequences."""
        if batch not in self._shared:
            x, frame = self._known, self._known.frame
            parts = (x.scale, x.zero, frame.offset, frame.balance)
            scale, zero, offset, balance = (None if each is None else each.expand(batch, -1, -1, -1) for each in parts)
            self._shared[batch] = replace(x, scale=scale, zero=zero, frame=replace(frame, offset=offset, balance=balance))
        return self._shared[batch]

    def write(self, x: Tensor, table: Table, lost: Tensor) -> bool:
        """Quantize `[B, H_kv, n, D]` to where the table says. Returns whether `lost` may tell of what did not fit."""
        spec, frame, (b, heads, n, _) = self.spec, self.shared(x.shape[0]).frame, x.shape
        plan = quantize_plan.plan(self._task(x, few=n <= FEW, counted=table.counts is not None))
        codes = self.codes if self._kind.itemsize > 1 else self.codes.view(torch.uint8)
        made = Coded(codes=codes, lost=lost)
        sides = self._floats if self.static else self.sides
        if sides is not None:
            page, head, row, *_ = sides.stride()
            scale, zero = sides[..., 0, :], None if spec.symmetric else sides[..., 1, :]
            made = Coded(codes, scale, zero, 0 if self.static else page, head, row, lost=lost)
        offset, balance = (None if each is None else each.contiguous() for each in (frame.offset, frame.balance))
        given = Turned(offset=offset, balance=balance)
        # n tokens that begin anywhere lie in one tile more, but for a single one
        grid = launch.grid("k, v", (n + plan.tokens - 2) // plan.tokens + 1, heads, b)
        generate.load(plan)[grid](Source(x, *x.stride()), given, made, table, n, plan.tokens, **plan.options())
        return plan.checked

    def _task(self, x: Tensor, *, few: bool, counted: bool) -> Task:
        """What the kernel does that writes such tokens."""
        if (few, counted) not in self._tasks:
            spec = self.spec
            self._tasks[few, counted] = Task(
                spec=spec,
                head_dim=x.shape[3],
                dtype=x.dtype,
                step="both" if spec.scaled and not self.static else "codes",
                **self._known.frame.steps()._asdict(),
                weighted=place(spec) == "p",
                tokens_last=self.tokens_last,
                page=self.shape[2],
                few=few,
                counted=counted,
                interpreted=self._interpreted,
            )
        return self._tasks[few, counted]

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        codes = self.codes[pages]
        if self.tokens_last:
            codes = codes[..., self._column].mT
        found = {"codes": self._joined(codes, tokens).view(self._kind)}
        if "sides" in self.parts:
            sides, kind = self.parts["sides"][pages], SCALE_TYPES[self.spec.scale_dtype]
            rows = -(-tokens * sides.shape[2] // self.shape[2])
            scale = self._joined(sides[..., 0, :], rows).view(kind)
            found["scale"] = scale.float().abs().to(kind) if place(self.spec) == "p" else scale
            if not self.spec.symmetric:
                found["zero"] = self._joined(sides[..., 1, :], rows).view(kind)
        return self.operand(found, tokens)

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        codes = x.codes[0].transpose(0, 1).contiguous().view(self.codes.dtype)
        if self.tokens_last:
            self.codes[page, :, :, self._column[slot]] = codes
        else:
            self.codes[page, :, slot] = codes
        if "sides" not in self.parts:
            return
        assert x.scale is not None
        scale, sides = x.scale, self.parts["sides"]
        if place(self.spec) == "p":
            nothing = (x.code_values() == 0).all(dim=-1, keepdim=True) & scale.float().isfinite()
            scale = torch.where(nothing, -scale.float(), scale.float()).to(scale.dtype)
        tokens = self.shape[2] // sides.shape[2]
        page, row = page[::tokens], slot[::tokens] // tokens
        for index, side in enumerate((scale, x.zero)):
            if side is not None:
                sides[page, :, row, index] = side[0].transpose(0, 1).contiguous().view(sides.dtype)

    def _joined(self, x: Tensor, rows: int) -> Tensor:
        # pages [n, H, rows of one, W] -> [1, H, rows, W]
        return x.transpose(0, 1).flatten(1, 2)[None, :, :rows].contiguous()


def _held(kind: torch.dtype) -> torch.dtype:
    return torch.uint8 if kind.itemsize == 1 and kind.is_floating_point else kind
