"""Arithmetic instructions as functions of arrays, with one element per thread."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

Array = np.ndarray
Function = Callable[..., Array | tuple[Array, ...]]

RAW = {1: np.dtype(bool), 8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
INTEGERS = {f"{sign}{bits}": np.dtype(f"{kind}{bits // 8}") for sign, kind in ("si", "uu", "bu") for bits in (8, 16, 32, 64)}
EXTREME_MODES = {"ftz", "NaN", "relu", "xorsign", "abs"}
MODES = {
    "min": EXTREME_MODES, "max": EXTREME_MODES, "mul": {"rn", "ftz", "lo", "hi", "wide"},
    "cvt": {"rn", "rz", "rni", "rzi", "sat", "satfinite"}, "cvta": {"local"},
}  # fmt: skip
"""Supported modifiers by instruction; any other raises an error."""
DEFAULT_MODES = {"rn", "ftz", "approx", "full", "lo", "wide"}
"""Supported modifiers of all other instructions."""


@cache
def bits(kind: str) -> int:
    """Width of a type in bits; for a pair, of both halves together."""
    if kind == "pred":
        return 1
    name, _, pair = kind.partition("x")
    return (8 if name.startswith("e") else int(name.lstrip("subf"))) * (int(pair) if pair else 1)


def typed(raw: Array, kind: str) -> Array:
    """Interpret registers' bits as a type: one value per thread, or two for a pair, the lower half first."""
    if kind == "pred":
        return raw
    name, _, pair = kind.partition("x")
    width = bits(name)
    raw = raw.astype(RAW[bits(kind)], copy=False)
    if pair:
        raw = np.ascontiguousarray(raw)[..., None].view(RAW[width])
    if name in ("bf16", "e4m3", "e5m2"):
        return torch.from_numpy(raw.view(np.dtype(f"i{width // 8}"))).view(TORCH[name]).float().numpy()
    return raw.view(FLOATS.get(name) or INTEGERS[name])


def raw(values: Array, kind: str) -> Array:
    """The inverse of `typed`: bits of values, rounded to the type to nearest even; 8-bit floats saturate."""
    if kind == "pred":
        return values
    name, _, pair = kind.partition("x")
    if name in ("bf16", "e4m3", "e5m2"):
        result = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        if name != "bf16":
            largest = torch.finfo(TORCH[name]).max
            result = result.clamp(-largest, largest)  # keeps NaN
        result = result.to(TORCH[name]).view(torch.int16 if name == "bf16" else torch.int8).numpy()
    else:
        with np.errstate(over="ignore"):
            result = np.asarray(values, FLOATS.get(name) or INTEGERS[name])
    result = np.ascontiguousarray(result).view(RAW[bits(name)])
    return result.view(RAW[bits(kind)])[..., 0] if pair else result


TORCH = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def to_half_toward_zero(x: Array) -> Array:
    """Convert to float16, rounding toward zero."""
    result = x.astype(np.float16)
    return np.where(np.abs(result.astype(x.dtype)) > np.abs(x), np.nextafter(result, np.float16(0)), result)


