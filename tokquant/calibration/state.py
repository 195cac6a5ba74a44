"""Saves the state of a calibration to safetensors and loads it, so that it can be continued."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from tokquant.calibration import observers
from tokquant.calibration.histogram import MOST
from tokquant.calibration.layers import Layer
from tokquant.calibration.scales import static
from tokquant.errors import ScalesError, quote
from tokquant.files import write_atomically
from tokquant.inputs import DTYPE_NAMES
from tokquant.schemes import QuantScheme, SchemeMap
from tokquant.schemes.reading import of_data
from tokquant.tensor_files import check_forms, checksum, read_tensors

FORMAT = "1"
LARGEST = 2**20
"""The most heads times channels that a file may declare."""


@dataclass(frozen=True)
class State:
    """The whole state of a calibrator."""

    scheme: QuantScheme | SchemeMap
    observer: observers.Observer
    layers: dict[str, Layer]
    sources: dict[str, str]


def write(path: str | os.PathLike, state: State) -> None:
    """Write statistics as `<layer>.k_scale.low` ..., atomically; the rest, and a checksum of all, is in the metadata."""
    tensors = {name: value.contiguous() for name, value in _tensors(state.layers).items()}
    layers = {
        name: {"dtype": str(layer.dtype).removeprefix("torch."), "shapes": layer.shapes, "tokens": layer.tokens}
        for name, layer in state.layers.items()
    }
    document = json.dumps(
        {
            "scheme": state.scheme.to_data(),
            "observer": str(state.observer),
            "layers": layers,
            "sources": state.sources,
        }
    )
    metadata = {
        "format": "pt",
        "tokquant.calibration": FORMAT,
        "tokquant.state": document,
        "tokquant.sha256": _digest(tensors, document),
    }
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read(path: str | os.PathLike) -> State:
    """Read what `write` wrote and check all of it. Raises ScalesError naming the file and what is wrong."""
    tensors, metadata = read_tensors(path, ScalesError)
    if "tokquant.calibration" not in metadata:
        raise ScalesError(f"{path}: holds no calibration; it was not written by Calibrator.save")
    if metadata["tokquant.calibration"] != FORMAT:
        written = quote(metadata["tokquant.calibration"])
        raise ScalesError(f"{path}: format {written} is not {FORMAT!r}; this version cannot read it")
    document = metadata.get("tokquant.state", "")
    try:
        state = _state(tensors, document)
    except (ValueError, TypeError, RecursionError) as error:
        raise ScalesError(f"{path}: {error}") from None
    if metadata.get("tokquant.sha256") != _digest(tensors, document):
        raise ScalesError(f"{path}: the calibration is not the one that was written (checksum differs)")
    return state


def _state(tensors: dict[str, Tensor], document: str) -> State:
    try:
        data = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its description cannot be read: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(name), dict) for name in ("scheme", "layers", "sources")):
        raise ValueError("its description lacks scheme, layers or sources")
    scheme, observer = of_data(data["scheme"]), observers.parse(data.get("observer"))
    layers = {name: _layer(name, given, scheme, observer) for name, given in data["layers"].items()}
    expected = {name: (tuple(value.shape), value.dtype) for name, value in _tensors(layers).items()}
    check_forms(tensors, expected, "a calibration", "it should be")
    for name, layer in layers.items():
        for part, statistics in layer.parts.items():
            for kept in statistics.tensors():
                statistics.put(kept, tensors[f"{name}.{part}.{kept}"])
            try:
                statistics.check(layer.tokens[part[0]])
            except ValueError as error:
                raise ValueError(f"{name}.{part}.{error}") from None
    return State(scheme, observer, layers, data["sources"])


def _tensors(layers: dict[str, Layer]) -> dict[str, Tensor]:
    """The statistics of all layers, by their names in a file: `<layer>.<part>.<tensor>`."""
    return {
        f"{name}.{part}.{kept}": value
        for name, layer in layers.items()
        for part, statistics in layer.parts.items()
        for kept, value in statistics.tensors().items()
    }


def _layer(name: str, given: Any, scheme: QuantScheme | SchemeMap, observer: observers.Observer) -> Layer:
    """An empty layer from its description in a file. Raises ValueError."""
    shapes, tokens = (given.get(key) if isinstance(given, dict) else None for key in ("shapes", "tokens"))
    if (
        not isinstance(shapes, dict)
        or not isinstance(tokens, dict)
        or not isinstance(given.get("dtype"), str)
        or given["dtype"] not in DTYPE_NAMES
        or not _counts(tokens)
    ):
        raise ValueError(f"layer {quote(name)} is described wrongly: it needs dtype, shapes and tokens")
    for role in "qkv":
        pair = shapes.get(role)
        if not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
            raise ValueError(f"layer {quote(name)}: {quote(pair)} is no pair of heads and channels of {role}")
        if pair[0] * pair[1] > LARGEST:
            raise ValueError(f"layer {quote(name)}: {quote(pair)}, heads and channels of {role}, is more than {LARGEST}")
    layer_scheme = static(scheme, name)
    if layer_scheme is None:
        raise ValueError(f"layer {quote(name)} needs no scales of scheme {scheme.name!r}")
    layer = Layer.empty(layer_scheme, observer, {role: tuple(shapes[role]) for role in "qkv"}, DTYPE_NAMES[given["dtype"]])
    layer.tokens = tokens
    return layer


def _counts(tokens: dict) -> bool:
    return sorted(tokens) == list("kqv") and all(type(n) is int and 0 < n <= MOST for n in tokens.values())


def _digest(tensors: dict[str, Tensor], document: str) -> str:
    return hashlib.sha256(f"{checksum(tensors)} {document}".encode()).hexdigest()
