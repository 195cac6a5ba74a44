"""Runs the inline assembly of fragments in Triton's interpreter."""

from dataclasses import dataclass
from itertools import count

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ptx import text
from ptx.arithmetic import function, raw, typed

WORD = np.uint32


def run(asm: str, constraints: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run assembly on the registers of its inputs; returns the registers of its outputs.

    A compiler may give an output that is not marked `&` the register of an input. Here it always does.
    """
    constraint_list = constraints.split(",")
    outputs = [constraint for constraint in constraint_list if constraint.startswith("=")]
    input_registers = [f"in {index}" for index in range(len(inputs))]
    free = iter(input_registers)
    names = {f"${index}": f"out {index}" if "&" in mark else next(free, f"out {index}") for index, mark in enumerate(outputs)}
    names |= {f"${index + len(outputs)}": register for index, register in enumerate(input_registers)}
    registers = dict(zip(input_registers, inputs, strict=True))

    def value(word: str) -> np.ndarray:
        return registers[names.get(word, word)] if not word[0].isdigit() else np.full_like(inputs[0], int(word, 0))

    for instruction in map(text.instruction, (x for x in text.statements(asm) if not x.startswith("."))):
        to, *given = instruction.operands
        apply, kinds, kind = function(instruction.opcode)
        result = apply(*(typed(value(x), of) for x, of in zip(given, kinds, strict=False)))
        registers[names.get(to, to)] = raw(result, kind)
    return [registers[names[f"${index}"]] for index in range(len(outputs))]


@dataclass
class Results:
    handles: list[TensorHandle]

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def to_words(data: np.ndarray, pack: int) -> list[np.ndarray]:
    words = np.ascontiguousarray(data).reshape(-1, pack).view(np.uint8).reshape(data.size // pack, -1).view(WORD)
    return [words[:, each].copy() for each in range(words.shape[1])]


def from_words(words_of_outputs: list[np.ndarray], position: count, kind, shape: tuple[int, ...], pack: int) -> np.ndarray:
    numpy_type = {"int8": np.int8, "fp16": np.float16, "fp32": np.float32}[kind.scalar.name]
    needed = pack * np.dtype(numpy_type).itemsize // 4
    words = np.stack([words_of_outputs[next(position)] for _ in range(needed)], axis=1)
    return np.ascontiguousarray(words).view(numpy_type).reshape(shape)


def allow(monkeypatch) -> set[str]:
    """Let Triton's interpreter run inline assembly. Returns the set of texts that it has run."""
    seen = set()

    def create_inline_asm(self, text, constraints, handles, types, is_pure, pack):
        # like the compiler: elements of each tensor are packed into registers, in order
        seen.add(text)
        registers = [words for handle in handles for words in to_words(handle.data, pack)]
        outputs, position = run(text, constraints, registers), count()
        shape = handles[0].data.shape
        return Results([TensorHandle(from_words(outputs, position, kind, shape, pack), kind.scalar) for kind in types])

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)
    return seen
