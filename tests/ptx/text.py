"""Parses the PTX text of a kernel into instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ptx.arithmetic import bits


@dataclass(frozen=True)
class Address:
    """`[base + offset]`: a register or a name, and bytes."""

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
    """One entry: types of parameters, threads, how many registers each may have where that is said, bytes of memory that each
    has for itself, bits of registers (`r<` for all of %r0, %r1 ...), and what it does."""

    parameters: dict[str, str]
    threads: int
    most: int
    local: int
    widths: dict[str, int]
    body: tuple[Instruction, ...]

    def width(self, register: str) -> int:
        """Bits of a register."""
        return self.widths[register] if register in self.widths else self.widths[register.rstrip("0123456789") + "<"]


@cache
def read(text: str) -> Kernel:
    """The one entry of a module."""
    text = re.split(r"// -- End function|\t\.section", text)[0]
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head, body = re.search(r"\.entry\s[^(]*\((.*?)\)(?=[^()]*\{)(.*)", text, re.S).groups()
    parameters = dict(reversed(re.search(r"\.param\s+\.(\w+).*?(\w+)$", line.strip()).groups()) for line in head.split(",\n"))
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", body)[1])
    most = re.search(r"\.maxnreg\s+(\d+)", body)
    local = re.search(r"\.local\s.*?__local_depot\d+\[(\d+)\]", body)
    widths, instructions, kinds = {}, [], {}
    for statement in statements(body[body.index("{") :]):
        # scopes of inline assembly use the same names for registers of several types: each type has its own
        for name, kind in kinds.items():
            place = r"\d+" if name.endswith("<") else ""
            statement = re.sub(rf"(?<![%\w.])({name.rstrip('<')}{place})\b", rf"{kind}_\1", statement)
        if statement.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
            for name in (re.sub(r"\d+>", "", each.strip()).rpartition("_")[2] for each in names.split(",")):
                if name[0] != "%":
                    kinds[name] = kind
                widths[name if name[0] == "%" else f"{kind}_{name}"] = bits(kind)
        elif not statement.startswith("."):
            instructions.append(instruction(statement))
    return Kernel(parameters, threads, int(most[1]) if most else 0, int(local[1]) if local else 0, widths, tuple(instructions))


def statements(text: str) -> Iterator[str]:
    """Instructions, declarations and labels one by one, scopes dissolved."""
    text = re.sub(r"\.(loc|file)\b[^\n]*", "", text)
    for part in re.split(r";|(?<=:)\s", text):
        # a brace that begins a statement is that of a scope; others are those of vectors
        if statement := re.sub(r"^[{}\s]+", "", part).strip():
            yield statement


def instruction(statement: str) -> Instruction:
    """One statement that is no declaration."""
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
