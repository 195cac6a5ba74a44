"""Runs attention kernels on a CPU: turns operands into the arguments that a kernel's text declares, and calls it."""

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
from tokquant.tensor import QuantizedTensor, in_blocks, product_values

Arguments = dict[str, Tensor | int | None]
"""Arguments of a kernel, by their names in its text."""
TYPES = {"int64_t": "q", "float": "f", "*": "P"}
"""The format characters of `struct` for C++ types."""
NUMBERS = (int, float)

PREPARED: WeakKeyDictionary[QuantizedTensor, Tensor] = WeakKeyDictionary()
"""Arguments that quantization kernels have written beside the codes: Q as products read it, and V's scales with signs."""

_arguments: WeakKeyDictionary[QuantizedTensor, Arguments] = WeakKeyDictionary()


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

    Work is divided by the shapes of a single sequence, so results depend neither on the number of threads nor on the batch.

    Raises UnsupportedError without a compiler, and for what no kernel supports.
    """
    if q.device.type != "cpu":
        raise UnsupportedError(f"backend: 'cpu' takes tensors in memory, and q is on {q.device}; move them, or use 'triton'")
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    kinds: dict[str, Any] = dict(dtype=v.dtype, output=q.dtype, instructions=build.instructions())
    planned = plan(scheme, head_dim=d, wanted=Wanted.of(features, return_lse), **kinds)
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu") if return_lse else None
    left, right = features.reach()
    arguments: dict[str, Any] = dict(
        batch=b, heads=heads, kv_heads=k.shape[1], n_q=n_q, n_k=n_k, threads=torch.get_num_threads(), out=out, lse=lse,
        table=None, pages=0, page=0, lengths=None, newer=None,
        left=left, right=right, scale=features.scale, softcap=features.softcap,
        **operand_arguments(q, scheme), **operand_arguments(k, scheme), **operand_arguments(v, scheme),
        **feature_arguments(features),
    )  # fmt: skip
    run(planned, arguments)
    return out, lse


def run(planned: CpuPlan, arguments: Mapping[str, Any]) -> None:
    """Run a plan's kernel. `arguments` has tensors and numbers by their names in its text, and may have more than it needs."""
    function, names, pack = load(planned)
    # numbers are tested for, because isinstance with Tensor is slower
    raw = [0 if x is None else x if isinstance(x, NUMBERS) else x.data_ptr() for x in map(arguments.__getitem__, names)]
    function(pack(*raw))


@lru_cache(maxsize=256)
def load(planned: CpuPlan) -> tuple[Callable[[bytes], None], tuple[str, ...], Callable[..., bytes]]:
    """A plan's kernel, the names of its arguments in the order of its text, and a function that packs their values."""
    text = generate.render(planned)
    function = getattr(build.load(planned.name, text, planned.instructions, planned.flags), planned.template)
    function.restype, function.argtypes = None, (ctypes.c_char_p,)
    declared = re.search(r"struct Arguments \{\n(.*?)\n\};", text, re.DOTALL)
    assert declared is not None
    fields = re.findall(r"^    (?:const )?(\w+)(\*?) (\w+);", declared[1], re.MULTILINE)
    # "0q": padded to a multiple of 8 bytes, as in C++
    layout = Struct("".join(TYPES[star or kind] for kind, star, _ in fields) + "0q")
    return function, tuple(name for *_, name in fields), layout.pack


def packed(operands: launch.Operands, scheme: QuantScheme) -> launch.Operands:
    """Quantized operands in the memory layouts that kernels take."""
    q, k, v = operands
    return q, _in_blocks(k, scheme), _in_blocks(v, scheme)


