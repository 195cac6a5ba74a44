"""What keeps the packed part of a KV cache: the interface of a store, and the one in torch that defines the others."""

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
    """Pages of K, or of V, as a store lays them."""

    parts: dict[str, Tensor]
    """What has pages, by name."""

    def __init__(self, spec: Operand, store: "Store", pages: int):
        self.spec, self.scheme, self.scales, self.dtype = spec, store.scheme, store.scales, store.dtype
        self.shape = torch.Size((pages, store.kv_heads, store.page, store.head_dim))
        like = torch.empty(1, device=store.device).expand(1, store.kv_heads, 1, store.head_dim)
        self.frame = frame_of(like, spec, self.scheme, self.scales)

    def grow(self, pages: int) -> None:
        """Room for so many pages, contents kept."""
        for name, part in self.parts.items():
            larger = part.new_zeros(pages, *part.shape[1:])
            larger[: len(part)] = part
            self.parts[name] = larger
        self.shape = torch.Size((pages, *self.shape[1:]))

    @abstractmethod
    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        """Canonical codes `[1, H_kv, tokens, D]` of these pages' first tokens."""

    @abstractmethod
    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        """Canonical codes `[1, H_kv, n, D]` to the slots of n tokens."""

    def operand(self, parts: dict[str, Tensor], tokens: int, batch: int = 1) -> QuantizedTensor:
        """`operand` of what so many tokens of each of so many sequences have."""
        shape = (batch, self.shape[1], tokens, self.shape[3])
        return operand(parts, self.spec, self.scheme, self.scales, shape, self.dtype)


P = TypeVar("P", bound=Part)


