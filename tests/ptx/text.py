"""Parses the PTX text of a kernel into instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ptx.arithmetic import bits


@dataclass(frozen=True)
class Address:
    """`[base + offset]`: a register or a symbol, and an offset in bytes."""

    base: str
    offset: int


Operand = str | Address | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`; a label where the opcode ends with a colon."""

    opcode: str
    operands: tuple[Operand, ...] = ()
    guard: str | None = None


@dataclass(frozen=True)
class Kernel:
    """A kernel, the entry of a module."""

    parameters: dict[str, str]
    """Types by name."""
    threads: int
    """Threads of a block."""
    max_registers: int
    """Registers per thread, by `.maxnreg`; 0 without one."""
    local: int
    """Bytes of local memory per thread."""
    widths: dict[str, int]
    """Bits of registers; `%r<` stands for %r0, %r1 ..."""
    body: tuple[Instruction, ...]

    def width(self, register: str) -> int:
        """The width of a register in bits."""
        return self.widths[register] if register in self.widths else self.widths[register.rstrip("0123456789") + "<"]


@cache
def read(text: str) -> Kernel:
    """Parse the entry of a module."""
    text = re.split(r"// -- End function|\t\.section", text)[0]
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head, body = re.search(r"\.entry\s[^(]*\((.*?)\)(?=[^()]*\{)(.*)", text, re.S).groups()
    parameters = dict(reversed(re.search(r"\.param\s+\.(\w+).*?(\w+)$", line.strip()).groups()) for line in head.split(",\n"))
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", body)[1])
    max_registers = re.search(r"\.maxnreg\s+(\d+)", body)
    local = re.search(r"\.local\s.*?__local_depot\d+\[(\d+)\]", body)
    widths, instructions, kinds = {}, [], {}
    for statement in statements(body[body.index("{") :]):
        # scopes of inline assembly may reuse a register name with another type: prefix these names with the type
        for name, kind in kinds.items():
            digits = r"\d+" if name.endswith("<") else ""
            statement = re.sub(rf"(?<![%\w.])({name.rstrip('<')}{digits})\b", rf"{kind}_\1", statement)
        if statement.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
            for name in (re.sub(r"\d+>", "", each.strip()).rpartition("_")[2] for each in names.split(",")):
                if name[0] != "%":
                    kinds[name] = kind
                widths[name if name[0] == "%" else f"{kind}_{name}"] = bits(kind)
        elif not statement.startswith("."):
            instructions.append(instruction(statement))
    return Kernel(
        parameters,
        threads,
        int(max_registers[1]) if max_registers else 0,
        int(local[1]) if local else 0,
        widths,
        tuple(instructions),
    )


def statements(text: str) -> Iterator[str]:
    """Instructions, declarations and labels in order, without the braces of scopes."""
    text = re.sub(r"\.(loc|file)\b[^\n]*", "", text)
    for part in re.split(r";|(?<=:)\s", text):
        # a brace at the beginning of a statement belongs to a scope; others enclose vectors
        if statement := re.sub(r"^[{}\s]+", "", part).strip():
            yield statement


def instruction(statement: str) -> Instruction:
    """Parse a statement that is not a declaration."""
    guard, opcode, operands = re.fullmatch(r"(?:@(!?%?\w+)\s+)?(\S+)\s*(.*)", statement, re.S).groups()
    return Instruction(opcode, tuple(operand(each) for each in split(operands)), guard)


def split(operands: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [each.strip() for each in re.split(r",(?![^{]*\})", operands) if each.strip()]


def operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(operand(each) for each in split(text.strip("{} \t")))
    if text[0] == "[":
        base, _, offset = text.strip("[] \t").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return tuple(text.split("|")) if "|" in text else text
