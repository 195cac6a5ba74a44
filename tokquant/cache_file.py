"""Reads and writes KV caches as safetensors files: codes in the canonical layout, the scheme and its scales."""

import json
import os
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales, needed
from tokquant.errors import CacheFileError, quote
from tokquant.files import write_atomically
from tokquant.inputs import DTYPE_NAMES
from tokquant.pages import operand, part_sizes, stored_parts
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.appending import check_append_only, unit, windows
from tokquant.tensor import QuantizedTensor
from tokquant.tensor_files import check_forms, checksum, read_tensors
from tokquant.whole_numbers import whole_number

FORMAT = "1"
LARGEST = 2**20
"""The most heads, and channels, that a file may have."""

Sequence = tuple[QuantizedTensor | None, QuantizedTensor | None, Tensor, Tensor]
"""Packed K and V of a sequence `[1, H_kv, n, D]`, None where nothing is packed; then K and V of its 16-bit windows."""


@dataclass(frozen=True)
class Content:
    """The contents of a file."""

    scheme: QuantScheme
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scales: LayerScales | None
    sequences: list[Sequence]


def write(path: str | os.PathLike, content: Content) -> None:
    """Write a cache atomically: tensors `<b>.k.codes`, `<b>.k.scale`, `<b>.window.k` ...; scheme and sizes are metadata."""
    tensors = {f"scales.{name}": value for name, value in content.scales.tensors.items()} if content.scales else {}
    for b, (k, v, *window) in enumerate(content.sequences):
        for x in (k, v):
            if x is not None:
                tensors |= {f"{b}.{x.spec.role}.{name}": part for name, part in stored_parts(x).items()}
        tensors |= {f"{b}.window.{name}": x for name, x in zip("kv", window, strict=True)}
    tensors = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
    shape = {
        "kv_heads": content.kv_heads,
        "head_dim": content.head_dim,
        "dtype": str(content.dtype).removeprefix("torch."),
        "tokens": [[0 if k is None else k.shape[2], window.shape[2]] for k, _, window, _ in content.sequences],
    }
    metadata = {
        "format": "pt",
        "tokquant.cache": FORMAT,
        "tokquant.scheme": json.dumps(content.scheme.model_dump(mode="json"), sort_keys=True),
        "tokquant.shape": json.dumps(shape),
    }
    metadata["tokquant.sha256"] = _digest(tensors, metadata)
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read(path: str | os.PathLike, device: torch.device) -> Content:
    """Read and check a file of `write`, with tensors on `device`. Raises CacheFileError naming the file and what is wrong."""
    tensors, metadata = read_tensors(path, CacheFileError)
    if "tokquant.cache" not in metadata:
        raise CacheFileError(f"{path}: holds no KV cache; it was not written by KVCache.save")
    if metadata["tokquant.cache"] != FORMAT:
        raise CacheFileError(
            f"{path}: format {quote(metadata['tokquant.cache'])} is not {FORMAT!r}; this version cannot read it"
        )
    try:
        content = _content(tensors, metadata, device)
    except (ValueError, TypeError, RecursionError) as error:
        raise CacheFileError(f"{path}: {error}") from None
    if metadata.get("tokquant.sha256") != _digest(tensors, metadata):
        raise CacheFileError(f"{path}: codes or scheme are not those that were written (checksum differs)")
    return content


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return checksum(tensors, metadata["tokquant.scheme"] + metadata["tokquant.shape"])


def _content(tensors: dict[str, Tensor], metadata: dict[str, str], device: torch.device) -> Content:
    scheme = QuantScheme(**_document(metadata, "tokquant.scheme"))
    check_append_only(scheme)
    shape: Any = _document(metadata, "tokquant.shape")
    heads, d, dtype, tokens = map(shape.get, ("kv_heads", "head_dim", "dtype", "tokens"))
    for name, value in (("kv_heads", heads), ("head_dim", d)):
        whole_number(name, value, 1, LARGEST)
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: {quote(dtype)}; it is one of {', '.join(DTYPE_NAMES)}")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"tokens: {quote(tokens)} is not a pair of numbers for each sequence")
    kind = DTYPE_NAMES[dtype]
    scales = {name: tensors[f"scales.{name}"] for name in needed(scheme) if f"scales.{name}" in tensors}
    layer = LayerScales("scales", scales, scheme)
    for b, pair in enumerate(tokens):
        _check_tokens(b, pair, scheme)

    operands = scheme.k, scheme.v
    expected = {f"scales.{name}": (tuple(value.shape), value.dtype) for name, value in scales.items()}
    for b, (packed, in_window) in enumerate(tokens):
        for spec in operands if packed else ():
            sizes = part_sizes(spec, (1, heads, packed, d), kind)
            expected |= {f"{b}.{spec.role}.{name}": size for name, size in sizes.items()}
        expected |= {f"{b}.window.{role}": ((1, heads, in_window, d), kind) for role in "kv"}
    check_forms(tensors, expected, "a cache", "a cache of these sizes has")

    tensors = {name: value.to(device) for name, value in tensors.items()}
    sequences: list[Sequence] = []
    for b, (packed, _) in enumerate(tokens):
        pair = [_operand(tensors, b, spec, scheme, layer, (1, heads, packed, d), kind) for spec in operands]
        sequences.append((*pair, tensors[f"{b}.window.k"], tensors[f"{b}.window.v"]))
    return Content(scheme, heads, d, kind, layer if scales else None, sequences)


def _document(metadata: dict[str, str], name: str) -> dict[str, Any]:
    try:
        document = json.loads(metadata.get(name, ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"its {name} cannot be read: {quote(document)} is no mapping")
    return document


def _operand(
    tensors: dict[str, Tensor],
    b: int,
    spec: Operand,
    scheme: QuantScheme,
    scales: LayerScales,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> QuantizedTensor | None:
    """Packed K or V of a sequence, None where nothing is packed. Raises ValueError for invalid codes and scales."""
    if not shape[2]:
        return None
    parts = {name: tensors[f"{b}.{spec.role}.{name}"] for name in part_sizes(spec, shape, dtype)}
    if "scale" in parts and bool((parts["scale"].float() <= 0).any()):
        raise ValueError(f"'{b}.{spec.role}.scale' holds a scale that is not above zero")
    x = operand(parts, spec, scheme, scales, shape, dtype)
    largest = spec.format.largest
    if spec.format.kind == "int" and spec.symmetric and largest and bool((x.stored_values().abs() > largest).any()):
        raise ValueError(f"'{b}.{spec.role}.codes' holds a code beyond {largest:g}")
    return x


def _check_tokens(b: int, pair: object, scheme: QuantScheme) -> None:
    """Raise ValueError unless `pair` is a possible number of packed tokens and of tokens in windows of a sequence."""
    sizes, block = windows(scheme), unit(scheme)
    if not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int or not 0 <= n < 2**31 for n in pair):
        raise ValueError(f"tokens: {quote(pair)} of sequence {b} is not a pair of numbers")
    packed, newest = pair[0], pair[1] - min(sum(pair), sizes.sink)
    if packed % block or newest < 0 or newest > sizes.recent + block - 1:
        raise ValueError(f"tokens: {quote(pair)} of sequence {b} is no state of a cache with {sizes} and blocks of {block}")
