"""The resources that a compiled kernel uses (registers, shared memory, instructions), from its machine code, without a GPU."""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokquant.errors import UnsupportedError
from tokquant.kernels.candidates import Config
from tokquant.kernels.targets import Target

Instruction = tuple[int, str, str]
"""(position, name, operands); a jump has its target's position as operands."""

SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
TENSOR_CORE = re.compile(r"[IQHO]?G?MMA|UTC\w*MMA|v_mfma")
EXPONENTIAL = ("MUFU.EX2", "v_exp_f32")
MULTIPLY_ADD = ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma")
COPY = "LDGSTS"
SPILL = ("LDL", "STL", "scratch_load", "scratch_store")


@dataclass(frozen=True)
class Resources:
    """Registers and spills of a thread, shared memory of a block, and instructions of the main loop, over whole key tiles.

    Where the warps of a block are specialized, the loop is those of all roles together.
    """

    registers: int
    """Registers per thread at the start; specialized warps exchange some later."""
    spill_bytes: int
    """Bytes of a thread's stack, where registers are spilled."""
    shared_bytes: int
    blocks_per_multiprocessor: int
    """Occupancy: blocks that fit at once; 0 where not even one does."""
    instructions_per_score: float
    """Instructions of a thread in the main loop for each score it computes."""
    loop: dict[str, int]
    """Instructions of the main loop, counted by name."""
    tensor_core: dict[str, int]
    """Tensor-core instructions of the main loop, counted by name and type."""

    @property
    def fits(self) -> bool:
        """Whether a block can be launched."""
        return self.blocks_per_multiprocessor > 0

    @property
    def spills_in_loop(self) -> int:
        """Loads and stores of spilled registers in the main loop."""
        return sum(count for name, count in self.loop.items() if name.startswith(SPILL))


def measure(compiled: Any, config: Config, target: Target) -> Resources:
    """Read Triton's compiled kernel. Raises UnsupportedError if no loop over key tiles is found."""
    shared = compiled.metadata.shared
    registers, stack, instructions = machine_code(compiled)
    # registers are allocated in eights; on NVIDIA GPUs the system reserves a kilobyte of shared memory per block
    granule, reserved = 8, 0 if target.backend == "hip" else 1024
    loops = main_loops(instructions, config.roles)
    if len(loops) < config.roles:
        raise UnsupportedError("the machine code has no loop with products and exponentials that could be counted")
    body = [each for loop in loops for each in loop]
    threads = target.lanes * config.num_warps
    fits = (
        target.registers // (-(-registers // granule) * granule * threads),
        target.shared_bytes // max(1, shared + reserved),
        target.warps // config.num_warps,
    )
    return Resources(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        blocks_per_multiprocessor=min(fits),
        instructions_per_score=len(body) * threads / config.roles / (config.block_m * config.block_n),
        loop=dict(Counter(name.split(".")[0] for _, name, _ in body).most_common()),
        tensor_core=dict(Counter(name for _, name, _ in body if TENSOR_CORE.match(name))),
    )


def machine_code(compiled: Any) -> tuple[int, int, list[Instruction]]:
    """Registers and stack bytes of a thread, and the instructions, of Triton's compiled kernel."""
    if "amdgcn" in compiled.asm:
        return _of_amd(compiled.asm["amdgcn"])
    return _of_nvidia(compiled.asm["cubin"])


def main_loops(instructions: list[Instruction], roles: int = 1) -> list[list[Instruction]]:
    """The loops over whole key tiles: the shortest loop with exponentials and products, of tensor cores or in float32.

    With specialized warps, the shortest such loop for each role that computes, and for the role that copies the shortest loop
    with copies and neither of those. A loop ends with a jump back.
    """
    computing, copying = [], []
    for place, _, operands in instructions:
        if not operands.isdigit() or int(operands) >= place:
            continue
        body = [i for i in instructions if int(operands) <= i[0] <= place]
        exponentials = sum(i[1].startswith(EXPONENTIAL) for i in body)
        multiplied = sum(i[1].startswith(MULTIPLY_ADD) for i in body) > 16 * exponentials
        products = any(TENSOR_CORE.match(i[1]) for i in body)
        if exponentials >= 4 and (multiplied or products):
            computing.append(body)
        if not exponentials and not products and any(i[1].startswith(COPY) for i in body):
            copying.append(body)
    if roles == 1:
        return sorted(computing, key=len)[:1]
    return sorted(computing, key=len)[: roles - 1] + sorted(copying, key=len)[:1]


def sass(text: str) -> list[Instruction]:
    """Instructions of a disassembly by cuobjdump, at their addresses."""
    found = []
    for m in SASS.finditer(text):
        jump = re.findall(r"0x([0-9a-f]+)", m[3]) if m[2].split(".")[0] == "BRA" else []
        found.append((int(m[1], 16), m[2], str(int(jump[-1], 16)) if jump else ""))
    return found


def amdgcn(text: str) -> list[Instruction]:
    """Instructions of AMD's assembly, at their line numbers."""
    lines = text.splitlines()
    labels = {m[1]: number for number, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    found = []
    for number, line in enumerate(lines):
        if m := re.match(r"\t([a-z]+_\w+)(?:\s+(\S+))?", line):
            jump = labels.get(m[2]) if m[1].startswith(("s_cbranch", "s_branch")) else None
            found.append((number, m[1], "" if jump is None else str(jump)))
    return found


def _of_amd(text: str) -> tuple[int, int, list[Instruction]]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size"), amdgcn(text)


def _of_nvidia(cubin: bytes) -> tuple[int, int, list[Instruction]]:
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        usage, text = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True, env=environment).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), sass(text)


@functools.cache
def _cuobjdump() -> Path:
    """The disassembler that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
