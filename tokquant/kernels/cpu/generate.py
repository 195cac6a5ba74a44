"""Write a plan's kernel: the template and its fragments, copied as they stand, into one C++ file that needs nothing else.

Three edits are made. An `#include "..."` gives way to the file, the constants on top take the plan's values, and lines between
`#if CONSTANT` and `#endif` stay or go.
"""

import re
from functools import lru_cache
from pathlib import Path

from tokquant.kernels.cpu.plan import CpuPlan

HERE = Path(__file__).parent

CONSTANT = re.compile(r"(?P<kind>#define|constexpr \w+) (?P<name>[A-Z]\w*)(?: = | )(?P<value>[\w.+-]+);?(?P<comment>  //.*)?")
CONDITION = re.compile(r"#if ((?:!?[A-Z]\w+)(?: \|\| !?[A-Z]\w+)*)")


@lru_cache(maxsize=256)
def render(plan: CpuPlan) -> str:
    """The text of the plan's kernel."""
    constants = dict(plan.constants)
    template = (HERE / f"{plan.template}.cpp").read_text(encoding="utf-8").replace("TITLE", plan.title, 1)
    head, body = template.split('#include "lanes.h"\n')
    body = f'#include "lanes.h"\n{body}'.replace('"portable.h"', f'"{plan.instructions}.h"')
    while '#include "' in body:
        body = re.sub(r'#include "([\w.]+)"\n', lambda m: f"// {m[1]}\n{(HERE / m[1]).read_text(encoding='utf-8')}", body)
    body = _living(body, constants)
    for name, text in plan.fragments:
        line = rf"static inline \w+ {name}\(.*\n"
        used = len(re.findall(rf"\b{name}\(", body)) > 1
        body = re.sub(line, (text + "\n").replace("\\", r"\\") if used else "", body)
    lines = []
    for line in head.splitlines():
        constant = CONSTANT.fullmatch(line)
        if constant is None:
            lines.append(line)
        elif re.search(rf"\b{constant['name']}\b", body):
            name, value, comment = constant["name"], constants[constant["name"]], constant["comment"] or ""
            macro = constant["kind"] == "#define"
            lines.append(f"#define {name} {value}{comment}" if macro else f"{constant['kind']} {name} = {value};{comment}")
    return "\n".join(lines) + "\n" + re.sub(r"\n{3,}", "\n\n", body)


def _living(text: str, constants: dict[str, str]) -> str:
    """`text` without what `#if` on constants leaves out, and without those lines themselves. Other conditions stay."""
    kept, states = [], []  # of each open condition: whether it is on constants, and whether its lines stay
    for line in text.splitlines(keepends=True):
        word = line.strip()
        if match := CONDITION.fullmatch(word):
            names = match[1].split(" || ")
            states.append((True, any((constants[name.lstrip("!")] == "1") != name.startswith("!") for name in names)))
        elif word.startswith("#if"):
            states.append((False, True))
        elif states and states[-1][0] and word in ("#else", "#endif"):
            ours, stays = states.pop()
            if word == "#else":
                states.append((ours, not stays))
            continue
        elif word.startswith("#endif"):
            states.pop()
        if all(stays for _, stays in states) and not CONDITION.fullmatch(word):
            kept.append(line)
    assert not states, "the template closes every #if"
    return "".join(kept)
