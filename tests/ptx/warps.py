"""Threads that run in lockstep, and what each instruction does for all of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ptx import matrices
from ptx.arithmetic import INTEGERS, RAW, bits, function, raw, typed
from ptx.barriers import Barrier, Later, Ready
from ptx.memory import RESERVED, Memory, OutOfBounds
from ptx.text import Address, Instruction, Operand

if TYPE_CHECKING:
    from ptx.block import Block

Array = np.ndarray

NOTHING = {"fence", "membar", "wgmma.fence", "griddepcontrol"}
"""Instructions that order memory accesses, which are never out of order here."""


class Warps:
    """The state of threads that run in lockstep: each register is an array with an element per thread."""

    def __init__(self, block: "Block", threads: range, place: dict[str, int]):
        """`threads` are the indices in the block; `place` has the special registers with the same value for all."""
        self.block, self.kernel, self.threads = block, block.kernel, np.array(threads)
        special = {
            "%tid.x": self.threads,
            "%laneid": self.threads % 32,
            "%ntid.x": self.kernel.threads,
            "%tid.y": 0,
            "%tid.z": 0,
        }
        self.registers = {
            name: np.broadcast_to(np.asarray(x, np.uint32), len(self.threads)) for name, x in (special | place).items()
        }
        self.all = np.ones(len(self.threads), bool)
        self.copies, self.products = Later(), Later()
        self.fresh = np.zeros(len(block.held), bool)
        """Bytes of shared memory that any thread has written since these threads' last `fence.proxy.async`."""
        self.unmet = np.zeros(len(block.held), bool)
        """Bytes of shared memory that these threads have written since their last `bar.sync`: other warps need not see them."""
        self.unfenced = 0
        self.most = self.kernel.most
        """Registers per thread, as `setmaxnreg` counts them."""
        self.own = np.full((len(self.threads), self.kernel.local), 0xFF, np.uint8)
        """Local memory of each thread."""
        self.memories = {
            "global": block.memory,
            "shared": block.shared,
            "local": Memory([(self.own.ctypes.data, self.own.reshape(-1))]),
        }
        self.at: Instruction | None = None

    def run(self) -> Iterator[Ready]:
        """Run from the first instruction to `ret`. Where it has to wait, or others may proceed, it yields a function that says
        whether it may go on."""
        body = self.kernel.body
        labels: dict[str, list[int]] = {}
        for at, each in enumerate(body):
            if each.opcode.endswith(":"):
                labels.setdefault(each.opcode[:-1], []).append(at)
        # threads by their next instruction. Those furthest behind go first, so that diverged paths join again
        waiting = {0: self.all}
        while waiting:
            at = min(waiting)
            self.active = waiting.pop(at)
            self.at = each = body[at]
            parting = each.opcode in ("ret", "exit") or each.opcode.startswith("bra")
            ahead = {at + 1: self.active}
            if parting:
                leaving = self.guard(each)
                ahead = {at + 1: self.active & ~leaving}
                if each.opcode.startswith("bra"):
                    # scopes of inline assembly may reuse a label: take the nearest
                    ahead[min(labels[each.operands[0]], key=lambda place: abs(place - at))] = leaving
            elif not each.opcode.endswith(":"):
                pause = self.step(each)
                if pause is not None:
                    yield pause
            for at, threads in ahead.items():
                if parting or waiting:
                    threads = threads | waiting[at] if at in waiting else threads
                    if not threads.any():
                        continue
                    threads = self.all if threads.all() else threads
                waiting[at] = threads

    def guard(self, each: Instruction) -> Array:
        """The threads that execute an instruction, by its predicate."""
        if each.guard is None:
            return self.active
        taken = self.registers[each.guard.lstrip("!")]
        return self.active & (~taken if each.guard[0] == "!" else taken)

    def value(self, operand: Operand, width: int) -> Array:
        """An operand's bits, one element per thread."""
        if operand in self.registers:
            found = self.registers[operand]
        elif isinstance(operand, tuple):
            parts = [self.value(each, width // len(operand)) for each in operand]
            found = np.stack(parts, axis=-1).view(RAW[width])[..., 0]
        elif operand.startswith("__local_depot"):
            found = self.own.ctypes.data + np.arange(len(self.threads), dtype=np.uint64) * np.uint64(self.kernel.local)
        elif operand[0] == "%":
            found = ~np.zeros(len(self.threads), RAW[width])  # never written: NaN
        else:
            found = np.full(len(self.threads), number(operand, width))
        return found.astype(RAW[width], copy=False)

    def write(self, to: Operand, found: Array, guard: Array) -> None:
        """Write a result to a register of the threads that execute; a narrow one is extended by its type."""
        if isinstance(to, tuple):
            parts = found if found.ndim == 2 else np.ascontiguousarray(found)[:, None].view(RAW[8 * found.itemsize // len(to)])
            for place, each in enumerate(to):
                self.write(each, parts[:, place], guard)
        elif to != "_":
            kind = RAW[self.kernel.width(to)]
            extended = np.dtype(f"i{kind.itemsize}") if found.dtype.kind == "i" else kind
            found = np.ascontiguousarray(found).astype(extended).view(kind)
            if guard is not self.all:
                found = np.where(guard, found, self.registers.get(to, ~np.zeros(1, kind)))
            self.registers[to] = found

    def address(self, where: Address) -> Array:
        """In bytes."""
        if where.base == "global_smem":
            return np.full(len(self.threads), RESERVED + where.offset, np.uint64)
        base = self.registers[where.base]
        return (base + base.dtype.type(where.offset % 2 ** (8 * base.itemsize))).astype(np.uint64)

    def step(self, each: Instruction) -> Ready | None:
        """Execute one instruction. If the threads have to wait, returns a function that says whether they may go on."""
        name, guard = each.opcode.partition(".")[0], self.guard(each)
        if name in ("bar", "barrier", "mbarrier", "setmaxnreg") or each.opcode.startswith("cp.async.mbarrier"):
            return self.wait(each, guard)
        if name in ("ld", "st"):
            (self.load if name == "ld" else self.store)(each, guard)
        elif each.opcode.startswith("cp.async"):
            self.copy(each, guard)
        elif each.opcode.startswith("fence.proxy.async"):
            self.fresh[:] = False
        elif each.opcode.startswith(("wgmma.commit_group", "wgmma.wait_group")):
            self.products.order(each)
        elif each.opcode.startswith("wgmma.mma_async"):
            self.multiply(each)
        elif name in ("ldmatrix", "stmatrix"):
            self.move_matrices(each)
        elif name in ("mma", "shfl", "redux", "elect"):
            self.together(each)
        elif name not in NOTHING and ".".join(each.opcode.split(".")[:2]) not in NOTHING:
            try:
                apply, kinds, kind = function(each.opcode)
            except KeyError:
                raise NotImplementedError(each.opcode) from None
            to, *operands = each.operands
            given = (typed(self.value(x, bits(k)), k) for x, k in zip(operands, kinds, strict=False))
            found = raw(apply(*given), kind)
            self.write(to, found.view(INTEGERS[kind]) if kind[0] == "s" and "x" not in kind else found, guard)
        return None

    def wait(self, each: Instruction, guard: Array) -> Ready | None:
        """Barriers: instructions by which warps wait for one another or let others go on."""
        name, does, *_ = each.opcode.split(".")
        if name in ("bar", "barrier"):
            self.unmet[:] = False
            if len(self.threads) == self.kernel.threads:
                return None  # these threads run in lockstep anyway
            place, *count = (int(x) for x in each.operands)
            return self.block.meetings[place].come(int(guard.sum()), *count or [self.kernel.threads])
        if name == "setmaxnreg":
            return self.change_registers(int(each.operands[0]))
        if not guard.any():
            return None
        barriers = self.block.barriers
        [at, *_] = self.address(next(x for x in each.operands if isinstance(x, Address)))[guard].tolist()
        if does == "init":
            barriers[at] = Barrier(int(each.operands[-1]))
            return None
        if does == "try_wait":
            self.write(each.operands[0], guard, guard)
            [parity, *_] = self.value(each.operands[-1], 32)[guard].tolist()
            return lambda: barriers[at].passed(parity)
        if (name, does) not in (("mbarrier", "arrive"), ("cp", "async")):
            raise NotImplementedError(each.opcode)
        if name == "cp":
            # without `noinc` the arrival is balanced by one more expected arrival, so it counts nothing
            barriers[at].arrive(int(guard.sum()) * ("noinc" in each.opcode), self.copies.taken())
        else:
            times = int(each.operands[-1]) if isinstance(each.operands[-1], str) else 1
            barriers[at].arrive(int(guard.sum()) * times)
        return lambda: True

    def change_registers(self, most: int) -> Ready:
        """`setmaxnreg`: warpgroups have as many together as they began with, so one that wants more waits for others."""

        def ready() -> bool:
            others = [warps.most for warps in self.block.warps if warps is not self]
            if sum(others) + most > self.kernel.most * len(self.block.warps):
                return False
            self.most = most
            return True

        return ready

    def load(self, each: Instruction, guard: Array) -> None:
        space, kind = space_and_type(each)
        to, where = each.operands
        size = bits(kind) // 8
        if space == "param":
            data = np.frombuffer(self.block.given[where.base], np.uint8)[where.offset :][:size]
            found = np.broadcast_to(data, (len(self.threads), size))
        else:
            count = len(to) if isinstance(to, tuple) else 1
            found = self.memories[space].load(self.address(where), count * size, guard)
        values = np.ascontiguousarray(found).view(INTEGERS.get(kind) or RAW[8 * size])
        self.write(to, values if isinstance(to, tuple) else values[:, 0], guard)

    def store(self, each: Instruction, guard: Array) -> None:
        space, kind = space_and_type(each)
        where, given = each.operands
        width = bits(kind)
        given = given if isinstance(given, tuple) else (given,)
        data = np.stack([self.value(x, width) for x in given], axis=1).view(np.uint8)
        if space == "shared":
            self.share(self.address(where), data, guard)
        else:
            self.memories[space].store(self.address(where), data, guard)

    def share(self, addresses: Array, data: Array, guard: Array) -> None:
        """Write into shared memory, as threads do."""
        self.block.shared.store(addresses, data, guard)
        places = addresses[guard].astype(np.int64)[:, None] + np.arange(data.shape[1])
        if any(((places >= at) & (places < at + 8)).any() for at in self.block.barriers):
            raise OutOfBounds("a barrier is written over")
        self.unmet[places] = True
        for warps in self.block.warps:
            warps.fresh[places] = True

    def copy(self, each: Instruction, guard: Array) -> None:
        """`cp.async`: the destination is undefined until the copy is waited for."""
        if each.opcode in ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"):
            self.copies.order(each)
        else:
            to, of, size, *least = each.operands
            size, to, of = number(size, 32), self.address(to), self.address(of)
            wanted = self.value(least[0], 32) if least else np.full(len(self.threads), size)
            data = self.block.memory.load(of, size, guard & (wanted > 0)) * (np.arange(size) < wanted[:, None])
            self.share(to, np.full_like(data, 0xFF, np.uint8), guard)
            self.copies.begin(lambda: self.share(to, data.astype(np.uint8), guard))

    def multiply(self, each: Instruction) -> None:
        """`wgmma.mma_async`: reads its operands, in registers and in shared memory, when it is waited for."""
        to, a, b, scaled, *rest = each.operands
        does = matrices.Wgmma.of(each.opcode)
        # floats have two sign flags; 16-bit types then have flags for operands in shared memory that are transposed
        assert set(rest[:2]) <= {"1"}, f"{each.opcode}: an operand with its sign turned"
        across = [False, False, *(each == "1" for each in rest[2:])][-2:]
        rows = None if isinstance(a, tuple) else does.places(self.value(a, 64), False, across[0])
        columns = does.places(self.value(b, 64), True, across[1])
        self.unfenced += any((self.fresh[x] | self.unmet[x]).any() for x in (rows, columns) if x is not None)
        adds, active = self.value(scaled, 1), self.active

        def finish() -> None:
            left = [self.value(x, 32) for x in a] if rows is None else self.block.held[rows]
            found = does.run([self.value(x, 32) for x in to], left, self.block.held[columns], adds)
            for register, x in zip(to, found, strict=True):
                self.write(register, x, active)

        self.products.begin(finish)

    def move_matrices(self, each: Instruction) -> None:
        count = int(each.opcode.split(".x")[1][0])
        first, second = each.operands
        to, where = (first, second) if each.opcode.startswith("ld") else (second, first)
        rows = matrices.rows_of_matrices(count, self.address(where)).reshape(-1)
        across = ".trans" in each.opcode
        if each.opcode.startswith("ld"):
            found = self.block.shared.load(rows, 16, np.ones(len(rows), bool)).view(np.uint16).reshape(-1, count, 8, 8)
            for register, x in zip(to, matrices.spread(found.swapaxes(2, 3) if across else found), strict=True):
                self.write(register, x, self.active)
        else:
            found = matrices.gathered([self.value(x, 32) for x in to])
            found = np.ascontiguousarray(found.swapaxes(2, 3) if across else found).view(np.uint8).reshape(-1, 16)
            self.share(rows, found, np.ones(len(rows), bool))

    def together(self, each: Instruction) -> None:
        """Instructions by which the threads of a warp exchange registers."""
        to, *given = each.operands
        if each.opcode.startswith("shfl"):
            found = matrices.shuffled(each.opcode.split(".")[2], *(self.value(x, 32) for x in given[:3]))
            self.write(to[0] if isinstance(to, tuple) else to, found, self.active)
            return
        if each.opcode.startswith("elect"):
            for register, x in zip(to, (np.zeros(len(self.threads), np.uint32), self.threads % 32 == 0), strict=True):
                self.write(register, x, self.active)
            return
        if each.opcode.startswith("redux"):
            self.write(to, matrices.reduced(each.opcode, self.value(given[0], 32)), self.active)
            return
        before = [self.value(x, 32) for x in to]
        found = matrices.mma(each.opcode, before, *([self.value(x, 32) for x in each] for each in given))
        for register, x in zip(to, found, strict=True):
            self.write(register, x, self.active)


def space_and_type(each: Instruction) -> tuple[str, str]:
    """The state space of a load or store. Generic addresses, without one, are taken for local memory: others name theirs."""
    _, *parts, kind = each.opcode.split(".")
    return next((part for part in parts if part in ("param", "global", "shared", "local")), "local"), kind


def number(text: str, width: int) -> Array:
    """A constant's bits."""
    if text == "global_smem":
        return RAW[width].type(RESERVED)
    if text[:2] in ("0f", "0d"):
        return RAW[width].type(int(text[2:], 16))
    return RAW[width].type(int(text.rstrip("U"), 0) % 2 ** max(width, 8))