def _in_blocks(x: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    return x if x.layout == "blocks" else in_blocks(x, scheme)


def operand_arguments(x: QuantizedTensor, scheme: QuantScheme) -> Arguments:
    """The arguments of an operand. They are computed once, and kept as long as the operand exists."""
    arguments = _arguments.get(x)
    if arguments is None:
        arguments = _arguments[x] = {"q": _queries, "k": _keys, "v": _values}[x.spec.role](x, scheme)
    return arguments


def _queries(q: QuantizedTensor, scheme: QuantScheme) -> Arguments:
    scaled = q.scale is not None and place(q.spec) == "scores"
    return {
        "q": _q_in_products(q, scheme).contiguous(),
        "q_scale": _floats(q.spread(q.scale), (*q.shape[:3], 1)) if scaled else None,  # type: ignore[arg-type]
        "q_sum": None if q.code_sum is None else q.code_sum.contiguous(),
        "logit_offset": None if q.logit_offset is None else q.logit_offset.contiguous(),
        "q_mean": q.offset.float() if q.spec.smooth == "block_mean" else None,  # type: ignore[union-attr]
    }


def _q_in_products(q: QuantizedTensor, scheme: QuantScheme) -> Tensor:
    if q in PREPARED:
        return PREPARED[q]
    if as_bytes(scheme, "k"):
        return q.codes if q.codes.dtype == torch.int8 else q.stored_values().to(torch.int8)
    return product_values(q)


def _keys(k: QuantizedTensor, scheme: QuantScheme) -> Arguments:
    k = _in_blocks(k, scheme)
    companion = None if k.companion is None else panels(k.companion)
    return {"k": k.codes, "k_page": k.codes.stride(0), "k_head": k.codes.stride(1), "companion": companion, **_scales(k)}


def _values(v: QuantizedTensor, scheme: QuantScheme) -> Arguments:
    v = _in_blocks(v, scheme)
    mean = None if v.offset is None else per_channel(v, v.offset)
    arguments: Arguments = {"v": v.codes, "v_page": v.codes.stride(0), "v_head": v.codes.stride(1), "v_mean": mean}
    if place(v.spec) != "output":
        return arguments | _scales(v)
    origin = None if v.origin is None else per_channel(v, v.origin)
    return arguments | {"v_scale": per_channel(v, v.scale), "v_zero": origin}  # type: ignore[arg-type]


def _scales(x: QuantizedTensor) -> Arguments:
    """Scales and zeros of K or V, with the strides of sequences and heads."""
    if x.scale is None:
        return {}
    role, scale = x.spec.role, x.scale
    if x.log2_weight is not None and x in PREPARED:
        scale = PREPARED[x]
    elif x.log2_weight is not None:
        # a token whose codes are all zero is marked by a negative scale
        exact = scale.float()
        scale = torch.where(x.log2_weight == exact.log2(), exact, -exact).to(scale.dtype)
    return scale_arguments(role, scale.contiguous(), None if x.zero is None else x.zero.contiguous())


def steps(x: Tensor) -> tuple[int, int]:
    """Strides of pages or sequences, and of heads; zero for dimensions of size 1, so that they broadcast."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def scale_arguments(role: str, scale: Tensor, zero: Tensor | None) -> Arguments:
    """The arguments of contiguous scales and zeros of K or V."""
    page, head = steps(scale)
    return {f"{role}_scale": scale, f"{role}_zero": zero, f"{role}_scale_page": page, f"{role}_scale_head": head}


def per_channel(x: QuantizedTensor, values: Tensor) -> Tensor:
    """Values of `x`, `[B | 1, H | 1, 1, D | 1]`, as `[B, H, 1, D]` float32, with D rounded up to whole panels."""
    b, h, _, d = x.shape
    values = _floats(values, (b, h, 1, d))
    return torch.nn.functional.pad(values, (0, -d % LANES)) if d % LANES else values


def _floats(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` broadcast to a shape, contiguous float32."""
    return (x if x.shape == shape else x.expand(shape)).float().contiguous()


def feature_arguments(features: Features) -> dict[str, Any]:
    """The arguments of mask, sinks and bias."""
    arguments: dict[str, Any] = {}
    if features.mask is not None:
        boolean = features.mask.dtype == torch.bool
        mask = features.mask.view(torch.uint8) if boolean else features.mask
        arguments |= _strided("mask", mask, torch.uint8 if boolean else torch.float32, "batch", "head", "row", "column")
    if features.sinks is not None:
        arguments["sinks"] = features.sinks.float().contiguous()
    match features.bias:
        case Alibi() as bias:
            arguments["slopes"] = bias.slopes.contiguous()
        case KeyVector() as bias:
            values = torch.nn.functional.pad(_unexpanded(bias.values, 2), (0, -bias.values.shape[-1] % LANES))
            arguments |= _strided("key_bias", values, torch.float32, "batch", "head")
        case LowRank() as bias:
            keys = panels(_unexpanded(bias.k_factors, 2)).flatten(2)
            arguments |= _strided("q_factors", _unexpanded(bias.q_factors, 2), torch.float32, "batch", "head")
            arguments |= _strided("k_factors", keys, torch.float32, "batch", "head")
        case Dense() as bias:
            arguments |= _strided("bias", bias.values, torch.float32, "batch", "head", "row", "column")
    return arguments


def _unexpanded(x: Tensor, dimensions: int) -> Tensor:
    """`x` with size 1 in those of its first `dimensions` that are expanded."""
    for dimension in range(dimensions):
        if x.stride(dimension) == 0:
            x = x.narrow(dimension, 0, 1)
    return x


def _strided(name: str, x: Tensor, kind: torch.dtype, *dimensions: str) -> dict[str, Any]:
    x = _unexpanded(x, len(dimensions)).to(kind).contiguous()
    return {name: x, **{f"{name}_{dimension}": step for dimension, step in zip(dimensions, launch.steps(x), strict=False)}}