class Store(ABC, Generic[P]):
    """Pages of K and pages of V in codes, as a backend lays them. What it makes of tokens and queries equals `ReferencePages`.

    Token t of a sequence, counted in its packed part, lies in page `table[b, t // page]`. Tables, firsts, counts, lengths and
    offsets are int32 on the store's device, and may change after the call.

    Args:
        kv_heads, head_dim, dtype: of the tensors that are written.
        pages, page: how many, and tokens of each.
        scales: of the layer, for a scheme with static parts.

    Raises UnsupportedError for what a store does not keep.
    """

    replayable = False
    """Whether a CUDA graph can capture what writes and attends."""
    slots: ClassVar[type[Slots]] = Slots
    """What keeps tokens in 16 bits beside the pages."""

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
        """Refuse what is not kept here, and prepare what pages are made with."""

    @abstractmethod
    def _part(self, spec: Operand, pages: int) -> P:
        """So many pages of K or of V."""

    @abstractmethod
    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        """Quantize k and v `[B, H_kv, n, D]` of any strides, and write `counts[b]` tokens (n where None) from `first[b]`.

        Where a scheme has blocks, both are multiples of them. Raises ValueError where a scale does not fit.
        """

    def check(self) -> None:
        """Wait for what was written, and raise ValueError where a scale or a zero did not fit its type, but `write` went on."""

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

        Query i stands at key `lengths + offset - n_q + i`, offset being how many newer keys lie elsewhere (0 where None).
        `longest` is the largest of the lengths, which saves asking a device. With `deterministic`, bits of a sequence's result
        depend on nothing but the sequence.
        An LSE of -inf where nothing is attended. Features have no sinks, mask or bias.
        """

    def grow(self, pages: int) -> None:
        """A pool of so many pages, contents kept."""
        for part in (self._k, self._v):
            part.grow(pages)

    def read(self, table_row: Tensor, tokens: int) -> tuple[QuantizedTensor, QuantizedTensor]:
        """K and V of a sequence's first tokens `[1, H_kv, tokens, D]`, in the canonical layout."""
        pages = table_row[: -(-tokens // self.page)]
        return self._k.get(pages, tokens), with_sums(self._v.get(pages, tokens), self.scheme)

    def store(self, table_row: Tensor, first: int, k: QuantizedTensor, v: QuantizedTensor) -> None:
        """Write canonical codes `[1, H_kv, n, D]` from token `first`, which blocks divide."""
        place = torch.arange(first, first + k.shape[2], device=table_row.device)
        for part, x in ((self._k, k), (self._v, v)):
            part.put(table_row[place // self.page], place % self.page, x)

    def copy(self, source: int, target: int) -> None:
        """One page's contents to another."""
        for part in (self._k, self._v):
            for x in part.parts.values():
                x[target] = x[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(x.nbytes for part in (self._k, self._v) for x in part.parts.values())

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros for a value of a page that is full."""
        return 8 * self.nbytes / (2 * self._k.shape.numel())


class ReferencePages(Store["_Rows"]):
    """Pages in torch, on any device, in the canonical layout."""

    def _part(self, spec: Operand, pages: int) -> "_Rows":
        return _Rows(spec, self, pages)

    def write(self, k: Tensor, v: Tensor, table: Tensor, first: Tensor, counts: Tensor | None = None) -> None:
        n = k.shape[2]
        step = torch.arange(n, device=table.device)
        given = step < (torch.full_like(first, n) if counts is None else counts)[:, None]
        sequence, token = given.nonzero(as_tuple=True)
        place = first[sequence] + token
        page, slot = table[sequence, place // self.page], place % self.page
        # all tokens as one sequence: a block of any is a block of that, and what only fills up is not looked at
        for rows, x in ((self._k, k), (self._v, v)):
            x = x.transpose(1, 2)[sequence, token].transpose(0, 1)[None]
            rows.put(page, slot, in_frame(x, rows.frame, rows.spec, self.scales))

    def attention(
        self, q: Tensor, table: Tensor, lengths: Tensor, features: Features, *, offset: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return attention_by_reading(self, self.scheme, self.scales, q, table, lengths, features, offset)


class _Rows(Part):
    """Codes, scales and zeros `[pages, H_kv, page / tokens under one, ...]`, fp8 as bytes."""

    def __init__(self, spec: Operand, store: Store, pages: int):
        super().__init__(spec, store, pages)
        kept = sizes(spec, self.shape, self.dtype)
        self.types = {name: kind for name, (_, kind) in kept.items()}
        made = {name: torch.zeros(size, dtype=kind, device=store.device) for name, (size, kind) in kept.items()}
        self.parts = {name: indexable(part) for name, part in made.items()}

    def put(self, page: Tensor, slot: Tensor, x: QuantizedTensor) -> None:
        for name, part in growing(x).items():
            tokens = self.shape[2] // self.parts[name].shape[2]
            self.parts[name][page[::tokens], :, slot[::tokens] // tokens] = indexable(part)[0].transpose(0, 1)

    def get(self, pages: Tensor, tokens: int) -> QuantizedTensor:
        found = {}
        for name, part in self.parts.items():
            rows = -(-tokens * part.shape[2] // self.shape[2])
            found[name] = part[pages].transpose(0, 1).flatten(1, 2)[None, :, :rows].view(self.types[name])
        return self.operand(found, tokens)


def sizes(spec: Operand, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what grows with the tokens of K or V `[B, H_kv, n, D]`: `codes`, and dynamic `scale` and `zero`."""
    precision, (*rest, d) = spec.format, shape
    if not spec.scaled:
        return {"codes": (tuple(shape), precision.of(dtype).stored)}
    found = {"codes": ((*rest, -(-d // precision.packed)), precision.stored)}
    if spec.scale == "dynamic":
        kinds = ("scale",) if spec.symmetric else ("scale", "zero")
        found |= {name: (spec.granularity.scale_shape(tuple(shape)), SCALE_TYPES[spec.scale_dtype]) for name in kinds}
    return found


def growing(x: QuantizedTensor) -> dict[str, Tensor]:
    """What `sizes` describes, of `x`."""
    parts = {"codes": x.codes, "scale": x.scale, "zero": x.zero}
    return {name: part for name in sizes(x.spec, x.shape, x.dtype) if (part := parts[name]) is not None}


def operand(
    parts: dict[str, Tensor],
    spec: Operand,
    scheme: QuantScheme,
    scales: LayerScales | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> QuantizedTensor:
    """K or V `[B, H_kv, n, D]` of what `growing` gave, with all that is the same for every token."""
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
    """What is done to tokens of K or V `[B, H_kv, n, D]` before their codes are taken."""
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
    """What `Store.attention` is defined as: the emulation on what `Store.read` gives, sequence by sequence."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    left, right = features.reach()
    for b, tokens in enumerate(lengths.tolist()):
        if tokens:
            k, v = store.read(table[b], tokens)
            frame = frame_of_queries(q, k, k.frame)
            codes = replace(queries(q[b : b + 1], frame, k, scheme, scales), scheme=scheme)
            # a query stands behind the last key by as many as are elsewhere
            newer = 0 if offset is None else int(offset[b])
            window = (None if left is None else left - newer, None if right is None else right + newer)
            moved = replace(features, causal=False, window=window)
            out[b : b + 1], lse[b : b + 1] = reference.attention(codes, k, v, scheme, moved, torch.float32)
    return out, lse


def indexable(x: Tensor) -> Tensor:
    """`x`, whose fp8 are bytes: torch indexes no fp8."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x
