"""What a compiled kernel takes of an NVIDIA GPU, read from its machine code: no GPU is needed."""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokquant.errors import UnsupportedError

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
SMALL, LARGE = (65536, 102400, 48), (65536, 233472, 64)
LIMITS = {80: (65536, 167936, 64), 86: SMALL, 89: SMALL, 90: LARGE, 100: LARGE, 120: SMALL}
"""Registers, shared memory and warps of a multiprocessor, by compute capability."""


@dataclass(frozen=True)
class Resources:
    """A thread's registers and spills, a block's shared memory, and the loop over whole key tiles, counted in SASS."""

    registers: int
    spill_bytes: int
    """Bytes of a thread's stack: what did not fit registers."""
    shared_bytes: int
    blocks_per_multiprocessor: int
    """How many blocks fit at once."""
    instructions_per_score: float
    """Instructions of a thread in the loop over whole key tiles for each score it computes."""
    loop: dict[str, int]
    """Instructions of that loop by name."""
    tensor_core: dict[str, int]
    """Its tensor-core instructions, with their types."""


def measure(cubin: bytes, shared_bytes: int, *, block_m: int, block_n: int, num_warps: int, capability: int) -> Resources:
    """Read a cubin. Raises UnsupportedError if no loop over key tiles is found."""
    usage, sass = _dump(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = int(found[1]), int(found[2])
    body = main_loop(sass)
    if not body:
        raise UnsupportedError("the machine code has no loop with products and exponentials that could be counted")
    loop = Counter(name.split(".")[0] for _, name, _ in body)
    tensor_core = Counter(name for _, name, _ in body if re.match(r"[IQH]?G?MMA|UTC\w*MMA", name))
    threads = 32 * num_warps
    file, shared, warps = LIMITS[capability]
    # registers are given out eight a thread at a time; a block takes 1 KB of shared memory for itself
    fits = (file // (-(-registers // 8) * 8 * threads), shared // (shared_bytes + 1024), warps // num_warps)
    return Resources(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared_bytes,
        blocks_per_multiprocessor=min(fits),
        instructions_per_score=len(body) * threads / (block_m * block_n),
        loop=dict(loop.most_common()),
        tensor_core=dict(tensor_core),
    )


def main_loop(sass: str) -> list[tuple[int, str, str]]:
    """The loop over whole key tiles: the shortest with exponentials and products, of tensor cores or of float32."""
    instructions = [(int(m[1], 16), m[2], m[3].strip()) for m in INSTRUCTION.finditer(sass)]
    bodies = []
    for address, name, operands in instructions:
        target = re.findall(r"0x([0-9a-f]+)", operands)
        if name.split(".")[0] != "BRA" or not target or int(target[-1], 16) >= address:
            continue
        body = [i for i in instructions if int(target[-1], 16) <= i[0] <= address]
        exponentials = sum(i[1].startswith("MUFU.EX2") for i in body)
        products = any("MMA" in i[1] for i in body) or sum(i[1].startswith("FFMA") for i in body) > 16 * exponentials
        if exponentials >= 8 and products:
            bodies.append(body)
    return min(bodies, key=len, default=[])


def _dump(cubin: bytes) -> tuple[str, str]:
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        return tuple(  # type: ignore[return-value]
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True, env=environment).stdout
            for option in ("--dump-resource-usage", "-sass")
        )


@functools.cache
def _cuobjdump() -> Path:
    """The disassembler that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
