"""QuantizedTensor: codes, their scales, and everything that dequantization needs."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tokquant import blocks
from tokquant.autocast import joined
from tokquant.schemes import Granularity, Operand, QuantScheme
from tokquant.schemes.placement import as_bytes, place
from tokquant.transfer import capturing
from tokquant.transforms import Frame

T = TypeVar("T")


class cached_outside_of_graphs(cached_property[T]):
    """A cached_property that keeps no tensor made while a CUDA graph is captured: it would have no value before a replay."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is not None and capturing(instance.device):
            return self.func(instance)
        return super().__get__(instance, owner)


def spread(scale: Tensor, granularity: Granularity, n: int, d: int) -> Tensor:
    """Scales or zeros, broadcastable to `[B, H, n, d]`: blocks and groups are repeated over their tokens and channels."""
    tokens, channels = granularity.cover(n, d)
    if 1 < tokens < n:
        scale = scale.repeat_interleave(tokens, dim=2)[:, :, :n]
    if 1 < channels < d:
        scale = scale.repeat_interleave(channels, dim=3)
    return scale


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedTensor:
    """Q, K or V as codes and scales. `attention` accepts it; `dequantize` gives the values in the original frame.

    It is plain data that can be copied and pickled. `torch.load` reads it with `weights_only=False`.
    """

    codes: Tensor
    """`[B, H, N, D / packed]` in the precision's stored type, or as `layout` says: what `tokquant.quantize` returns with
    `backend="reference"` is canonical, K and V for another backend may not be."""
    scale: Tensor | None
    """In `scale_dtype`; `Granularity` gives the shape. None for floats of 16 and 32 bits."""
    zero: Tensor | None = None
    """Asymmetric operands: `x = code * scale + zero`, with codes counted from 0. Shape and type of `scale`."""
    frame: Frame = field(default_factory=Frame)
    code_sum: Tensor | None = None
    """Q, where K has zeros: sums of `product_values` over channels, float32 `[B, H, N, 1]`. V, where P is unsigned: sums of
    codes over each key tile, int32 `[B, H, ceil(N / n), D]`."""
    log2_weight: Tensor | None = None
    """V scaled per token: log2 of the weight that P is multiplied by before it is rounded, float32 `[B, H, N, 1]`. The weight
    is V's scale, or 2^-32 for a token whose codes are all zero: its scale of 1 would dominate a row's maximum."""
    logit_offset: Tensor | None = None
    """Q, where K has an offset c, or zeros per channel: what Q K^T of the codes lacks, such as q . c, for each query, float32
    `[B, H, N, 1]`."""
    companion: Tensor | None = None
    """K, where Q has block means: K minus its offset, in the input's type. It is multiplied with these means."""
    spec: Operand
    scheme: QuantScheme | None = None
    """The scheme by which Q, K and V were quantized together."""
    shape: torch.Size
    dtype: torch.dtype
    layout: Literal["canonical", "tokens_last", "blocks"] = "canonical"
    """`tokens_last`: V for 8-bit tensor cores, `[B, H, D, N / packed]`, N padded to whole groups of 16 elements, in the order
    that the function `tokens_last` describes. `blocks`: K and V for CPUs, as described in `tokquant.blocks`."""

    @property
    def offset(self) -> Tensor | None:
        """What was subtracted before quantization: a mean, block means, or a calibrated offset."""
        return self.frame.offset

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    def stored_values(self) -> Tensor:
        """The stored codes decoded, without scale and zero: float32 `[B, H, N, D]`."""
        return self._of_blocks() if self.layout == "blocks" else self.spec.format.decode(_unpacked(self))

    @property
    def stored(self) -> torch.dtype:
        """The type of stored elements in the canonical layout; for 16-bit floats the input's own type."""
        return self.spec.format.of(self.dtype).stored

    def _of_blocks(self) -> Tensor:
        assert self.scheme is not None
        precision, role = self.spec.format, self.spec.role
        multiplied_as_bytes = as_bytes(self.scheme, role)
        bits = blocks.bits_of(precision, self.stored, multiplied_as_bytes)
        unblock = blocks.keys_of if role == "k" else blocks.values_of
        raw = unblock(self.codes, bits, *self.shape[2:])
        return blocks.decoded(raw.contiguous(), precision, self.stored, bits, multiplied_as_bytes, role)

    def code_values(self) -> Tensor:
        """The values that scale and zero are applied to: the stored values, counted from 0 if the operand is asymmetric."""
        values = self.stored_values()
        return values if self.spec.symmetric else values + 2 ** (self.spec.format.bits - 1)

    @cached_outside_of_graphs
    def origin(self) -> Tensor | None:
        """For asymmetric operands the value of a stored code of 0: `x = stored * scale + origin`; float32, shape of `zero`.

        For V scaled per token, P's weight takes the place of the scale.
        """
        if self.zero is None or self.scale is None:
            return None
        weight = self.scale.float() if self.log2_weight is None else self.log2_weight.exp2()
        return self.zero.float() + weight * 2 ** (self.spec.format.bits - 1)

    @cached_outside_of_graphs
    def inverse_weight(self) -> Tensor | None:
        """V scaled per token: the factor that removes the weight from P; 0 for a weight of NaN, which P already holds."""
        if self.log2_weight is None:
            return None
        return torch.exp2(-self.log2_weight).nan_to_num_(nan=0.0, posinf=0.0)

    @cached_outside_of_graphs
    def origin_over_weight(self) -> Tensor | None:
        """V scaled per token: the factor of unrounded, weighted P in the term that adds the origin to the output."""
        if self.origin is None or self.inverse_weight is None:
            return None
        # zero times NaN is NaN: rows that see a NaN are NaN by its weight, the others must not have its origin
        origin = self.origin * self.inverse_weight
        return origin.masked_fill(origin.isnan(), 0.0)

    def scaled_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times scale plus zero, still in the frame: `[B, H, N, D]`."""
        values = self.code_values().to(dtype)
        if self.scale is not None:
            values = values * self.spread(self.scale)
        return values if self.zero is None else values + self.spread(self.zero)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values in the original frame, `[B, H, N, D]`, in `dtype` (the input's type if None)."""
        dtype = dtype or self.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return self.frame.undo(self.scaled_values(exact)).to(dtype)

    def spread(self, scale: Tensor) -> Tensor:
        """This tensor's `scale`, `zero` or `origin` as float32, broadcastable to its shape."""
        return spread(scale, self.spec.granularity, *self.shape[2:]).float()

    @cached_outside_of_graphs
    def correction(self) -> Tensor | None:
        """V, where P is unsigned: what each tile's P V lacks if P is shifted to signed, float32 `[B, H, ceil(N / n), D]`."""
        if self.spec.role != "v" or self.code_sum is None or self.scheme is None:
            return None
        missing = self.code_sum * float(self.scheme.p.format.code_zero)
        if self.scale is None or place(self.spec) != "tile":
            return missing
        granularity, tiles = self.spec.granularity, missing.shape[2]
        assert granularity.size is not None
        of_tiles = Granularity(granularity.kind, granularity.size // self.scheme.key_tile)
        return missing * spread(self.scale, of_tiles, tiles, self.shape[3]).float()

    @property
    def nbytes(self) -> int:
        """Bytes of everything this holds."""
        tensors = (self.codes, self.scale, self.zero, self.code_sum, self.log2_weight, self.logit_offset, self.companion)
        return sum(x.numel() * x.element_size() for x in (*tensors, *self.frame.tensors()) if x is not None)

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros for each value of the tensor, without what a layout pads."""
        precision = self.spec.format.of(self.dtype)
        codes = self.shape[:3].numel() * -(-self.shape[3] // precision.packed) * precision.stored.itemsize
        sides = sum(x.nbytes for x in (self.scale, self.zero) if x is not None)
        return 8 * (codes + sides) / self.shape.numel()

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles tensors of 8-bit floats without an error, but cannot read them back
        return {
            name: (x.view(torch.uint8), x.dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize == 1 else x
            for name, x in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: x[0].view(x[1]) if type(x) is tuple else x for name, x in state.items()})

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"QuantizedTensor({self.spec.role} [{shape}], {self.spec.precision} per {self.spec.granularity}, {self.device})"


@dataclass(frozen=True, eq=False)
class QuantizedHeads:
    """Q, K or V whose ranges of heads are quantized by different schemes."""

    parts: tuple[QuantizedTensor, ...]

    @property
    def shape(self) -> torch.Size:
        """`[B, H, N, D]`."""
        b, _, n, d = self.parts[0].shape
        return torch.Size((b, sum(part.shape[1] for part in self.parts), n, d))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensor that was quantized."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.parts[0].device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values in the original frame, `[B, H, N, D]`, in `dtype` (the input's type if None)."""
        return joined([part.dequantize(dtype) for part in self.parts], dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of everything this holds."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_value(self) -> float:
        """Bits of codes, scales and zeros for each value of the tensor."""
        return sum(part.bits_per_value * part.shape.numel() for part in self.parts) / self.shape.numel()

    def __repr__(self) -> str:
        return f"QuantizedHeads({', '.join(map(repr, self.parts))})"


Coded = QuantizedTensor | QuantizedHeads
"""An operand as `quantize` returns it."""


def tokens_last(x: QuantizedTensor) -> QuantizedTensor:
    """V in the layout for 8-bit tensor cores: tokens contiguous, and permuted in groups of 16 so that P stays in its registers.

    A packed element holds codes of tokens that are 16 apart.

    In the accumulator of Q K^T a thread holds columns 0 1 and 8 9 of a group, while the operand of P V needs columns 0 1 2 3.
    With V's tokens permuted alike, P need not move between threads.
    """
    precision = x.spec.format
    codes = precision.unpack(x.codes, x.shape[3])
    code_type, zero = codes.dtype, precision.encode(torch.zeros(1, dtype=torch.float32, device="cpu")).view(torch.int8).item()
    # torch has no pad for fp8
    codes = torch.nn.functional.pad(codes.view(torch.int8), (0, 0, 0, -x.shape[2] % (16 * precision.packed)), value=zero).mT
    codes = codes.unflatten(3, (-1, 2, 4, 2)).transpose(4, 5).flatten(3)
    # an element holds tokens 16 apart, so that each plane of unpacked codes is a whole group
    planes = codes.unflatten(3, (-1, precision.packed, 16)).transpose(4, 5).flatten(3).contiguous()
    return replace(x, codes=precision.pack(planes.view(code_type)), layout="tokens_last")


def in_blocks(x: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    """K or V, from another layout, in the panels that CPU kernels for the scheme read."""
    precision, role = x.spec.format, x.spec.role
    multiplied_as_bytes = as_bytes(scheme, role)
    bits = blocks.bits_of(precision, x.stored, multiplied_as_bytes)
    raw = blocks.patterns(_unpacked(x), precision, bits, multiplied_as_bytes, role)
    codes = blocks.of_keys(raw, bits) if role == "k" else blocks.of_values(raw, bits, scheme.key_tile)
    return replace(x, codes=codes, layout="blocks", scheme=scheme)


def canonical(x: QuantizedTensor) -> QuantizedTensor:
    """The inverse of `in_blocks`: codes in the canonical layout. Other layouts are returned unchanged."""
    if x.layout != "blocks":
        return x
    precision = x.spec.format
    codes = x.stored_values().to(x.stored) if precision.bits == 16 else precision.encode(x.stored_values())
    return replace(x, codes=precision.pack(codes), layout="canonical")


def _unpacked(x: QuantizedTensor) -> Tensor:
    """Unpacked codes `[B, H, N, D]`, from any layout but `blocks`."""
    precision, codes = x.spec.format, x.codes
    if x.layout == "canonical":
        return precision.unpack(codes, x.shape[3])
    planes = precision.unpack(codes, codes.shape[3] * precision.packed)
    ordered = planes.view(torch.int8).unflatten(3, (-1, 16, precision.packed)).transpose(4, 5).flatten(3)
    ordered = ordered.unflatten(3, (-1, 4, 2, 2)).transpose(4, 5).flatten(3)
    return ordered.mT[:, :, : x.shape[2]].view(planes.dtype)


def product_values(x: QuantizedTensor) -> Tensor:
    """The values that enter the product, float32: stored codes, or dequantized values rounded to the input's type."""
    return x.scaled_values().to(x.dtype).float() if place(x.spec) == "operand" else x.stored_values()
