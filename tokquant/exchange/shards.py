"""The files of a checkpoint: finds its tensors, and reads those that are scales, and no others."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokquant.activations import natural
from tokquant.errors import ScalesError, quote
from tokquant.tensor_files import open_tensors

INDEX = "model.safetensors.index.json"
NAME = re.compile(r"(?P<layer>.+?)(?:\.(?P<projection>q|k|v|qkv)_proj)?\.(?P<role>q|k|v|kv|prob)_(?P<kind>scale|zero_point)")
"""`self_attn.k_scale` (compressed-tensors), `self_attn.k_proj.k_scale` (ModelOpt), `self_attn.kv_scale` (deprecated)."""
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_HEADS = 2**16


@dataclass(frozen=True)
class Found:
    """A scale or zero point in a checkpoint: its file and name, and the layer and operand that it belongs to."""

    file: Path
    name: str
    layer: str
    role: str
    kind: str

    def error(self, text: str) -> ScalesError:
        """An error that names this tensor."""
        return ScalesError(f"{self.file}: {self.name}: {text}")


class Scale(NamedTuple):
    """A scale that was read."""

    at: Found
    granularity: str
    value: Tensor
    """float32 `[1, 1, 1]` of a tensor, `[H, 1, 1]` of heads."""


def names(path: Path) -> dict[str, Path]:
    """Every tensor of the checkpoint, with its file."""
    index = path / INDEX
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, Mapping) or not all(isinstance(file, str) for file in where.values()):
            raise ScalesError(f"{index}: has no weight_map of tensors to files")
        for name, shard in where.items():
            if Path(shard).name != shard:
                raise ScalesError(f"{index}: {quote(name)} is in {quote(shard)}, which is no file of this folder")
        return {name: path / shard for name, shard in where.items()}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ScalesError(f"{path}: holds no safetensors files")
    found: dict[str, Path] = {}
    for each in files:
        with open_tensors(each, ScalesError) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in found:
                    raise ScalesError(f"{each}: {name}: is in {found[name].name} too")
                found[name] = each
    return found


def find(files: Mapping[str, Path]) -> list[Found]:
    """The scales and zero points among these tensors, layer by layer. Raises ScalesError for contradictory names."""
    found: list[Found] = []
    for name, file in sorted(files.items(), key=lambda item: natural(item[0])):
        if not (match := NAME.fullmatch(name)):
            continue
        role, projection = match["role"], match["projection"]
        each = Found(file, name, match["layer"], role, match["kind"])
        if role == "prob":
            raise each.error("a static scale of P, which no scheme has")
        if projection not in (None, "qkv", role):
            raise each.error(f"a scale of {role.upper()} under {projection}_proj; the names are swapped")
        found += [Found(file, name, each.layer, one, each.kind) for one in (role if role == "kv" else [role])]
    return found


def read(found: list[Found]) -> dict[tuple[str, str], Scale]:
    """The scales by layer and role, in the order of `found`. Raises ScalesError for invalid scales and nonzero zero points."""
    by_file: dict[Path, list[Found]] = defaultdict(list)
    for each in found:
        by_file[each.file].append(each)
    scales: dict[tuple[str, str], Scale] = {}
    for path, here in by_file.items():
        with open_tensors(path, ScalesError) as file:
            held = set(file.keys())
            for each in here:
                if each.name not in held:
                    raise each.error("is not there, though the index says so")
                view = file.get_slice(each.name)
                shape = view.get_shape()
                _check_shape(each, shape)
                if each.kind == "zero_point":
                    if bool((file.get_tensor(each.name).float() != 0).any()):
                        raise each.error("a zero point other than 0 cannot be used; floats are quantized around 0")
                    continue
                key = (each.layer, each.role)
                if key in scales:
                    raise each.error(f"the layer has {scales[key].at.name} too; one of them is to go")
                if view.get_dtype() not in TYPES:
                    raise each.error(f"{view.get_dtype()} is no type for a scale; use {', '.join(TYPES)}")
                value = file.get_tensor(each.name).to(torch.float32, copy=True)  # a copy, not memory-mapped
                _check_value(each, value)
                scales[key] = Scale(each, "head" if len(shape) == 3 else "tensor", value.reshape(-1, 1, 1))
    return {key: scales[key] for each in found if (key := (each.layer, each.role)) in scales}


def _check_shape(each: Found, shape: list[int]) -> None:
    # checked before the values are read: a tensor that is not a scale may be large
    per_head = len(shape) == 3 and shape[1:] == [1, 1] and 1 <= shape[0] <= MOST_HEADS
    if shape not in ([], [1]) and not per_head:
        raise each.error(f"shape {shape} is not [1] (per tensor) or [H, 1, 1] (per head)")


def _check_value(each: Found, value: Tensor) -> None:
    if bool((value == -1).any()):
        raise each.error("is -1, which vLLM puts where a scale was never set; calibrate the checkpoint again")
    if not bool(value.isfinite().all()):
        raise each.error("holds a value that is not finite")
    if not bool((value > 0).all()):
        raise each.error("holds a scale that is not above zero")


def read_json(path: Path) -> Mapping[str, Any]:
    """The mapping in a JSON file. Raises ScalesError naming the file."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ScalesError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ScalesError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise ScalesError(f"{path}: holds {quote(data)}, not a mapping")
    return data
