"""Machine code that is made up, and a GPU that is not there."""

from importlib import import_module

import pytest
import torch

from tokquant.kernels import tuned
from tokquant.kernels.compile import Kernel
from tokquant.kernels.resources import Resources

DOOR = import_module("tokquant.tune")
"""The module; in the package, its name is the function's."""


@pytest.fixture
def code(monkeypatch):
    """What kernels take: 10 instructions a score, one block, no spills; or what a test says of a configuration."""
    changed = {}

    def resources(kernel):
        said = changed.get(kernel.config, {})
        if isinstance(said, Exception):
            raise said
        plain = dict(registers=128, spill_bytes=0, shared_bytes=9999, blocks_per_multiprocessor=1, instructions_per_score=10.0)
        return Resources(**{**plain, "loop": {}, "tensor_core": {}, **said})

    monkeypatch.setattr(Kernel, "resources", property(resources))
    return changed


@pytest.fixture
def gpu(monkeypatch):
    """A CPU under the name of a GPU: what is recorded for it is taken."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(DOOR, "need_gpu", lambda device: None)

    def of_call(plan, device, *sizes):
        return tuned.nearest(plan, tuned.key_of(plan, device, *sizes))

    monkeypatch.setattr(tuned, "_of_call", of_call)


@pytest.fixture
def clock(monkeypatch):
    """Times that the trials are said to take, in the planner's order; each is run once to show that it can be."""
    times = []

    def medians(functions, repeats, device):
        for function in functions:
            function()
        return times[: len(functions)]

    monkeypatch.setattr("tokquant.tuning.trials.interleaved_medians", medians)
    return times
