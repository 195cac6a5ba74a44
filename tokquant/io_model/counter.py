"""Counts the bytes that launches move, by intercepting every load and store in Triton's interpreter."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import UnsupportedError
from tokquant.io_model.traffic import Traffic
from tokquant.kernels.launch import interpreted


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    traffic: Traffic
    """Its bytes by argument: tensors, and fields of named tuples of tensors."""


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Record every launch of a Triton kernel in this block, with the bytes that it loads and stores. Results do not change.

    Raises UnsupportedError where the interpreter is off. A launch raises ValueError where two of its tensors share memory.
    """
    if not interpreted():
        raise UnsupportedError("counting: needs Triton's interpreter; set TRITON_INTERPRET=1 before Python starts")
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.interpreter import interpreter_builder as builder

    run, load, store = GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    launches: list[Launch] = []
    regions: list[tuple[int, int, str]] = []
    found: Counter[str] = Counter()

    def counted_run(self: Any, *arguments: Any, **options: Any) -> Any:
        found.clear()
        regions[:] = _regions(dict(zip(self.arg_names, arguments, strict=False)))
        result = run(self, *arguments, **options)
        launches.append(Launch(self.fn.__name__, Traffic(dict(found))))
        return result

    def count(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        # lanes at one address are served at once
        touched = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        if touched.size:
            low, high = int(touched[0]), int(touched[-1]) + width
            [name] = [name for start, end, name in regions if start <= low and high <= end]
            found[name] += width * touched.size

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    # loads and stores without a mask go through these too
    with (
        patch.object(GridExecutor, "__call__", counted_run),
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
    ):
        yield launches


def _regions(arguments: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """First address, end and name of every tensor."""
    tensors: dict[str, Any] = {}
    for name, value in arguments.items():
        tensors |= {f"{name}.{part}": x for part, x in value._asdict().items()} if hasattr(value, "_asdict") else {name: value}
    regions = sorted(
        (x.data_ptr(), x.data_ptr() + _extent(x), name) for name, x in tensors.items() if torch.is_tensor(x) and x.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(regions):
        if start < end:
            raise ValueError(f"counting: {one} and {other} share memory, so that they cannot be told apart; copy one")
    return regions


def _extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = zip(x.shape, x.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * x.element_size()
