"""The few instructions of PTX that fragments are written in, on a CPU: with it Triton's interpreter runs inline assembly."""

import re
from dataclasses import dataclass
from itertools import count

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

WORD = np.uint32


def lop3(a, b, c, table):
    """Any function of three bits: bit `4 a + 2 b + c` of the table."""
    found = np.zeros_like(a)
    for place in range(8):
        bits = [x if place >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
        if table >> place & 1:
            found |= bits[0] & bits[1] & bits[2]
    return found


def prmt(a, b, selector):
    """Four of the eight bytes of two registers, without its modes that repeat a sign."""
    chosen = [(selector >> WORD(4 * place)) & WORD(15) for place in range(4)]
    assert all(int(each) < 8 for each in chosen)
    both = [((a, b)[byte // 4] >> WORD(8 * (byte % 4))) & WORD(255) for byte in map(int, chosen)]
    return sum((byte << WORD(8 * place) for place, byte in enumerate(both)), start=np.zeros_like(a))


def by_halves(function):
    return lambda a, b: function(np.ascontiguousarray(a).view(np.float16), np.ascontiguousarray(b).view(np.float16)).view(WORD)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "sub.u32": np.subtract,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(np.ravel(table)[0])),
    "prmt.b32": lambda a, b, selector: prmt(a, b, np.ravel(selector)[0]),
    "sub.f16x2": by_halves(np.subtract),
    "lg2.approx.ftz.f32": lambda a: np.log2(a.view(np.float32)).view(WORD),
}


def run(text: str, constraints: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Registers of outputs, from those of inputs.

    An output that is not marked `&` may be the register of an input, and a compiler may make it so: here it is.
    """
    marks = constraints.split(",")
    outputs = [mark for mark in marks if mark.startswith("=")]
    homes = [f"in {place}" for place in range(len(inputs))]
    free = iter(homes)
    names = {f"${place}": f"out {place}" if "&" in mark else next(free, f"out {place}") for place, mark in enumerate(outputs)}
    names |= {f"${place + len(outputs)}": home for place, home in enumerate(homes)}
    registers = dict(zip(homes, inputs, strict=True))

    def value(word: str) -> np.ndarray:
        return np.full_like(inputs[0], int(word, 0)) if word[0].isdigit() else registers[names.get(word, word)]

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if line := line.strip():
            operation, operands = line.split(maxsplit=1)
            to, *given = (word.strip() for word in operands.split(","))
            registers[names.get(to, to)] = INSTRUCTIONS[operation](*map(value, given)).astype(WORD)
    return [registers[names[f"${place}"]] for place in range(len(outputs))]


@dataclass
class Results:
    handles: list[TensorHandle]

    def get_result(self, place: int) -> TensorHandle:
        return self.handles[place]


def in_words(data: np.ndarray, pack: int) -> list[np.ndarray]:
    words = np.ascontiguousarray(data).reshape(-1, pack).view(np.uint8).reshape(data.size // pack, -1).view(WORD)
    return [words[:, each].copy() for each in range(words.shape[1])]


def of_words(found: list[np.ndarray], place: count, kind, shape: tuple[int, ...], pack: int) -> np.ndarray:
    numpy_type = {"int8": np.int8, "fp16": np.float16, "fp32": np.float32}[kind.scalar.name]
    needed = pack * np.dtype(numpy_type).itemsize // 4
    words = np.stack([found[next(place)] for _ in range(needed)], axis=1)
    return np.ascontiguousarray(words).view(numpy_type).reshape(shape)


def allow(monkeypatch) -> set[str]:
    """Let Triton's interpreter run inline assembly; the texts that it has run."""
    seen = set()

    def create_inline_asm(self, text, constraints, handles, types, is_pure, pack):
        # as the builder of a compiler: elements of each tensor packed into registers, in order
        seen.add(text)
        registers = [words for handle in handles for words in in_words(handle.data, pack)]
        found, place = run(text, constraints, registers), count()
        shape = handles[0].data.shape
        return Results([TensorHandle(of_words(found, place, kind, shape, pack), kind.scalar) for kind in types])

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)
    return seen