def flush(x: Array) -> Array:
    """Flush subnormal numbers to zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """`a b + c` of float32 or less, rounded once: the float64 sum is rounded to odd, so rounding it again gives the same as
    rounding the exact sum."""
    product = a.astype(np.float64) * b
    total = np.asarray(product + c)
    added = total - product
    error = (product - (total - added)) + (c - added)
    bits = total.view(np.int64)
    adjust = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    return (bits + np.where(adjust, np.where((error > 0) == (total > 0), 1, -1), 0)).view(np.float64).astype(a.dtype)


def widened(function: Function) -> Function:
    """The function applied to operands extended to twice their width."""
    return lambda a, b, *c: function(a.astype(doubled(a.dtype)), b.astype(doubled(a.dtype)), *c)


def doubled(kind: np.dtype) -> np.dtype:
    return np.dtype(f"{kind.kind}{2 * kind.itemsize}")


def quotient_toward_zero(a: Array, b: Array) -> Array:
    """Integer division toward zero."""
    return (np.sign(a) * np.sign(b)).astype(a.dtype) * (np.abs(a) // np.abs(np.where(b == 0, 1, b))).astype(a.dtype)


def clamped_shift(function: Function) -> Function:
    """Shift, with larger counts clamped to the width, for which numpy leaves the result undefined."""

    def shift(a: Array, count: Array) -> Array:
        width = 8 * a.dtype.itemsize
        within = function(a, np.minimum(count, width - 1).astype(a.dtype))
        gone = np.zeros_like(a) if function is np.left_shift or a.dtype.kind == "u" else np.where(a < 0, -1, 0).astype(a.dtype)
        return np.where(count < width, within, gone)

    return shift


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, as a table: the result is its bit `4 a + 2 b + c`."""
    result = np.zeros_like(a)
    for place in range(8):
        inputs = [x if place >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
        result |= np.where(table >> place & 1, inputs[0] & inputs[1] & inputs[2], 0)
    return result


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of two registers; a selector's fourth bit repeats the byte's sign."""
    both = np.stack([a, b], axis=-1).view(np.uint8)
    result = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = np.take_along_axis(both, (chosen & 7).astype(np.int64)[:, None], axis=1)[:, 0]
        byte = np.where(chosen & 8, np.where(byte >> 7, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * place)
    return result


def funnel(direction: str) -> Function:
    """`shf.wrap`: shift a pair of registers, the lower first; left gives the upper one, right the lower one."""

    def shift(low: Array, high: Array, by: Array) -> Array:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = (by & 31).astype(np.uint64)
        return (both << by >> np.uint64(32) if direction == "l" else both >> by).astype(np.uint32)

    return shift


def extract(a: Array, start: Array, length: Array) -> Array:
    """`bfe`: extract a bit field; signed types extend its sign."""
    width = 8 * a.dtype.itemsize
    length = np.minimum(length & 255, width - (start & 255)).astype(np.int64)
    up = (width - length - (start & 255).astype(np.int64)).astype(a.dtype)
    moved = clamped_shift(np.left_shift)(a, up)
    return np.where(length == 0, 0, clamped_shift(np.right_shift)(moved, (width - length).astype(a.dtype))).astype(a.dtype)


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """`bfi`: insert the lowest bits of `a` as a bit field of `b`."""
    ones = clamped_shift(np.left_shift)(np.full_like(a, 1), length) - 1
    place = clamped_shift(np.left_shift)(ones, start)
    return b & ~place | clamped_shift(np.left_shift)(a, start) & place


COMPARISONS = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b), "neu": np.not_equal,
}  # fmt: skip
COMPARISONS |= {
    f"{name}u": lambda a, b, test=COMPARISONS[name]: test(a, b) | (a != a) | (b != b) for name in ("eq", "lt", "le", "gt", "ge")
}

FUNCTIONS: dict[str, Function] = {
    "mov": lambda a: a,
    "cvta": lambda a: a,  # state-space and generic addresses are the same here
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
    "not": lambda a: ~a,
    "neg": lambda a: np.negative(a) if a.dtype.kind != "u" else 0 - a,
    "abs": np.abs,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": fused_multiply_add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": clamped_shift(np.left_shift),
    "shr": clamped_shift(np.right_shift),
    "lop3": lop3,
    "prmt": prmt,
    "bfe": extract,
    "bfi": insert,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


OPERAND_TYPES = {
    "shl": "{} u32", "shr": "{} u32", "bfe": "{} u32 u32", "bfi": "{} {} u32 u32", "lop3": "{} {} {} {}", "selp": "{} {} pred",
}  # fmt: skip
"""Types of an instruction's operands, where they do not all have the type of the instruction (`{}`)."""


@cache
def function(opcode: str) -> tuple[Function, tuple[str, ...], str]:
    """An instruction's function, the types of its operands, and the type of its result. Raises KeyError for an unknown one."""
    name, *parts = opcode.split(".")
    if name == "setp":
        return comparison(*parts)
    if name == "shf" and parts[1:] == ["wrap", "b32"]:
        return funnel(parts[0]), ("b32", "b32", "u32"), "b32"
    supported = MODES.get(name, DEFAULT_MODES)
    modes, kinds = {part for part in parts if part in supported}, [part for part in parts if part not in supported]
    if name == "cvt" and len(kinds) == 2:
        return conversion(*kinds, modes)
    if len(kinds) != 1:
        raise KeyError(opcode)
    kind = kinds[0]
    apply = function_of_type(name, kind, modes)
    if "wide" in modes:
        wide_kind = f"{kind[0]}{2 * bits(kind)}"
        return widened(apply), (kind, kind, wide_kind), wide_kind
    if "ftz" in modes:
        return (lambda *a: flush(apply(*map(flush, a)))), (kind,) * 3, kind
    return apply, tuple(OPERAND_TYPES.get(name, "{} {} {}").replace("{}", kind).split()), "u32" if name == "popc" else kind


def function_of_type(name: str, kind: str, modes: set[str]) -> Function:
    """The function of an instruction for a type; some instructions depend on the type or on modes."""
    floating = kind.startswith(("f", "bf"))
    if name in ("min", "max"):
        choose = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}[name][floating and "NaN" not in modes]
        if "xorsign" in modes:
            return lambda a, b: np.copysign(choose(np.abs(a), np.abs(b)), np.copysign(1, a) * b)
        return (lambda a, b: np.maximum(choose(a, b), 0)) if "relu" in modes else choose
    if name in ("div", "rem"):
        quotient = np.divide if floating else quotient_toward_zero if kind[0] == "s" else lambda a, b: a // np.maximum(b, 1)
        return quotient if name == "div" else lambda a, b: a - quotient(a, b) * b
    if "hi" in modes:
        return lambda a, b: (a.astype(doubled(a.dtype)) * b >> 8 * a.itemsize).astype(a.dtype)
    return np.logical_not if (name, kind) == ("not", "pred") else FUNCTIONS[name]


