"""The memory layout of pages for Triton kernels, and the kernels that write to it.

For each head, a page holds contiguously

    codes   [page, W]: K, and V if P V is a 16-bit product; W stored elements hold a token's channels
            [W, page]: V for an 8-bit product, tokens permuted in groups of 16 so that P keeps its registers
    sides   [rows, 1 or 2, columns]: scales, then zeros; rows and columns by the granularity

No element holds codes of two tokens, so appending a token leaves the others as they are, and a token takes the bits that the
scheme says. If V has a scale per token, a token whose codes are all zero has its scale stored negated: its weight in P is then
2^-32 instead (see `quantize.log2_weight`).
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
"""Up to this many new tokens, programs are small, and a write on a GPU does not wait to check that scales fit their type."""


class PackedPages(Part):
    """Pages of K or of V. 8-bit floats are stored as bytes, because torch cannot index them."""

    def __init__(self, spec: Operand, store: Store, pages: int, *, tokens_last: bool):
        super().__init__(spec, store, pages)
        self.tokens_last, self._interpreted = tokens_last, launch.interpreted()
        heads, d, page, device = store.kv_heads, store.head_dim, store.page, store.device
        precision = spec.format
        self._kind = precision.of(store.dtype).stored
        width = -(-d // precision.packed)
        shape = (pages, heads, width, page) if tokens_last else (pages, heads, page, width)
        self.parts = {"codes": torch.zeros(shape, dtype=_storage_type(self._kind), device=device)}
        column = torch.arange(page, device=device)  # of each token of a page
        if tokens_last:
            column = (column & 1) | ((column & 8) >> 2) | ((column & 6) << 1) | (column & -16)
        self._columns = column
        self._static = spec.scaled and spec.scale == "static"
        like = torch.empty(1, dtype=store.dtype, device=device).expand(1, heads, 1, d)
        common = self.operand({"codes": like}, 1)
        self._common = replace(common, codes=like[:, :, :0])
        self._common_of_batch: dict[int, QuantizedTensor] = {}
        self._tasks: dict[tuple[bool, bool], Task] = {}
        self._static_sides: Tensor | None = None
        self._static_floats: Tensor | None = None
        if self._static:
            assert common.scale is not None
            pairs = [common.scale] if common.zero is None else [common.scale, common.zero]
            columns = sides_shape(spec, d, page)[2]
            self._static_sides = torch.stack([x.expand(1, heads, 1, columns) for x in pairs], dim=3).contiguous()
            self._static_floats = self._static_sides.float()
        elif spec.scaled:
            kind = _storage_type(SCALE_TYPES[spec.scale_dtype])
            self.parts["sides"] = torch.zeros(pages, heads, *sides_shape(spec, d, page), dtype=kind, device=device)

    @property
    def codes(self) -> Tensor:
        """Codes of all pages."""
        return self.parts["codes"]

    @property
    def sides(self) -> Tensor | None:
        """Scales and zeros: of all pages, or the static ones; None for operands without scales."""
        stored = self.parts.get("sides")
        return self._static_sides if stored is None else stored.view(SCALE_TYPES[self.spec.scale_dtype])

    def argument(self) -> Pages:
        """These pages as the decoding kernel's argument."""
        offset, sides = self._common.offset if self.spec.role == "v" else None, self.sides
        stride = None if sides is None else 0 if self._static else sides.stride(0)
        return Pages(
            self.codes.view(self._kind), self.codes.stride(0), sides, stride, None if offset is None else offset.contiguous()
        )

    def shared(self, batch: int) -> QuantizedTensor:
        """A tensor without tokens, for this many sequences, with what all tokens share: frame, static scales and zeros."""
        if batch not in self._common_of_batch:
            x, frame = self._common, self._common.frame
            parts = (x.scale, x.zero, frame.offset, frame.balance)
            scale, zero, offset, balance = (None if each is None else each.expand(batch, -1, -1, -1) for each in parts)
            frame = replace(frame, offset=offset, balance=balance)
            self._common_of_batch[batch] = replace(x, scale=scale, zero=zero, frame=frame)
        return self._common_of_batch[batch]

    def write(self, x: Tensor, table: Table, lost: Tensor) -> bool:
        """Quantize `[B, H_kv, n, D]` into the pages of the table. Returns whether the kernel may have set `lost`."""
        spec, frame, (b, heads, n, _) = self.spec, self.shared(x.shape[0]).frame, x.shape
        plan = quantize_plan.plan(self._task(x, few=n <= FEW, counted=table.counts is not None))
        codes = self.codes if self._kind.itemsize > 1 else self.codes.view(torch.uint8)
        coded = Coded(codes=codes, lost=lost)
        sides = self._static_floats if self._static else self.sides
        if sides is not None:
            page, head, row, *_ = sides.stride()
            scale, zero = sides[..., 0, :], None if spec.symmetric else sides[..., 1, :]
            coded = Coded(codes, scale, zero, 0 if self._static else page, head, row, lost=lost)
        offset, balance = (None if each is None else each.contiguous() for each in (frame.offset, frame.balance))
        transforms = Turned(offset=offset, balance=balance)
        # n tokens that start anywhere in a tile may reach into one more tile, a single token into no other
        grid = launch.grid("k, v", (n + plan.tokens - 2) // plan.tokens + 1, heads, b)
        generate.load(plan)[grid](Source(x, *x.stride()), transforms, coded, table, n, plan.tokens, **plan.options())
        return plan.checked

    def _task(self, x: Tensor, *, few: bool, counted: bool) -> Task:
        """The task of the kernel that writes these tokens."""
        if (few, counted) not in self._tasks:
            spec = self.spec
            self._tasks[few, counted] = Task(
                spec=spec,
                head_dim=x.shape[3],
                dtype=x.dtype,
                step="both" if spec.scaled and not self._static else "codes",
                **self._common.frame.steps()._asdict(),
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
            codes = codes[..., self._columns].mT
        parts = {"codes": self._join(codes, tokens).view(self._kind)}
        if "sides" in self.parts:
            sides, kind = self.parts["sides"][pages], SCALE_TYPES[self.spec.scale_dtype]
            rows = -(-tokens * sides.shape[2] // self.shape[2])
            scale = self._join(sides[..., 0, :], rows).view(kind)
            parts["scale"] = scale.float().abs().to(kind) if place(self.spec) == "p" else scale
            if not self.spec.symmetric:
                parts["zero"] = self._join(sides[..., 1, :], rows).view(kind)
        return self.operand(parts, tokens)

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        codes = x.codes[0].transpose(0, 1).contiguous().view(self.codes.dtype)
        if self.tokens_last:
            self.codes[page, :, :, self._columns[slot]] = codes
        else:
            self.codes[page, :, slot] = codes
        if "sides" not in self.parts:
            return
        assert x.scale is not None
        scale, sides = x.scale, self.parts["sides"]
        if place(self.spec) == "p":
            all_zero = (x.code_values() == 0).all(dim=-1, keepdim=True) & scale.float().isfinite()
            scale = torch.where(all_zero, -scale.float(), scale.float()).to(scale.dtype)
        tokens = self.shape[2] // sides.shape[2]
        page, row = page[::tokens], slot[::tokens] // tokens
        for index, side in enumerate((scale, x.zero)):
            if side is not None:
                sides[page, :, row, index] = side[0].transpose(0, 1).contiguous().view(sides.dtype)

    def _join(self, x: Tensor, rows: int) -> Tensor:
        # [pages, H, rows of a page, W] -> [1, H, rows, W]
        return x.transpose(0, 1).flatten(1, 2)[None, :, :rows].contiguous()


def _storage_type(kind: torch.dtype) -> torch.dtype:
    return torch.uint8 if kind.itemsize == 1 and kind.is_floating_point else kind
