"""A stand-in for an NVIDIA GPU: what Triton compiles for one is run, PTX instruction by PTX instruction, on the CPU.

All is checked that a GPU would have to trust: that every access is to a tensor that was given, and is aligned; and that a block
has no more shared memory than there is. Threads of a warpgroup are not parallel here, so races between them do not show,
except where tensor cores read what no barrier has shown to all warps. Copies and products are beside them: they end when they
are waited for.
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
    """What Triton asks its driver before it compiles: enough to specialize a call for a GPU of this compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        # none that is there: Triton keeps what it compiled by device, and must not launch this on another
        return -self.capability

    def get_current_stream(self, device):
        return 0


def flat(values, signature):
    """Arguments that a kernel takes, those in tuples one by one, without what is compiled in."""
    for value, kind in zip(values, signature, strict=True):
        if isinstance(kind, tuple):
            yield from flat(value, kind)
        elif kind != "constexpr":
            yield value


def launch(compiled, grid, values, order=()) -> int:
    """Run a compiled kernel block by block, the warpgroups of a block in the given order. Returns how many products of tensor
    cores read shared memory that they need not see yet."""
    unfenced = 0
    kernel = text.read(compiled.asm["ptx"])
    arguments = list(flat(values, compiled.src.signature.values()))
    given = {}
    for (name, kind), value in zip(kernel.parameters.items(), [*arguments, *[0] * 8], strict=False):
        bits = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if kind[0] in "ub" and bits < 0:
            bits %= 2 ** int(kind[1:])
        given[name] = struct.pack(FORMATS[kind], bits)
    memory = of_tensors(each for each in arguments if isinstance(each, torch.Tensor))
    sizes = [*grid, 1, 1][:3]
    axes = dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), sizes, strict=True))
    for z, y, x in product(*map(range, reversed(sizes))):
        place = axes | {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        block = Block(kernel, given, memory, max(compiled.metadata.shared, 16), place)
        block.run(order)
        unfenced += block.unfenced
    return unfenced


@contextmanager
def absent(capability: int) -> Iterator[None]:
    """Let Triton compile launches for a GPU that is not there."""
    from triton.runtime import driver

    driver.set_active(AbsentGpu(capability))
    try:
        yield
    finally:
        driver.set_active(None)  # Triton looks for a driver again when it next needs one


@contextmanager
def stand_in(monkeypatch, capability: int) -> Iterator[list]:
    """Run Triton's launches in this simulation, with CPU tensors taken for a GPU's. Yields the list of kernels that ran."""
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    from tokquant.kernels import launch as launching
    from tokquant.kernels import targets

    compile_for, target_of, launched = JITFunction.run, targets.of, []
    own = targets.get(f"sm_{capability}")

    def run(self, *arguments, grid, warmup, **options):
        compiled = compile_for(self, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            most = own.shared_bytes - RESERVED
            if compiled.metadata.shared > most:
                raise OutOfResources(compiled.metadata.shared, most, "shared memory")
            names = [parameter.name for parameter in self.params]
            values = dict(zip(names, arguments, strict=False)) | options
            compiled.unfenced = launch(compiled, grid, [values[name] for name in compiled.src.signature])
            launched.append(compiled)
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launching, "available", lambda device: True)
    monkeypatch.setattr(targets, "of", lambda device: own if device.type == "cpu" else target_of(device))
    with absent(capability):
        yield launched
