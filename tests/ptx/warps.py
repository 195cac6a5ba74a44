"""Threads that run in lockstep: executes each instruction for all of them at once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ptx import matrices
from ptx.arithmetic import INTEGERS, RAW, bits, function, raw, typed
from ptx.barriers import AsyncGroups, Barrier, Ready
from ptx.memory import RESERVED, Memory, OutOfBounds
from ptx.text import Address, Instruction, Operand

if TYPE_CHECKING:
    from ptx.block import Block

Array = np.ndarray

NOTHING = {"fence", "membar", "wgmma.fence", "griddepcontrol"}
"""Instructions that order memory accesses, which are never out of order here."""


class Warps:
    """The state of threads that run in lockstep: each register is an array with an element per thread."""

    def __init__(self, block: "Block", threads: range, special: dict[str, int]):
        """`threads` are the indices in the block; `special` are the special registers that are the same in all threads."""
        self.block, self.kernel, self.threads = block, block.kernel, np.array(threads)
        own = {
            "%tid.x": self.threads,
            "%laneid": self.threads % 32,
            "%ntid.x": self.kernel.threads,
            "%tid.y": 0,
            "%tid.z": 0,
        }
        self.registers = {
            name: np.broadcast_to(np.asarray(x, np.uint32), len(self.threads)) for name, x in (own | special).items()
        }
        self.all = np.ones(len(self.threads), bool)
        self.copies, self.products = AsyncGroups(), AsyncGroups()
        self.unfenced_bytes = np.zeros(len(block.shared_bytes), bool)
        """Bytes of shared memory that any thread has written since these threads' last `fence.proxy.async`."""
        self.unsynced_bytes = np.zeros(len(block.shared_bytes), bool)
        """Bytes of shared memory that these threads have written since their last `bar.sync`: others may not see them yet."""
        self.unfenced = 0
        self.max_registers = self.kernel.max_registers
        """Registers per thread, as `setmaxnreg` counts them."""
        self.local = np.full((len(self.threads), self.kernel.local), 0xFF, np.uint8)
        """Local memory of each thread."""
        self.memories = {
            "global": block.memory,
            "shared": block.shared,
            "local": Memory([(self.local.ctypes.data, self.local.reshape(-1))]),
        }
        self.at: Instruction | None = None

    def run(self) -> Iterator[Ready]:
        """Run from the first instruction to `ret`. Where the threads have to wait, or others may run first, yields a function
        that says whether they may proceed."""
        body = self.kernel.body
        labels: dict[str, list[int]] = {}
        for at, each in enumerate(body):
            if each.opcode.endswith(":"):
                labels.setdefault(each.opcode[:-1], []).append(at)
        # active threads by their next instruction. The threads furthest behind go first, so that diverged paths reconverge
        waiting = {0: self.all}
        while waiting:
            at = min(waiting)
            self.active = waiting.pop(at)
            self.at = each = body[at]
            branches = each.opcode in ("ret", "exit") or each.opcode.startswith("bra")
            ahead = {at + 1: self.active}
            if branches:
                leaving = self.guard(each)
                ahead = {at + 1: self.active & ~leaving}
                if each.opcode.startswith("bra"):
                    # scopes of inline assembly may reuse a label: take the nearest
                    ahead[min(labels[each.operands[0]], key=lambda place: abs(place - at))] = leaving
            elif not each.opcode.endswith(":"):
                wait = self.step(each)
                if wait is not None:
                    yield wait
            for at, threads in ahead.items():
                if branches or waiting:
                    threads = threads | waiting[at] if at in waiting else threads
                    if not threads.any():
                        continue
                    threads = self.all if threads.all() else threads
                waiting[at] = threads

    def guard(self, instruction: Instruction) -> Array:
        """The active threads for which an instruction's predicate holds."""
        if instruction.guard is None:
            return self.active
        taken = self.registers[instruction.guard.lstrip("!")]
        return self.active & (~taken if instruction.guard[0] == "!" else taken)

    def value(self, operand: Operand, width: int) -> Array:
        """An operand's bits, one element per thread."""
        if operand in self.registers:
            value = self.registers[operand]
        elif isinstance(operand, tuple):
            parts = [self.value(each, width // len(operand)) for each in operand]
            value = np.stack(parts, axis=-1).view(RAW[width])[..., 0]
        elif operand.startswith("__local_depot"):
            value = self.local.ctypes.data + np.arange(len(self.threads), dtype=np.uint64) * np.uint64(self.kernel.local)
        elif operand[0] == "%":
            value = ~np.zeros(len(self.threads), RAW[width])  # never written: NaN
        else:
            value = np.full(len(self.threads), number(operand, width))
        return value.astype(RAW[width], copy=False)

    def write(self, to: Operand, value: Array, guard: Array) -> None:
        """Write a result to a register of the threads that execute; a narrow one is extended by its type."""
        if isinstance(to, tuple):
            parts = value if value.ndim == 2 else np.ascontiguousarray(value)[:, None].view(RAW[8 * value.itemsize // len(to)])
            for place, each in enumerate(to):
                self.write(each, parts[:, place], guard)
        elif to != "_":
            kind = RAW[self.kernel.width(to)]
            extended = np.dtype(f"i{kind.itemsize}") if value.dtype.kind == "i" else kind
            value = np.ascontiguousarray(value).astype(extended).view(kind)
            if guard is not self.all:
                value = np.where(guard, value, self.registers.get(to, ~np.zeros(1, kind)))
            self.registers[to] = value

    def address(self, where: Address) -> Array:
        """Byte addresses, one per thread."""
        if where.base == "global_smem":
            return np.full(len(self.threads), RESERVED + where.offset, np.uint64)
        base = self.registers[where.base]
        return (base + base.dtype.type(where.offset % 2 ** (8 * base.itemsize))).astype(np.uint64)

    def step(self, instruction: Instruction) -> Ready | None:
        """Execute one instruction. If the threads have to wait, returns a function that says whether they may proceed."""
        name, guard = instruction.opcode.partition(".")[0], self.guard(instruction)
        if name in ("bar", "barrier", "mbarrier", "setmaxnreg") or instruction.opcode.startswith("cp.async.mbarrier"):
            return self.wait(instruction, guard)
        if name in ("ld", "st"):
            (self.load if name == "ld" else self.store)(instruction, guard)
        elif instruction.opcode.startswith("cp.async"):
            self.copy(instruction, guard)
        elif instruction.opcode.startswith("fence.proxy.async"):
            self.unfenced_bytes[:] = False
        elif instruction.opcode.startswith(("wgmma.commit_group", "wgmma.wait_group")):
            self.products.execute(instruction)
        elif instruction.opcode.startswith("wgmma.mma_async"):
            self.multiply(instruction)
        elif name in ("ldmatrix", "stmatrix"):
            self.move_matrices(instruction)
        elif name in ("mma", "shfl", "redux", "elect"):
            self.exchange(instruction)
        elif name not in NOTHING and ".".join(instruction.opcode.split(".")[:2]) not in NOTHING:
            try:
                apply, kinds, kind = function(instruction.opcode)
            except KeyError:
                raise NotImplementedError(instruction.opcode) from None
            to, *operands = instruction.operands
            given = (typed(self.value(x, bits(k)), k) for x, k in zip(operands, kinds, strict=False))
            result = raw(apply(*given), kind)
            self.write(to, result.view(INTEGERS[kind]) if kind[0] == "s" and "x" not in kind else result, guard)
        return None

    def wait(self, instruction: Instruction, guard: Array) -> Ready | None:
        """Execute a barrier instruction, or `setmaxnreg`."""
        name, operation, *_ = instruction.opcode.split(".")
        if name in ("bar", "barrier"):
            self.unsynced_bytes[:] = False
            if len(self.threads) == self.kernel.threads:
                return None  # these threads run in lockstep anyway
            barrier, *count = (int(x) for x in instruction.operands)
            return self.block.named_barriers[barrier].arrive(int(guard.sum()), *count or [self.kernel.threads])
        if name == "setmaxnreg":
            return self.change_registers(int(instruction.operands[0]))
        if not guard.any():
            return None
        barriers = self.block.barriers
        [address, *_] = self.address(next(x for x in instruction.operands if isinstance(x, Address)))[guard].tolist()
        if operation == "init":
            barriers[address] = Barrier(int(instruction.operands[-1]))
            return None
        if operation == "try_wait":
            self.write(instruction.operands[0], guard, guard)
            [parity, *_] = self.value(instruction.operands[-1], 32)[guard].tolist()
            return lambda: barriers[address].passed(parity)
        if (name, operation) not in (("mbarrier", "arrive"), ("cp", "async")):
            raise NotImplementedError(instruction.opcode)
        if name == "cp":
            # without `noinc` the arrival is balanced by one more expected arrival, so it counts nothing
            barriers[address].arrive(int(guard.sum()) * ("noinc" in instruction.opcode), self.copies.take_all())
        else:
            times = int(instruction.operands[-1]) if isinstance(instruction.operands[-1], str) else 1
            barriers[address].arrive(int(guard.sum()) * times)
        return lambda: True

    def change_registers(self, count: int) -> Ready:
        """`setmaxnreg`: all warpgroups together have the registers of the launch, so one that wants more waits for others."""

        def ready() -> bool:
            others = [warps.max_registers for warps in self.block.warps if warps is not self]
            if sum(others) + count > self.kernel.max_registers * len(self.block.warps):
                return False
            self.max_registers = count
            return True

        return ready

    def load(self, instruction: Instruction, guard: Array) -> None:
        space, kind = space_and_type(instruction)
        to, where = instruction.operands
        size = bits(kind) // 8
        if space == "param":
            data = np.frombuffer(self.block.parameters[where.base], np.uint8)[where.offset :][:size]
            found = np.broadcast_to(data, (len(self.threads), size))
        else:
            count = len(to) if isinstance(to, tuple) else 1
            found = self.memories[space].load(self.address(where), count * size, guard)
        values = np.ascontiguousarray(found).view(INTEGERS.get(kind) or RAW[8 * size])
        self.write(to, values if isinstance(to, tuple) else values[:, 0], guard)

    def store(self, instruction: Instruction, guard: Array) -> None:
        space, kind = space_and_type(instruction)
        where, values = instruction.operands
        width = bits(kind)
        values = values if isinstance(values, tuple) else (values,)
        data = np.stack([self.value(x, width) for x in values], axis=1).view(np.uint8)
        if space == "shared":
            self.write_shared(self.address(where), data, guard)
        else:
            self.memories[space].store(self.address(where), data, guard)

    def write_shared(self, addresses: Array, data: Array, guard: Array) -> None:
        """Write into shared memory, and mark the bytes as neither fenced nor synchronized."""
        self.block.shared.store(addresses, data, guard)
        offsets = addresses[guard].astype(np.int64)[:, None] + np.arange(data.shape[1])
        if any(((offsets >= barrier) & (offsets < barrier + 8)).any() for barrier in self.block.barriers):
            raise OutOfBounds("a barrier is written over")
        self.unsynced_bytes[offsets] = True
        for warps in self.block.warps:
            warps.unfenced_bytes[offsets] = True

    def copy(self, instruction: Instruction, guard: Array) -> None:
        """`cp.async`: the destination is undefined until the copy is waited for."""
        if instruction.opcode in ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"):
            self.copies.execute(instruction)
        else:
            to, of, size, *source_size = instruction.operands
            size, to, of = number(size, 32), self.address(to), self.address(of)
            wanted = self.value(source_size[0], 32) if source_size else np.full(len(self.threads), size)
            data = self.block.memory.load(of, size, guard & (wanted > 0)) * (np.arange(size) < wanted[:, None])
            self.write_shared(to, np.full_like(data, 0xFF, np.uint8), guard)
            self.copies.add(lambda: self.write_shared(to, data.astype(np.uint8), guard))

    def multiply(self, instruction: Instruction) -> None:
        """`wgmma.mma_async`: reads its operands as late as possible, when it is waited for."""
        to, a, b, scaled, *rest = instruction.operands
        product = matrices.Wgmma.of(instruction.opcode)
        # floats have two sign flags; 16-bit types then have flags for operands in shared memory that are transposed
        assert set(rest[:2]) <= {"1"}, f"{instruction.opcode}: a negated operand"
        transposed = [False, False, *(each == "1" for each in rest[2:])][-2:]
        rows = None if isinstance(a, tuple) else product.addresses(self.value(a, 64), False, transposed[0])
        columns = product.addresses(self.value(b, 64), True, transposed[1])
        self.unfenced += any((self.unfenced_bytes[x] | self.unsynced_bytes[x]).any() for x in (rows, columns) if x is not None)
        adds, active = self.value(scaled, 1), self.active

        def finish() -> None:
            left = [self.value(x, 32) for x in a] if rows is None else self.block.shared_bytes[rows]
            result = product.run([self.value(x, 32) for x in to], left, self.block.shared_bytes[columns], adds)
            for register, x in zip(to, result, strict=True):
                self.write(register, x, active)

        self.products.add(finish)

    def move_matrices(self, instruction: Instruction) -> None:
        count = int(instruction.opcode.split(".x")[1][0])
        first, second = instruction.operands
        to, where = (first, second) if instruction.opcode.startswith("ld") else (second, first)
        rows = matrices.matrix_rows(count, self.address(where)).reshape(-1)
        transposed = ".trans" in instruction.opcode
        if instruction.opcode.startswith("ld"):
            data = self.block.shared.load(rows, 16, np.ones(len(rows), bool)).view(np.uint16).reshape(-1, count, 8, 8)
            for register, x in zip(to, matrices.spread(data.swapaxes(2, 3) if transposed else data), strict=True):
                self.write(register, x, self.active)
        else:
            data = matrices.gathered([self.value(x, 32) for x in to])
            data = np.ascontiguousarray(data.swapaxes(2, 3) if transposed else data).view(np.uint8).reshape(-1, 16)
            self.write_shared(rows, data, np.ones(len(rows), bool))

    def exchange(self, instruction: Instruction) -> None:
        """Execute an instruction in which the threads of a warp exchange registers."""
        to, *operands = instruction.operands
        if instruction.opcode.startswith("shfl"):
            result = matrices.shuffled(instruction.opcode.split(".")[2], *(self.value(x, 32) for x in operands[:3]))
            self.write(to[0] if isinstance(to, tuple) else to, result, self.active)
            return
        if instruction.opcode.startswith("elect"):
            for register, x in zip(to, (np.zeros(len(self.threads), np.uint32), self.threads % 32 == 0), strict=True):
                self.write(register, x, self.active)
            return
        if instruction.opcode.startswith("redux"):
            self.write(to, matrices.reduced(instruction.opcode, self.value(operands[0], 32)), self.active)
            return
        before = [self.value(x, 32) for x in to]
        result = matrices.mma(instruction.opcode, before, *([self.value(x, 32) for x in operand] for operand in operands))
        for register, x in zip(to, result, strict=True):
            self.write(register, x, self.active)


def space_and_type(instruction: Instruction) -> tuple[str, str]:
    """The state space and type of a load or store. A generic address, without a space, is taken for local memory."""
    _, *parts, kind = instruction.opcode.split(".")
    return next((part for part in parts if part in ("param", "global", "shared", "local")), "local"), kind


def number(text: str, width: int) -> Array:
    """The bits of a constant."""
    if text == "global_smem":
        return RAW[width].type(RESERVED)
    if text[:2] in ("0f", "0d"):
        return RAW[width].type(int(text[2:], 16))
    return RAW[width].type(int(text.rstrip("U"), 0) % 2 ** max(width, 8))
