"""Profiles the calls that compare worst with others: kernels by torch's profiler, machine code, Nsight Compute's counters."""

import csv
import io
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import Rows, rows_of
from running import Item, Setting, output_of
from torch.profiler import ProfilerActivity, profile
from tuning import load_tuned

import tokquant as tq
from tokquant.attention import quantizing_backend
from tokquant.evaluation.bench import Shape
from tokquant.evaluation.costs import scales_for
from tokquant.kernels import targets

MOST = 4
"""Calls that are profiled."""
CALLS = 3
"""Runs of a call that torch's profiler averages over."""
COUNTERS = {
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "exponentials and conversions",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
}
"""Metrics of Nsight Compute, and their names in the results."""


def items(setting: Setting) -> Iterator[Item]:
    """The kernels of every call and their times, then machine code, then counters."""
    load_tuned(setting)
    calls = {f"{scheme}, {shape}": (setting, scheme, shape) for scheme, shape in chosen(setting)}
    for name, each in calls.items():
        yield Item(f"{name}: kernels", 8, partial(_kernels, *each))
    for name, each in calls.items():
        if each[2].queries > 1:
            yield Item(f"{name}: machine code", 5, partial(_machine_code, *each))
    for name, each in calls.items():
        yield Item(f"{name}: counters", 30, partial(_counters, *each))


def chosen(setting: Setting) -> list[tuple[str, Shape]]:
    """(scheme, shape) of the least speedup in the tables, one per scheme, head_dim and workload; attention at 8k only."""
    if setting.small:
        return [("int8", Shape(1, 2, 1, 64, 64, 64, True)), ("kv-int8", Shape(1, 2, 1, 1, 64, 64, False))]
    found: dict[tuple[Any, ...], tuple[float, str, Shape]] = {}
    for row in rows_of(setting.folder, "tables"):
        name = row.get("provider", "").removesuffix(", KVCache")
        if "," in name or not row.get("ratio") or name.startswith(("SDPA", "Flex", "xformers")):
            continue
        shape = Shape(*(row[field] for field in ("batch", "heads", "kv_heads", "queries", "tokens", "head_dim", "causal")))
        if (row["workload"] == "attention" and shape.tokens == 8192) or (
            row["workload"] == "decode" and "KVCache" in row["provider"]
        ):
            key = (name, shape.head_dim, row["workload"])
            found[key] = min(found.get(key, (1e9, name, shape)), (row["ratio"], name, shape), key=lambda each: each[0])
    return [(name, shape) for _, name, shape in sorted(found.values(), key=lambda each: each[0])[:MOST]]


def call_of(setting: Setting, scheme: str, shape: Shape) -> Callable[[], Any]:
    """Attention with quantization, or a step of decoding on a cache."""
    generator, kind = torch.Generator(setting.device).manual_seed(0), torch.float16
    keys = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    sizes = ((shape.batch, shape.heads, shape.queries, shape.head_dim), keys, keys)
    q, k, v = (torch.randn(size, generator=generator, device=setting.device, dtype=kind) for size in sizes)
    scales = scales_for(tq.preset(scheme), q, k, v)
    if shape.queries == shape.tokens:
        own = quantizing_backend("auto", setting.device)
        return partial(tq.attention, q, k, v, scheme, causal=shape.causal, scales=scales, backend=own)
    sizes = dict(batch=shape.batch, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    cache = tq.KVCache(scheme, **sizes, dtype=kind, device=setting.device, scales=scales)
    cache.append(k, v)
    return partial(tq.decode, q, cache)


def _kernels(setting: Setting, scheme: str, shape: Shape) -> Rows:
    call = call_of(setting, scheme, shape)
    call()
    gpu = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as found:
        for _ in range(CALLS):
            call()
        if gpu:
            torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in found.events():
        if not gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += (event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / CALLS
    total = sum(spent.values()) or 1.0
    slowest = sorted(spent.items(), key=lambda each: -each[1])[:8]
    return [{"kernel" if gpu else "operation": name[:100], "us": us, "share": us / total} for name, us in slowest]


def _machine_code(setting: Setting, scheme: str, shape: Shape) -> Rows:
    """Resources and prediction of every launch that tuning may choose, the untuned one first."""
    target = targets.of(setting.device).name
    shared = shape.heads // shape.kv_heads
    kernel = tq.compile(scheme, head_dim=shape.head_dim, causal=shape.causal, shared_heads=shared, target=target)
    rows: Rows = []
    for each in kernel.candidates():
        found, predicted = each.resources, each.prediction
        rows.append(
            {
                "launch": str(each.config),
                "registers": found.registers,
                "spilled bytes": found.spill_bytes,
                "shared bytes": found.shared_bytes,
                "blocks at once": found.blocks_per_multiprocessor,
                "instructions a score": found.instructions_per_score,
                "predicted TOPS": predicted.serial_tops,
            }
        )
    return rows


def _counters(setting: Setting, scheme: str, shape: Shape) -> Rows:
    """Nsight Compute's counters of every kernel of one call, which runs in a process of its own."""
    tool = shutil.which("ncu")
    if setting.device.type != "cuda" or tool is None:
        return [{"note": "needs a GPU" if tool else "needs ncu on PATH"}]
    call = [sys.executable, str(Path(__file__).with_name("once.py")), scheme, *(str(x) for x in vars(shape).values())]
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(["gpu__time_duration.sum", *COUNTERS])]
    text, end = output_of([*command, *call], min(max(30.0, setting.left), 90.0), PYTHONPATH=os.pathsep.join(sys.path))
    start = text.find('"ID"')
    if start < 0:
        return [{"note": f"ncu {end}"}]
    units, *kernels = list(csv.DictReader(io.StringIO(text[start:])))
    rows: Rows = []
    for kernel in kernels:
        time = f"{kernel['gpu__time_duration.sum']} {units['gpu__time_duration.sum']}"
        rows.append(
            {"kernel": kernel["Kernel Name"][:80], "time": time} | {name: kernel.get(key) for key, name in COUNTERS.items()}
        )
    return rows
