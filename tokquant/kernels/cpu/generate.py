"""Generates a plan's kernel from a template: one self-contained C++ file.

Each `#include "..."` is replaced by the file, constants on top get the plan's values, `#if` on constants is resolved, and the
plan's fragments replace functions of the same name.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokquant.kernels.cpu.plan import CpuPlan, literal

HERE = Path(__file__).parent

CONSTANT = re.compile(r"(?P<kind>#define|constexpr \w+) (?P<name>[A-Z]\w*)(?: = | )(?P<value>[\w.+-]+);?(?P<comment>  //.*)?")
CONDITION = re.compile(r"#if ((?:!?[A-Z]\w+)(?: \|\| !?[A-Z]\w+)*)")


@lru_cache(maxsize=256)
def render(plan: CpuPlan) -> str:
    """The C++ text of the plan's kernel."""
    template = (HERE / f"{plan.template}.cpp").read_text(encoding="utf-8").replace("TITLE", plan.title, 1)
    head, body = template.split('#include "lanes.h"\n')
    body = f'#include "lanes.h"\n{body}'.replace('"portable.h"', f'"{plan.instructions}.h"')
    while '#include "' in body:
        body = re.sub(r'#include "([\w.]+)"\n', lambda m: f"// {m[1]}\n{(HERE / m[1]).read_text(encoding='utf-8')}", body)
    body = _without_dead_branches(body, plan.constants)
    for name, text in plan.fragments:
        line = rf"static inline \w+ {name}\(.*\n"
        used = len(re.findall(rf"\b{name}\(", body)) > 1
        body = re.sub(line, (text + "\n").replace("\\", r"\\") if used else "", body)
    lines, words = [], set(re.findall(r"\w+", body))
    for line in head.splitlines():
        constant = CONSTANT.fullmatch(line)
        if constant is None:
            lines.append(line)
        elif constant["name"] in words:
            name, value, comment = constant["name"], _text(plan.constants[constant["name"]]), constant["comment"] or ""
            macro = constant["kind"] == "#define"
            lines.append(f"#define {name} {value}{comment}" if macro else f"{constant['kind']} {name} = {value};{comment}")
    return "\n".join(lines) + "\n" + re.sub(r"\n{3,}", "\n\n", body)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else literal(value) if isinstance(value, float) else str(int(value))


def _without_dead_branches(text: str, constants: Mapping[str, Any]) -> str:
    """`text` with every `#if` on constants resolved. Other conditions stay."""
    kept, states = [], []  # a state per open condition: whether it is on constants, and whether its lines stay
    for line in text.splitlines(keepends=True):
        directive = line.strip()
        if match := CONDITION.fullmatch(directive):
            names = match[1].split(" || ")
            states.append((True, any(constants[name.lstrip("!")] != name.startswith("!") for name in names)))
        elif directive.startswith("#if"):
            states.append((False, True))
        elif states and states[-1][0] and directive in ("#else", "#endif"):
            _, stays = states.pop()
            if directive == "#else":
                states.append((True, not stays))
            continue
        elif directive.startswith("#endif"):
            states.pop()
        if all(stays for _, stays in states) and not CONDITION.fullmatch(directive):
            kept.append(line)
    assert not states, "the template closes every #if"
    return "".join(kept)
