"""Stores of packed pages of a KV cache: the interface, and `ReferencePages` in torch, which defines what others compute."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from tokquant import reference
from tokquant.calibration.scales import LayerScales
from tokquant.features import Features
from tokquant.quantize import frame_of_queries, in_frame, queries, with_sums
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.slots import Slots
from tokquant.tensor import QuantizedTensor
from tokquant.transforms import Frame


class Part(ABC):
    """Pages of K or of V, in the memory layout of a store."""

    parts: dict[str, Tensor]
    """Codes, and scales and zeros where these are dynamic, by name; the first dimension is pages."""

    def __init__(self, spec: Operand, store: "Store", pages: int):
        self.spec, self.scheme, self.scales, self.dtype = spec, store.scheme, store.scales, store.dtype
        self.shape = torch.Size((pages, store.kv_heads, store.page, store.head_dim))
        like = torch.empty(1, device=store.device).expand(1, store.kv_heads, 1, store.head_dim)
        self.frame = frame_of(like, spec, self.scheme, self.scales)

    def grow(self, pages: int) -> None:
        """Grow to this many pages, keeping the contents."""
        for name, part in self.parts.items():
            larger = part.new_zeros(pages, *part.shape[1:])
            larger[: len(part)] = part
            self.parts[name] = larger
        self.shape = torch.Size((pages, *self.shape[1:]))

    @abstractmethod
    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        """The first tokens of these pages `[1, H_kv, tokens, D]`, in the canonical layout."""

    @abstractmethod
    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        """Write n tokens `[1, H_kv, n, D]` in the canonical layout: token i to `slot[i]` of page `page[i]`."""

    def operand(self, parts: dict[str, Tensor], tokens: int, batch: int = 1) -> QuantizedTensor:
        """`operand` for these parts, of this many tokens of each of `batch` sequences."""
        shape = (batch, self.shape[1], tokens, self.shape[3])
        return operand(parts, self.spec, self.scheme, self.scales, shape, self.dtype)


P = TypeVar("P", bound=Part)


class Store(ABC, Generic[P]):
    """Pages of quantized K and V in the memory layout of a backend. Codes of K, V and Q equal those of `ReferencePages`.

    Packed token t of sequence b is in page `table[b, t // page]`. Arguments named table, first, counts, lengths and offset are
    int32 tensors on the store's device, and may change after the call.

    Args:
        kv_heads, head_dim, dtype: heads, channels and type of the tensors that are written.
        pages, page: number of pages, and tokens per page.
        scales: calibrated scales of the layer, for a scheme with static parts.

    Raises UnsupportedError for a scheme or device that the store does not support.
    """

    replayable = False
    """Whether CUDA graphs can capture `write` and `attention`."""
    slots: ClassVar[type[Slots]] = Slots
    """The class that stores a cache's 16-bit tokens."""

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
        self.scheme, self.scales, self.page = scheme, scales, page
        self.kv_heads, self.head_dim, self.dtype, self.device = kv_heads, head_dim, dtype, device
        self._begin()
        self._k, self._v = (self._part(spec, pages) for spec in (scheme.k, scheme.v))

    def _begin(self) -> None:
        """Raise for what the store does not support, and set up what `_part` needs."""

    @abstractmethod
    def _part(self, spec: Operand, pages: int) -> P:
        """Create pages of K or of V."""

    @abstractmethod
    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        """Quantize k and v `[B, H_kv, n, D]` of any strides, and write `counts[b]` tokens (n where None) from `first[b]`.

        If tokens share scales in blocks, counts and first are multiples of these. Raises ValueError where a scale overflows its
        type.
        """

    def check(self) -> None:
        """Wait for earlier writes. Raise ValueError if one wrote a scale or zero that overflows its type, and did not raise."""

    @abstractmethod
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

        Query i is at position `lengths + offset - n_q + i`. A query that sees no key has an LSE of -inf.

        Args:
            features: without sinks, mask and bias.
            offset: number of newer keys that are kept outside of the pages; 0 where None.
            longest: the largest of the lengths, so that it need not be read back from a device.
            deterministic: make the bits of a sequence's result depend only on the sequence.
        """

    def grow(self, pages: int) -> None:
        """Grow to this many pages, keeping the contents."""
        for part in (self._k, self._v):
            part.grow(pages)

    def read(self, table_row: Tensor, tokens: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V of a sequence's first packed tokens `[1, H_kv, tokens, D]`, in the canonical layout."""
        pages = table_row[: -(-tokens // self.page)]
        return self._k.get(pages, tokens), with_sums(self._v.get(pages, tokens), self.scheme)

    def store(self, table_row: Tensor, first: int, k: QuantizedTensor, v: QuantizedTensor) -> None:
        """Write K and V `[1, H_kv, n, D]`, in the canonical layout, from token `first`, a multiple of the scheme's blocks."""
        place = torch.arange(first, first + k.shape[2], device=table_row.device)
        for part, x in ((self._k, k), (self._v, v)):
            part.put(table_row[place // self.page], place % self.page, x)

    def copy(self, source: int, target: int) -> None:
        """Copy the contents of page `source` to page `target`."""
        for part in (self._k, self._v):
            for x in part.parts.values():
                x[target] = x[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(x.nbytes for part in (self._k, self._v) for x in part.parts.values())

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros per value of a full page."""
        return 8 * self.nbytes / (2 * self._k.shape.numel())


class ReferencePages(Store["_CanonicalPages"]):
    """Pages in torch, on any device, in the canonical layout."""

    def _part(self, spec: Operand, pages: int) -> "_CanonicalPages":
        return _CanonicalPages(spec, self, pages)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        n = k.shape[2]
        step = torch.arange(n, device=table.device)
        valid = step < (torch.full_like(first, n) if counts is None else counts)[:, None]
        sequence, token = valid.nonzero(as_tuple=True)
        position = first[sequence] + token
        page, slot = table[sequence, position // self.page], position % self.page
        # tokens beyond `counts` are left out; as counts are multiples of blocks, the others can be quantized as one sequence
        for part, x in ((self._k, k), (self._v, v)):
            x = x.transpose(1, 2)[sequence, token].transpose(0, 1)[None]
            part.put(page, slot, in_frame(x, part.frame, part.spec, self.scales))

    def attention(
        self, q: Tensor, table: Tensor, lengths: Tensor, features: Features, *, offset: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return attention_by_reading(self, self.scheme, self.scales, q, table, lengths, features, offset)


class _CanonicalPages(Part):
    """Codes, scales and zeros `[pages, H_kv, rows, ...]`, a row for each token or for the tokens of a scale; fp8 as bytes."""

    def __init__(self, spec: Operand, store: Store, pages: int):
        super().__init__(spec, store, pages)
        sizes = part_sizes(spec, self.shape, self.dtype)
        self.types = {name: kind for name, (_, kind) in sizes.items()}
        parts = {name: torch.zeros(size, dtype=kind, device=store.device) for name, (size, kind) in sizes.items()}
        self.parts = {name: indexable(part) for name, part in parts.items()}

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        for name, part in stored_parts(x).items():
            tokens = self.shape[2] // self.parts[name].shape[2]
            self.parts[name][page[::tokens], :, slot[::tokens] // tokens] = indexable(part)[0].transpose(0, 1)

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        parts = {}
        for name, part in self.parts.items():
            rows = -(-tokens * part.shape[2] // self.shape[2])
            parts[name] = part[pages].transpose(0, 1).flatten(1, 2)[None, :, :rows].view(self.types[name])
        return self.operand(parts, tokens)


def part_sizes(spec: Operand, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each stored part of K or V `[B, H_kv, n, D]`: `codes`, and `scale` and `zero` where dynamic."""
    precision, (*rest, d) = spec.format, shape
    if not spec.scaled:
        return {"codes": (tuple(shape), precision.of(dtype).stored)}
    sizes = {"codes": ((*rest, -(-d // precision.packed)), precision.stored)}
    if spec.scale == "dynamic":
        kinds = ("scale",) if spec.symmetric else ("scale", "zero")
        sizes |= {name: (spec.granularity.scale_shape(tuple(shape)), SCALE_TYPES[spec.scale_dtype]) for name in kinds}
    return sizes


def stored_parts(x: QuantizedTensor) -> dict[str, Tensor]:
    """The parts of `x` that `part_sizes` lists."""
    parts = {"codes": x.codes, "scale": x.scale, "zero": x.zero}
    return {name: part for name in part_sizes(x.spec, x.shape, x.dtype) if (part := parts[name]) is not None}


def operand(
    parts: dict[str, Tensor],
    spec: Operand,
    scheme: QuantScheme,
    scales: LayerScales | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> QuantizedTensor:
    """K or V `[B, H_kv, n, D]` from its stored parts and what all tokens share: static scales and the frame."""
    like = parts["codes"].new_empty(()).expand(shape)
    if spec.scale == "static" and scales is not None:
        parts = parts | {"scale": scales.scale(spec, like)}
        zero = scales.zero(spec, like)
        parts = parts if zero is None else parts | {"zero": zero}
    codes, scale = parts["codes"], parts.get("scale")
    frame = frame_of(like, spec, scheme, scales)
    return QuantizedTensor(
        codes=codes,
        scale=scale,
        zero=parts.get("zero"),
        frame=frame,
        spec=spec,
        scheme=scheme,
        shape=torch.Size(shape),
        dtype=dtype,
    )


def frame_of(like: Tensor, spec: Operand, scheme: QuantScheme, scales: LayerScales | None) -> Frame:
    """The transforms of K or V `[B, H_kv, n, D]` before quantization: offset, balance and rotation."""
    offset = scales.offset(spec, like) if spec.smooth == "static" and scales is not None else None
    balanced = spec.role == "k" and scheme.balance != "none"
    return Frame(
        offset=offset,
        balance=scales.balance(like) if balanced and scales is not None else None,
        rotated=(scheme.rotate if spec.role == "k" else scheme.rotate_v) == "hadamard",
    )


def attention_by_reading(
    store: Store,
    scheme: QuantScheme,
    scales: LayerScales | None,
    q: Tensor,
    table: Tensor,
    lengths: Tensor,
    features: Features,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `Store.attention`: the emulation on the codes that `Store.read` gives, sequence by sequence."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    left, right = features.reach()
    for b, tokens in enumerate(lengths.tolist()):
        if tokens:
            k, v = store.read(table[b], tokens)
            frame = frame_of_queries(q, k, k.frame)
            codes = replace(queries(q[b : b + 1], frame, k, scheme, scales), scheme=scheme)
            # newer keys outside of the pages put queries as much further from the packed keys
            newer = 0 if offset is None else int(offset[b])
            window = (None if left is None else left - newer, None if right is None else right + newer)
            shifted = replace(features, causal=False, window=window)
            out[b : b + 1], lse[b : b + 1] = reference.attention(codes, k, v, scheme, shifted, torch.float32)
    return out, lse


def indexable(x: Tensor) -> Tensor:
    """`x`, with fp8 viewed as bytes, because torch cannot index fp8."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x
