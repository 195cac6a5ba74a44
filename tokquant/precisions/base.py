"""The definition of a precision, and the registry of all precisions."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokquant.errors import SchemeError, nearest, quote

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only

    class Absent:
        """Stands in for `triton` and `tl` so that modules of kernels can be imported; kernels are then never called."""

        def jit(self, function: Callable) -> Callable:
            return function

        def constexpr(self, value: Any) -> Any:
            return value

        def __getattr__(self, name: str) -> str:
            return name

    triton: Any = Absent()  # type: ignore[no-redef]
    tl: Any = Absent()  # type: ignore[no-redef]

__all__ = ["PRECISIONS", "Precision", "get", "names", "register", "same", "tl", "triton"]


COMPUTE = ("tl.int8", "tl.float8e4nv", "tl.float8e5", "tl.float16", "tl.bfloat16", "tl.float32")
STORED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32)


def same(codes: Tensor, *_: int) -> Tensor:
    """The identity, for codes that are stored one per element and need no packing."""
    return codes


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How numbers are encoded in a few bits: the definition in torch, and the same as fragments of kernels.

    A scaled value `x / s`, clamped to [-largest, largest], goes through `encode` to a code; `decode` gives the
    number that a code stands for; `pack` and `unpack` turn codes into stored elements and back.
    """

    name: str
    bits: int
    kind: Literal["int", "float"]
    largest: float | None
    """The value that the largest magnitude of a group maps to (R); None where values are stored as they are."""
    stored: torch.dtype
    packed: int = 1
    """Codes in one stored element, along the last dimension."""
    roles: str = "qkv"
    """The operands that may have it, among q, k, v and p."""
    encode: Callable[[Tensor], Tensor]
    """Scaled and clamped float32 values -> codes, one per element, rounded half to even."""
    decode: Callable[[Tensor], Tensor]
    """Codes -> float32 values, exactly."""
    pack: Callable[[Tensor], Tensor] = same
    """Codes `[..., D]` -> stored elements `[..., ceil(D / packed)]`."""
    unpack: Callable[[Tensor, int], Tensor] = same
    """Stored elements and D -> codes `[..., D]`."""
    compute: str
    """The Triton type that `triton_decode` returns, as text for a kernel."""
    triton_decode: Any
    """`@triton.jit`: a stored tile `[N, W]` -> values in `compute`: `[N, W]`, or where packed `[N, W, packed]`, as `tl.join`
    stacks them. How they are then laid side by side is the kernel's choice."""
    triton_decode_ptx: Any = None
    """Replaces `triton_decode` on NVIDIA GPUs: the same values in fewer instructions. It may use inline PTX."""
    triton_decode_high: Any = None
    """For integers of fewer than 8 bits: as `triton_decode`, but with each code in the highest bits of its byte, so that the
    int8 values are 2^(8 - bits) times as large. Used where a scale can undo that, as it needs fewer instructions."""
    triton_decode_high_ptx: Any = None
    """Replaces `triton_decode_high` on NVIDIA GPUs."""
    triton_encode: Any = None
    """`@triton.jit`: float32 P in units of its codes -> P as the product takes it. Needed for role p."""
    triton_encode_interpreted: Any = None
    """Replaces `triton_encode` in Triton's interpreter, where the interpreter rounds wrongly."""
    triton_quantize: Any = None
    """`@triton.jit`: scaled and clamped float32 values `[N, D]` -> stored elements `[N, D / packed]`, bit for bit what `encode`
    and `pack` give. Without it `encode` quantizes on a GPU, where a KV cache then refuses the precision."""
    triton_quantize_interpreted: Any = None
    """Replaces `triton_quantize` in Triton's interpreter, where the interpreter rounds wrongly."""
    cpp_encode: str = ""
    """C++: `static inline floats encode_p(floats p)`, which rounds P in units of its codes to what a code stands for. Needed
    for role p on a CPU."""
    cpp_decode: str = ""
    """C++: an expression for the float32 values of the stored codes in the low bits of `ints code`. Without it values are
    looked up in a table in memory, which is slower; tables that fit in registers are used in any case."""
    cpp_quantize: str = ""
    """C++: an expression for the codes of scaled and clamped `floats x`, in the low bits of `ints`: those of `encode`, or of
    integers the number in two's complement. Without it `encode` quantizes on a CPU."""
    code_zero: int = 0
    """What `triton_encode` subtracts so that unsigned codes fit a signed unit."""

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.name):
            raise ValueError(f"name: {quote(self.name)} is no name for a precision; use lower-case letters, digits and _")
        for name, right, words in (
            ("bits", type(self.bits) is int and 1 <= self.bits <= 32, "a whole number from 1 to 32"),
            ("kind", self.kind in ("int", "float"), "int or float"),
            ("largest", self.largest is None or _above_zero(self.largest), "a number above zero and finite, or None"),
            ("stored", isinstance(self.stored, torch.dtype), "a torch.dtype"),
            ("packed", self.packed in (1, 2, 4, 8), "1, 2, 4 or 8"),
            ("roles", bool(self.roles) and set(self.roles) <= set("qkvp"), "some of the letters q, k, v and p"),
            *((name, callable(getattr(self, name)), "a function") for name in ("encode", "decode", "pack", "unpack")),
            ("compute", self.compute in COMPUTE, f"one of {', '.join(COMPUTE)}"),
        ):
            if not right:
                raise ValueError(f"{name}: {quote(getattr(self, name))} of precision {self.name!r} is not {words}")
        if self.stored not in STORED:
            raise ValueError(f"stored: {self.stored} of precision {self.name!r} is not one of {', '.join(map(str, STORED))}")
        if self.bits * self.packed > 8 * self.stored.itemsize:
            raise ValueError(f"packed: {self.packed} codes of {self.bits} bits do not fit an element of {self.stored}")
        if self.bits < 8 * self.stored.itemsize and self.stored.itemsize > 1:
            raise ValueError(f"stored: {self.stored} for {self.bits} bits; codes of up to 8 bits lie in elements of a byte")
        if "p" in self.roles and self.triton_encode is None:
            raise ValueError(f"triton_encode: {self.name!r} may code P (roles={self.roles!r}), so it needs one")

    @property
    def stored_bits(self) -> float:
        """Bits of memory per code: more than `bits` where codes do not fill the stored element."""
        return 8 * self.stored.itemsize / self.packed

    @property
    def levels(self) -> int:
        """Steps from the lowest code to the highest: 255 for 8 bits."""
        return 2**self.bits - 1

    def values(self) -> Tensor:
        """Every finite number that a stored byte stands for, float32; for precisions of at most 8 bits."""
        stored = torch.arange(256, dtype=torch.uint8, device="cpu").view(self.stored)
        values = self.decode(self.unpack(stored[:, None], self.packed)).unique()
        return values[values.isfinite()]

    @property
    def in_bfloat(self) -> bool:
        """Whether bfloat16 holds every number that a code stands for."""
        if self.bits > 8:
            return self.stored == torch.bfloat16
        values = self.values()
        return torch.equal(values, values.bfloat16().float())

    def of(self, dtype: torch.dtype) -> "Precision":
        """The precision that values of a tensor are stored in: for unscaled 16-bit floats the tensor's own type."""
        own = self.bits == 16 and self.largest is None and dtype != torch.float32
        return get({torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]) if own else self

    def __repr__(self) -> str:
        return f"<precision {self.name}: {self.bits} bits>"


