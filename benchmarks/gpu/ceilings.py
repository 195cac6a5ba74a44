"""The ceilings of this GPU: peak rates of products by type, of memory and of other execution units, and launch overhead."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import units
from record import Rows
from running import Item, Setting

import tokquant as tq
from tokquant.timing import interleaved_medians

Call = Callable[[], Any]

UNITS = {
    "multiply-adds, float32": units.multiply_adds,
    "exponentials, float32": units.exponentials,
    "float32 from int32": units.floats_of_integers,
    "int32 from float32": units.integers_of_floats,
    "int32 from float32 by adding": units.integers_by_adding,
    "maxima of int32": units.maxima_of_integers,
}
LANES = 128
"""Float32 multiply-adds that a multiprocessor does in a clock; the clock rate is derived from it."""


def items(setting: Setting) -> Iterator[Item]:
    """Products, memory, execution units, launches."""
    for name, make in PRODUCTS.items():
        yield Item(f"products, {name}", 6, partial(_products, setting, make))
    yield Item("memory", 3, partial(_memory, setting))
    yield Item("units", 10, partial(_units, setting))
    yield Item("launches", 8, partial(_launches, setting))


def _bytes(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random int8 matrices: zeros take less power, and would run at a higher clock."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device, generator=generator) for _ in range(2))
    return a, b


def _of_floats(kind: torch.dtype, n: int, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    return lambda: a @ b.T


def _of_fp8(n: int, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _of_int8(n: int, device: torch.device) -> Call:
    a, b = _bytes(n, device)
    return lambda: torch._int_mm(a, b.T)


def _of_int8_by_triton(n: int, device: torch.device) -> Call:
    a, b = _bytes(n, device)
    out = torch.empty(n, n, dtype=torch.int32, device=device)
    rows, columns = min(128, n // 8), min(256, n)
    grid = ((n // rows) * (n // columns),)
    options = {"num_warps": 8, "num_stages": 3}
    return lambda: units.int8_products[grid](a, b, out, n, n, rows, columns, min(128, n), **options)


PRODUCTS: dict[str, Callable[[int, torch.device], Call]] = {
    "bf16": partial(_of_floats, torch.bfloat16),
    "fp16": partial(_of_floats, torch.float16),
    "fp8, torch._scaled_mm": _of_fp8,
    "int8, torch._int_mm": _of_int8,
    "int8, a Triton kernel": _of_int8_by_triton,
}


def _products(setting: Setting, make: Callable[[int, torch.device], Call]) -> Rows:
    n = 128 if setting.small else 8192
    [ms] = interleaved_medians([make(n, setting.device)], 1 if setting.small else 20, setting.device)
    return [{"n": n, "ms": ms, "TOPS": 2 * n**3 / ms / 1e9}]


def _memory(setting: Setting) -> Rows:
    size = 2**16 if setting.small else 2**31
    here, there = (torch.ones(size // 8, dtype=torch.int64, device=setting.device) for _ in range(2))
    calls = {"copy, read and written": (partial(there.copy_, here), 2 * size), "read": (here.sum, size)}
    times = interleaved_medians([call for call, _ in calls.values()], 1 if setting.small else 20, setting.device)
    return [
        {"what": name, "ms": ms, "GB/s": size / ms / 1e6} for (name, (_, size)), ms in zip(calls.items(), times, strict=True)
    ]


def _units(setting: Setting) -> Rows:
    """Operations of one multiprocessor per second, and per clock, assuming `LANES` float32 multiply-adds per clock."""
    gpu = setting.device.type == "cuda"
    block, rounds = (4096, 2000) if gpu and not setting.small else (128, 4)
    multiprocessors = torch.cuda.get_device_properties(setting.device).multi_processor_count if gpu else 1
    programs = 8 * multiprocessors if gpu else 1
    out = torch.empty(programs * block, device=setting.device)
    calls = [partial(kernel[(programs,)], out, rounds, block, num_warps=4) for kernel in UNITS.values()]
    times = interleaved_medians(calls, 1 if setting.small else 10, setting.device)
    rates = [programs * block * rounds / ms * 1e3 / multiprocessors for ms in times]
    return [
        {"what": name, "G/s": rate / 1e9, "a clock": LANES * rate / rates[0]} for name, rate in zip(UNITS, rates, strict=True)
    ]


def _launches(setting: Setting) -> Rows:
    """Launch overhead in microseconds: on the CPU until a launch is queued, on the GPU between launches of a CUDA graph."""
    device, repeats = setting.device, 3 if setting.small else 1000
    empty = partial(units.nothing[(1,)], torch.empty(1, device=device))
    codes = tq.quantize(*(torch.randn(1, 2, 16, 64, device=device, dtype=torch.float16) for _ in range(3)), "int8")
    rows = []
    for name, call in {
        "an empty kernel": empty,
        "tq.attention of codes": partial(tq.attention, *codes, "int8", causal=True),
    }.items():
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        row: dict[str, Any] = {"what": name, "CPU, us": 1e6 * (time.perf_counter() - start) / repeats}
        if device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    call()
            [ms] = interleaved_medians([graph.replay], 20, device)
            row["GPU in a graph, us"] = 1e3 * ms / 100
        rows.append(row)
    return rows
