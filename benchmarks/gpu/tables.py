"""Benchmarks of attention, decoding and quantization: the tables of `tokquant bench` at the shapes of the aims."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from record import Rows
from running import Item, Setting
from tuning import load_tuned

from tokquant.evaluation import bench
from tokquant.evaluation.bench import Shape, Table

PREFILL = ["int8-fp8", "int8-fast", "int8", "int8-fp16"]
DECODE = ["kv-int8", "kv-int4", "kv-fp8"]

PROVIDERS = 20
"""Providers timed for a table, roughly."""
SLOW = 2.5e14
"""A low estimate of the providers' mean throughput, operations a second, to predict how long a table takes."""


def items(setting: Setting) -> Iterator[Item]:
    """One table for each shape, those of most interest first."""
    load_tuned(setting)
    if setting.small:
        for workload, scheme in ((bench.attention, "int8"), (bench.quantization, "int8"), (bench.decode, "kv-int8")):
            yield _item(setting, workload, Shape(1, 2, 1, 1 if workload is bench.decode else 64, 64, 64, True), [scheme])
        return
    for d in (128, 64):
        for n in (8192, 1024):
            for causal in (False, True):
                yield _item(setting, bench.attention, Shape(4, 32, 32, n, n, d, causal), PREFILL)
    for batch in (1, 16):
        yield _item(setting, bench.decode, Shape(batch, 32, 8, 1, 32768, 128, False), DECODE)
    for d in (128, 64):
        yield _item(setting, bench.quantization, Shape(4, 32, 32, 8192, 8192, d, False), PREFILL)
    for n in (16384, 4096, 512, 32768):
        for d in (128, 64):
            for causal in (False, True):
                yield _item(setting, bench.attention, Shape(4, 32, 32, n, n, d, causal), PREFILL)


def _item(setting: Setting, workload: Callable[..., Table], shape: Shape, schemes: list[str]) -> Item:
    once = PROVIDERS * max(shape.operations / SLOW, 1e-3)
    repeats = 1 if setting.small else int(min(15, max(3, 8 / once)))
    name = f"{workload.__name__}, {shape}"
    # 12 s to compile kernels for a new head_dim or causality, and FlexAttention's for every shape
    return Item(name, 12 + (repeats + 2) * once, partial(_table, setting, workload, shape, schemes, repeats))


def _table(setting: Setting, workload: Callable[..., Table], shape: Shape, schemes: list[str], repeats: int) -> Rows:
    table = workload(shape, schemes, device=setting.device, repeats=repeats)
    where = {"workload": table.workload, **asdict(shape), "unit": table.unit, "repeats": repeats, "peer": table.peer}
    return [{**where, **{k: v for k, v in asdict(row).items() if v not in (None, "")}} for row in table.rows]