def comparison(test: str, *rest: str) -> tuple[Function, tuple[str, ...], str]:
    """`setp`, which may combine the result of the comparison with a predicate."""
    *join, kind = rest
    compare = COMPARISONS[test]
    if not join:
        return compare, (kind, kind), "pred"
    both = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join[0]]
    return (lambda a, b, c: both(compare(a, b), c)), (kind, kind, "pred"), "pred"


def conversion(to: str, of: str, modes: set[str]) -> tuple[Function, tuple[str, ...], str]:
    """`cvt`: between types, or from two floats to a pair, with the first as the upper half."""
    pair = to.endswith("x2") and not of.endswith("x2")
    unsupported = ("sat" in modes and to not in INTEGERS) or ("satfinite" in modes and to[0] != "e")
    if unsupported or ("rz" in modes and (to, of) != ("f16", "f32")):
        raise KeyError(f"cvt to {to} of {modes}")

    def convert(*operands: Array) -> Array:
        x = np.stack(operands[::-1], axis=-1) if pair else operands[0]
        if "rz" in modes:
            x = to_half_toward_zero(x)
        if x.dtype.kind == "f" and modes & {"rni", "rzi"}:
            x = np.trunc(x) if "rzi" in modes else np.rint(x)
        if to[0] in "su" and x.dtype.kind == "f":
            limits = np.iinfo(INTEGERS[to])
            x = np.clip(np.nan_to_num(x.astype(np.float64)), limits.min, limits.max)
            x = np.where(x >= 2.0**63, limits.max, x.astype(np.int64)) if bits(to) == 64 else x.astype(np.int64)
        if to[0] in "su" and x.dtype.kind in "iu" and "sat" in modes:
            x = np.clip(x, *(getattr(np.iinfo(INTEGERS[to]), end) for end in ("min", "max")))
        return x.astype(INTEGERS[to]) if to in INTEGERS else x

    return convert, (of,) * (2 if pair else 1), to
