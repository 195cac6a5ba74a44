"""Counts what a launch moves: every load and store of it in Triton's interpreter, byte by byte."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import UnsupportedError
from tokquant.io_model.traffic import Traffic
from tokquant.kernels import launch

ARGUMENTS = ("Q", "K", "V", "Out", "Lse", "F")


def counted(call: launch.Call) -> Traffic:
    """Run the call in the interpreter and count. Its results are those of `call.run()`, in `call.out` and `call.lse`.

    Raises UnsupportedError where the interpreter is off, ValueError where two of its tensors share memory.
    """
    if not launch.interpreted():
        raise UnsupportedError(
            "counted: loads are counted in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
        )
    with counting(dict(zip(ARGUMENTS, call.arguments, strict=False))) as found:
        call.run()
    return Traffic(found)


@contextmanager
def counting(arguments: dict[str, Any]) -> Iterator[Counter[str]]:
    """Bytes that kernels load from and store to each tensor among these arguments, while the context is open.

    Args:
        arguments: of kernels, by name: tensors on the CPU, and named tuples of tensors.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    regions = _regions(arguments)
    starts = np.array([start for start, _, _ in regions], dtype=np.uint64)
    load, store, found = builder.create_masked_load, builder.create_masked_store, Counter[str]()

    def count(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        # lanes at one address are served at once
        touched = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        if touched.size:
            _, end, name = regions[int(np.searchsorted(starts, touched[0], side="right")) - 1]
            assert int(touched[-1]) + width <= end, f"beyond {name}"
            found[name] += width * touched.size

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    # those without a mask go through these too
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield found
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _regions(arguments: dict[str, Any]) -> list[tuple[int, int, str]]:
    """First and last address, and name, of every tensor, in order."""
    tensors: dict[str, Any] = {}
    for name, value in arguments.items():
        tensors |= {f"{name}.{part}": x for part, x in value._asdict().items()} if hasattr(value, "_asdict") else {name: value}
    regions = sorted(
        (x.data_ptr(), x.data_ptr() + _extent(x), name) for name, x in tensors.items() if torch.is_tensor(x) and x.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(regions):
        if start < end:
            raise ValueError(
                f"arguments: {one} and {other} share memory, so what is read of each cannot be told apart; copy one"
            )
    return regions


def _extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = zip(x.shape, x.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * x.element_size()
