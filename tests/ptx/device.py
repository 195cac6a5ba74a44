"""A simulated NVIDIA GPU: runs the PTX that Triton compiles, instruction by instruction, on the CPU.

It checks what a GPU trusts: that every access is aligned and within a tensor argument, and that a block's shared memory fits.
Threads of a warpgroup run in lockstep here, so races between them do not show, except where tensor cores read shared memory
that no barrier has made visible to all warps. Copies and products are asynchronous: they complete when they are waited for.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from ptx import text
from ptx.block import Block
from ptx.memory import RESERVED, of_tensors

FORMATS = {"u64": "Q", "u32": "I", "s64": "q", "s32": "i", "f32": "f", "u8": "B", "b64": "Q", "b32": "I"}


class AbsentGpu:
    """The part of a Triton driver that is needed to compile: enough to specialize a call for a compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        # negative, as Triton caches compiled kernels by device and must not launch these on a real one
        return -self.capability

    def get_current_stream(self, device):
        return 0


def flat(values, signature):
    """The arguments that a launch passes: tuples flattened, constexpr arguments left out."""
    for value, kind in zip(values, signature, strict=True):
        if isinstance(kind, tuple):
            yield from flat(value, kind)
        elif kind != "constexpr":
            yield value


def launch(compiled, grid, values, order=()) -> int:
    """Run a compiled kernel block by block, with the warpgroups of a block in the given order.

    Returns how many tensor core products read shared memory with no fence, or no barrier, after a write.
    """
    unfenced = 0
    kernel = text.read(compiled.asm["ptx"])
    arguments = list(flat(values, compiled.src.signature.values()))
    parameters = {}
    for (name, kind), value in zip(kernel.parameters.items(), [*arguments, *[0] * 8], strict=False):
        bits = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if kind[0] in "ub" and bits < 0:
            bits %= 2 ** int(kind[1:])
        parameters[name] = struct.pack(FORMATS[kind], bits)
    memory = of_tensors(each for each in arguments if isinstance(each, torch.Tensor))
    sizes = [*grid, 1, 1][:3]
    grid_size = dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), sizes, strict=True))
    for z, y, x in product(*map(range, reversed(sizes))):
        special = grid_size | {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        block = Block(kernel, parameters, memory, max(compiled.metadata.shared, 16), special)
        block.run(order)
        unfenced += block.unfenced
    return unfenced


@contextmanager
def absent(capability: int) -> Iterator[None]:
    """A context in which Triton compiles launches for a GPU that is not present."""
    from triton.runtime import driver

    driver.set_active(AbsentGpu(capability))
    try:
        yield
    finally:
        driver.set_active(None)  # Triton looks for a driver again when it next needs one


@contextmanager
def stand_in(monkeypatch, capability: int) -> Iterator[list]:
    """A context in which Triton's launches run in this simulation, on CPU tensors. Yields the list of kernels that ran."""
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    from tokquant.kernels import launch as launching
    from tokquant.kernels import targets

    compile_for, target_of, launched = JITFunction.run, targets.of, []
    target = targets.get(f"sm_{capability}")

    def run(self, *arguments, grid, warmup, **options):
        compiled = compile_for(self, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            available = target.shared_bytes - RESERVED
            if compiled.metadata.shared > available:
                raise OutOfResources(compiled.metadata.shared, available, "shared memory")
            names = [parameter.name for parameter in self.params]
            values = dict(zip(names, arguments, strict=False)) | options
            compiled.unfenced = launch(compiled, grid, [values[name] for name in compiled.src.signature])
            launched.append(compiled)
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launching, "available", lambda device: True)
    monkeypatch.setattr(targets, "of", lambda device: target if device.type == "cpu" else target_of(device))
    with absent(capability):
        yield launched