def _above_zero(x: Any) -> bool:
    return isinstance(x, int | float) and 0 < x < math.inf


PRECISIONS: dict[str, Precision] = {}
WHEN_REPLACED: list[Callable[[], None]] = []
"""Functions that clear caches of what was derived from precisions by name; called when one is replaced."""


def register(precision: Precision, *, replace: bool = False) -> Precision:
    """Make a precision known by its name to schemes, quantization and kernels.

    Raises ValueError if the name is taken, unless `replace` is True (useful in a notebook). Existing codes, and a KVCache with
    its kernels, keep the definition that was replaced: quantize again, and make a new cache.
    """
    if not isinstance(precision, Precision):
        raise TypeError(f"precision: {quote(precision)}; give a tokquant.Precision")
    if precision.name in PRECISIONS and not replace:
        raise ValueError(f"name: a precision {precision.name!r} is already registered; replace=True takes its place")
    if precision.name in PRECISIONS:
        for forget in WHEN_REPLACED:
            forget()
    PRECISIONS[precision.name] = precision
    return precision


def names(role: str = "") -> list[str]:
    """The registered names, or those that may code the operand `role`."""
    return [name for name, precision in PRECISIONS.items() if role in precision.roles]


def get(name: object, role: str = "") -> Precision:
    """The precision of that name. Raises SchemeError with the nearest name if there is none, or not for `role`."""
    if isinstance(name, str) and name in PRECISIONS and role in PRECISIONS[name].roles:
        return PRECISIONS[name]
    known = names(role)
    if not isinstance(name, str) or name not in PRECISIONS:
        raise SchemeError(f"no precision {quote(name)}; use one of {', '.join(known)}{nearest(name, known)}")
    raise SchemeError(f"{role.upper()} cannot be {name}; use one of {', '.join(known)}")
