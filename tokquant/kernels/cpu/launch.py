"""The only place that starts a CPU kernel: operands to what its text asks for, the call."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokquant.bias import Alibi, Dense, KeyVector, LowRank
from tokquant.blocks import BYTES, LANES, of_keys, of_values, panels
from tokquant.errors import UnsupportedError
from tokquant.kernels import launch
from tokquant.kernels.cpu import build, generate
from tokquant.kernels.cpu.plan import CpuPlan, integers, plan
from tokquant.reference import Features
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor, met

Fields = dict[str, Tensor]
TYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}

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

    Every row is one thread's, so results depend neither on the number of threads nor on the batch.

    Raises UnsupportedError where there is no compiler, and for what no kernel does.
    """
    if q.device.type != "cpu":
        raise UnsupportedError(f"backend: 'cpu' takes tensors in memory, and q is on {q.device}; move them, or use 'triton'")
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    wanted, _ = launch.asked(features, return_lse)
    made = plan(scheme, head_dim=d, dtype=v.dtype, wanted=wanted, instructions=build.instructions())
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    given: dict[str, Any] = dict(
        batch=b, heads=heads, kv_heads=k.shape[1], n_q=n_q, n_k=n_k, threads=torch.get_num_threads(), out=out, lse=lse,
        left=features.reach()[0], right=features.reach()[1], scale=features.scale, softcap=features.softcap,
    )  # fmt: skip
    for x in (q, k, v):
        given |= laid_out(x, scheme)
    given |= _of_features(features)
    function, arguments = load(made)
    names = [field[0] for field in arguments._fields_]
    values = [given[name].data_ptr() if isinstance(given[name], Tensor) else given[name] for name in names]
    function(ctypes.byref(arguments(*values)))
    return out.to(q.dtype), lse


@lru_cache(maxsize=256)
def load(made: CpuPlan) -> tuple[Callable[..., None], type[ctypes.Structure]]:
    """A plan's kernel, and its arguments as the text declares them."""
    text = generate.render(made)
    function = build.load(made.name, text, made.instructions).attention
    function.restype = None
    declared = re.search(r"struct Arguments \{\n(.*?)\n\};", text, re.DOTALL)
    assert declared is not None
    fields = []
    for kind, star, name in re.findall(r"^    (?:const )?(\w+)(\*?) (\w+);", declared[1], re.MULTILINE):
        fields.append((name, ctypes.c_void_p if star else TYPES[kind]))
    return function, type("Arguments", (ctypes.Structure,), {"_fields_": fields})


def packed(operands: launch.Operands, scheme: QuantScheme) -> launch.Operands:
    """Quantized operands as kernels want them to lie in memory: integers in panels, a byte a code."""
    return tuple(_packed(x, scheme) for x in operands)  # type: ignore[return-value]


def _packed(x: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    role = x.spec.role
    if x.layout == "blocks" or not integers(scheme, "v" if role == "v" else "k"):
        return x
    codes = x.stored_values().to(torch.int8)
    if role == "k":
        codes = of_keys(codes)
    elif role == "v":
        codes = of_values(codes, scheme.key_tile, BYTES)
    return replace(x, codes=codes.contiguous(), layout="blocks")


def laid_out(x: QuantizedTensor, scheme: QuantScheme) -> Fields:
    """What a kernel reads of an operand, by the names in its text. Made once, and kept as long as the operand."""
    if x not in _laid_out:
        fields = {"q": _queries, "k": _keys, "v": _values}[x.spec.role](x, scheme)
        _laid_out[x] = {name: each.contiguous() for name, each in fields.items() if each is not None}
    return _laid_out[x]


def _queries(q: QuantizedTensor, scheme: QuantScheme) -> dict[str, Tensor | None]:
    scaled = q.scale is not None and place(q.spec) == "scores"
    block = q.spec.smooth == "block_mean"
    return {
        "q": _packed(q, scheme).codes if integers(scheme, "k") else met(q),
        "q_scale": _of_tokens(q, q.spread(q.scale)) if scaled else None,  # type: ignore[arg-type]
        "q_sum": q.code_sum,
        "logit_offset": q.logit_offset,
        "q_mean": q.offset.float() if block else None,  # type: ignore[union-attr]
    }


def _keys(k: QuantizedTensor, scheme: QuantScheme) -> dict[str, Tensor | None]:
    scaled = k.scale is not None and place(k.spec) == "scores"
    return {
        "k": _packed(k, scheme).codes if integers(scheme, "k") else panels(met(k), 1),
        "k_scale": _of_keys(k, k.spread(k.scale)) if scaled else None,  # type: ignore[arg-type]
        "k_zero": _of_keys(k, k.spread(k.origin)) if scaled and k.origin is not None else None,
        "companion": None if k.companion is None else panels(k.companion.float(), 1),
    }


def _values(v: QuantizedTensor, scheme: QuantScheme) -> dict[str, Tensor | None]:
    at, tile = place(v.spec), scheme.key_tile
    origin = None if at == "operand" else v.origin
    fields: dict[str, Tensor | None] = {
        "v": _packed(v, scheme).codes if integers(scheme, "v") else of_values(met(v), tile, 1),
        "v_mean": None if v.offset is None else _of_channels(v, v.offset.float()),
    }
    if at == "p":
        fields |= {
            "log2_weight": _of_keys(v, v.log2_weight),  # type: ignore[arg-type]
            "inverse_weight": _of_keys(v, v.inverse_weight),  # type: ignore[arg-type]
            "v_zero": None if origin is None else _of_keys(v, v.spread(origin)),
        }
    elif at in ("tile", "output"):
        for name, x in (("v_scale", v.scale), ("v_zero", origin)):
            if x is not None and at == "tile":
                tiles = -(-v.shape[2] // tile)
                x = x.float().repeat_interleave((v.spec.granularity.size or tile) // tile, dim=2)[:, :, :tiles]
            fields[name] = None if x is None else _of_channels(v, x.float())
    return fields


def _of_tokens(x: QuantizedTensor, each: Tensor) -> Tensor:
    """`[B | 1, H | 1, N | 1, 1] -> [B, H, N]`."""
    return each.expand(*x.shape[:3], 1).squeeze(3)


def _of_keys(x: QuantizedTensor, each: Tensor) -> Tensor:
    """The same, with N rounded up to whole panels."""
    return torch.nn.functional.pad(_of_tokens(x, each), (0, -x.shape[2] % LANES))


def _of_channels(x: QuantizedTensor, each: Tensor) -> Tensor:
    """`[B | 1, H | 1, n, D | 1] -> [B, H, n, D]`, with D rounded up to whole panels."""
    return torch.nn.functional.pad(each.expand(*x.shape[:2], each.shape[2], x.shape[3]), (0, -x.shape[3] % LANES))


def _of_features(features: Features) -> dict[str, Any]:
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
            keys = panels(_once(bias.k_factors, 2).float(), 1).flatten(2)
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
    steps = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return {name: x, **{f"{name}_{dimension}": step for dimension, step in zip(dimensions, steps, strict=False)}}
