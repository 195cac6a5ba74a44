"""Times functions in turn, so that whatever slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

SCRATCH_BYTES = 2**29
"""More than any GPU's cache holds. It is written before each timed run, which empties the cache. Writing also takes long enough
for the CPU to enqueue the timed launches before the GPU reaches them."""


def interleaved_medians(functions: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Median milliseconds of each function; the rest is as for `interleaved`."""
    return [statistics.median(runs) for runs in interleaved(functions, repeats, device)]


def interleaved(
    functions: Sequence[Callable[[], Any]],
    repeats: int,
    device: torch.device,
    before: Sequence[Callable[[], Any]] | None = None,
) -> list[list[float]]:
    """Milliseconds of each function's runs, in turn with the others'. On a GPU its events measure, with a cold cache.

    `before` has a function for each one, which runs before it and is not timed; it may empty or fill a CPU's caches, say.
    """
    for function in functions:
        function()
    time_once = _on_gpu(device) if device.type == "cuda" else _on_cpu
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(max(1, repeats)):
        for place, function in enumerate(functions):
            if before is not None:
                before[place]()
            times[place].append(time_once(function))
    return times


def _on_cpu(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(function: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            for value in (0, 1):
                scratch.fill_(value)
            start.record()
            function()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)

    return once
