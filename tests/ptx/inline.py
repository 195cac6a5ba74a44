"""Inline assembly of fragments in Triton's interpreter."""

from dataclasses import dataclass
from itertools import count

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ptx import text
from ptx.arithmetic import function, raw, typed

WORD = np.uint32


def run(asm: str, constraints: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
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
        return registers[names.get(word, word)] if not word[0].isdigit() else np.full_like(inputs[0], int(word, 0))

    for each in map(text.instruction, (x for x in text.statements(asm) if not x.startswith("."))):
        to, *given = each.operands
        apply, kinds, kind = function(each.opcode)
        found = apply(*(typed(value(x), of) for x, of in zip(given, kinds, strict=False)))
        registers[names.get(to, to)] = raw(found, kind)
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
