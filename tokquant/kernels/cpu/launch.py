"""The only place that starts a CPU kernel: operands to what its text asks for, the call."""

import ctypes
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokquant.bias import Alibi, Dense, KeyVector, LowRank
from tokquant.blocks import LANES, panels
from tokquant.errors import UnsupportedError
from tokquant.features import Features
from tokquant.kernels import launch
from tokquant.kernels.cpu import build, generate
from tokquant.kernels.cpu.plan import CpuPlan, plan
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import as_bytes, place
from tokquant.tensor import QuantizedTensor, in_blocks, met

Fields = dict[str, Tensor | int | None]
TYPES = {"int64_t": "q", "float": "f", "*": "P"}
"""C++ types as `struct` writes them."""
NUMBERS = (int, float)

READ: WeakKeyDictionary[QuantizedTensor, Tensor] = WeakKeyDictionary()
"""What products read of Q's codes, or of V's scales with signs, where quantization made it with them."""

_laid_out: WeakKeyDictionary[QuantizedTensor, Fields] = WeakKeyDictionary()


def attention(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedTensor,
    scheme: QuantScheme,
    features: Features,
    return_lse: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention on codes by the scheme's C++ kernel: out `[B, H_q, N_q, D]` in q's type, LSE `[B, H_q, N_q]` float32 or None.

    Work is divided by the shapes of one sequence alone: results depend neither on the number of threads nor on the batch.

    Raises UnsupportedError where there is no compiler, and for what no kernel does.
    """
    if q.device.type != "cpu":
        raise UnsupportedError(f"backend: 'cpu' takes tensors in memory, and q is on {q.device}; move them, or use 'triton'")
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    kinds: dict[str, Any] = dict(dtype=v.dtype, output=q.dtype, instructions=build.instructions())
    made = plan(scheme, head_dim=d, wanted=Wanted.of(features, return_lse), **kinds)
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu") if return_lse else None
    left, right = features.reach()
    given: dict[str, Any] = dict(
        batch=b, heads=heads, kv_heads=k.shape[1], n_q=n_q, n_k=n_k, threads=torch.get_num_threads(), out=out, lse=lse,
        table=None, pages=0, page=0, lengths=None, newer=None,
        left=left, right=right, scale=features.scale, softcap=features.softcap,
        **laid_out(q, scheme), **laid_out(k, scheme), **laid_out(v, scheme), **of_features(features),
    )  # fmt: skip
    start(made, given)
    return out, lse


def start(made: CpuPlan, given: Mapping[str, Any]) -> None:
    """Run a plan's kernel on tensors and numbers by the names in its text, which may be some of those given."""
    function, names, pack = load(made)
    # to ask whether something is a tensor takes longer
    raw = [0 if x is None else x if isinstance(x, NUMBERS) else x.data_ptr() for x in map(given.__getitem__, names)]
    function(pack(*raw))


@lru_cache(maxsize=256)
def load(made: CpuPlan) -> tuple[Callable[[bytes], None], tuple[str, ...], Callable[..., bytes]]:
    """A plan's kernel, the names of its arguments as the text declares them, and how these lie in memory."""
    text = generate.render(made)
    function = getattr(build.load(made.name, text, made.instructions, made.flags), made.template)
    function.restype, function.argtypes = None, (ctypes.c_char_p,)
    declared = re.search(r"struct Arguments \{\n(.*?)\n\};", text, re.DOTALL)
    assert declared is not None
    fields = re.findall(r"^    (?:const )?(\w+)(\*?) (\w+);", declared[1], re.MULTILINE)
    # "0q": padded to a multiple of 8 bytes, as in C++
    layout = Struct("".join(TYPES[star or kind] for kind, star, _ in fields) + "0q")
    return function, tuple(name for *_, name in fields), layout.pack


def packed(operands: launch.Operands, scheme: QuantScheme) -> launch.Operands:
    """Quantized operands as kernels want them to lie in memory."""
    q, k, v = operands
    return q, _in_blocks(k, scheme), _in_blocks(v, scheme)


def _in_blocks(x: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    return x if x.layout == "blocks" else in_blocks(x, scheme)


def laid_out(x: QuantizedTensor, scheme: QuantScheme) -> Fields:
    """What a kernel reads of an operand, by the names in its text. Made once, and kept as long as the operand."""
    found = _laid_out.get(x)
    if found is None:
        found = _laid_out[x] = {"q": _queries, "k": _keys, "v": _values}[x.spec.role](x, scheme)
    return found


def _queries(q: QuantizedTensor, scheme: QuantScheme) -> Fields:
    scaled = q.scale is not None and place(q.spec) == "scores"
    return {
        "q": _read(q, scheme).contiguous(),
        "q_scale": _each(q.spread(q.scale), (*q.shape[:3], 1)) if scaled else None,  # type: ignore[arg-type]
        "q_sum": None if q.code_sum is None else q.code_sum.contiguous(),
        "logit_offset": None if q.logit_offset is None else q.logit_offset.contiguous(),
        "q_mean": q.offset.float() if q.spec.smooth == "block_mean" else None,  # type: ignore[union-attr]
    }


def _read(q: QuantizedTensor, scheme: QuantScheme) -> Tensor:
    if q in READ:
        return READ[q]
    if as_bytes(scheme, "k"):
        return q.codes if q.codes.dtype == torch.int8 else q.stored_values().to(torch.int8)
    return met(q)


def _keys(k: QuantizedTensor, scheme: QuantScheme) -> Fields:
    k = _in_blocks(k, scheme)
    companion = None if k.companion is None else panels(k.companion)
    return {"k": k.codes, "k_page": k.codes.stride(0), "k_head": k.codes.stride(1), "companion": companion, **_scales(k)}


def _values(v: QuantizedTensor, scheme: QuantScheme) -> Fields:
    v = _in_blocks(v, scheme)
    mean = None if v.offset is None else of_channels(v, v.offset)
    fields: Fields = {"v": v.codes, "v_page": v.codes.stride(0), "v_head": v.codes.stride(1), "v_mean": mean}
    if place(v.spec) != "output":
        return fields | _scales(v)
    origin = None if v.origin is None else of_channels(v, v.origin)
    return fields | {"v_scale": of_channels(v, v.scale), "v_zero": origin}  # type: ignore[arg-type]


def _scales(x: QuantizedTensor) -> Fields:
    """Scales and zeros as they are, and how far apart those of sequences and heads lie."""
    if x.scale is None:
        return {}
    role, scale = x.spec.role, x.scale
    if x.log2_weight is not None and x in READ:
        scale = READ[x]
    elif x.log2_weight is not None:
        # a token whose codes are all zero says so by its sign
        exact = scale.float()
        scale = torch.where(x.log2_weight == exact.log2(), exact, -exact).to(scale.dtype)
    return of_scales(role, scale.contiguous(), None if x.zero is None else x.zero.contiguous())


def steps(x: Tensor) -> tuple[int, int]:
    """Numbers to the next page or sequence and to the next head; zero where all share one."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def of_scales(role: str, scale: Tensor, zero: Tensor | None) -> Fields:
    """Contiguous ones of K or V."""
    page, head = steps(scale)
    return {f"{role}_scale": scale, f"{role}_zero": zero, f"{role}_scale_page": page, f"{role}_scale_head": head}


def of_channels(x: QuantizedTensor, each: Tensor) -> Tensor:
    """`[B | 1, H | 1, 1, D | 1] -> [B, H, D]` float32, with D rounded up to whole panels."""
    b, h, _, d = x.shape
    each = _each(each, (b, h, 1, d))
    return torch.nn.functional.pad(each, (0, -d % LANES)) if d % LANES else each


def _each(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One float32 for each place of a shape that `x` broadcasts to."""
    return (x if x.shape == shape else x.expand(shape)).float().contiguous()


def of_features(features: Features) -> dict[str, Any]:
    """Masks, sinks and bias, by the names in a kernel's text."""
    given: dict[str, Any] = {}
    if features.mask is not None:
        boolean = features.mask.dtype == torch.bool
        mask = features.mask.view(torch.uint8) if boolean else features.mask
        given |= _strided("mask", mask, torch.uint8 if boolean else torch.float32, "batch", "head", "row", "column")
    if features.sinks is not None:
        given["sinks"] = features.sinks.float().contiguous()
    match features.bias:
        case Alibi() as bias:
            given["slopes"] = bias.slopes.contiguous()
        case KeyVector() as bias:
            values = torch.nn.functional.pad(_once(bias.values, 2), (0, -bias.values.shape[-1] % LANES))
            given |= _strided("key_bias", values, torch.float32, "batch", "head")
        case LowRank() as bias:
            keys = panels(_once(bias.k_factors, 2)).flatten(2)
            given |= _strided("q_factors", _once(bias.q_factors, 2), torch.float32, "batch", "head")
            given |= _strided("k_factors", keys, torch.float32, "batch", "head")
        case Dense() as bias:
            given |= _strided("bias", bias.values, torch.float32, "batch", "head", "row", "column")
    return given


def _once(x: Tensor, dimensions: int) -> Tensor:
    """`x` with the first dimensions that only repeat it cut to one."""
    for dimension in range(dimensions):
        if x.stride(dimension) == 0:
            x = x.narrow(dimension, 0, 1)
    return x


def _strided(name: str, x: Tensor, kind: torch.dtype, *dimensions: str) -> dict[str, Any]:
    x = _once(x, len(dimensions)).to(kind).contiguous()
    return {name: x, **{f"{name}_{dimension}": step for dimension, step in zip(dimensions, launch.steps(x), strict=False)}}
