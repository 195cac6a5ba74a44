"""README and docs do what they say: their Python runs, their commands exit well, their kernel is the generated one."""

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import tokquant as tq
from tokquant import cli
from tokquant.activations import Activations, sample
from tokquant.kernels import generate
from tokquant.kernels.plan import plan
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import preset, preset_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
COMMANDS = [PAGES[0], ROOT / "docs" / "index.md", ROOT / "docs" / "performance.md"]
"""Pages whose commands need nothing that a reader has to bring."""
SHORT = {"compare": ["--repeats", "1"], "bench": ["--repeats", "1", "--tokens", "64", "--head-dim", "32"]}
"""Words that make a command short."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, python):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    result = python(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_commands_of_a_page_exit_well(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    commands += [command for command in re.findall(r"`(tokquant [^`]+)`", page.read_text()) if command.islower()]
    assert len(commands) >= 2
    # compiling cannot share a process with the interpreter, and tuning needs a GPU; their own tests run them
    for command in (command for command in commands if command.split()[1] not in ("compile", "tune")):
        short = next((words for name, words in SHORT.items() if f"tokquant {name}" in command), [])
        monkeypatch.setattr("sys.argv", [*shlex.split(command), *short])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        assert not stop.value.code, (command, capsys.readouterr().err)


@pytest.mark.parametrize("excerpt", re.findall(r"^```kernel (\S+) causal\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
def test_the_kernel_of_the_readme_is_the_generated_one(excerpt):
    name, text = excerpt
    assert text in generate.render(
        plan(preset(name), head_dim=128, dtype=torch.float16, wanted=Wanted(right=True), tokens_last=True)
    )


def test_the_readme_has_a_row_for_every_preset_with_its_bits():
    for name in preset_names():
        [row] = re.findall(rf"^\| \**`{name}`\** \|.*$", README, re.MULTILINE)
        bits = " / ".join(f"{b:.3f}".rstrip("0").rstrip(".") for b in preset(name).bits_per_value().values())
        assert bits in row, name


def test_the_errors_of_the_readme_are_those_of_the_sample():
    found = defaultdict(list)
    names = [name for name in preset_names() if preset(name).k.scale == "dynamic"]
    for q, k, v in Activations(sample()).values():
        for result in tq.compare(q, k, v, names, repeats=1):
            found[result.scheme.name].append(100 * result.errors.rel_l1)
    for name, errors in found.items():
        [row] = re.findall(rf"^\| \**`{name}`\** \|.*$", README, re.MULTILINE)
        written = [float(text) for text in re.findall(r"([0-9.]+) %", row)]
        assert written == pytest.approx([sum(errors) / len(errors), max(errors)], abs=0.02), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", linked.read_text(), flags=re.M | re.S), re.M)
            # as code hosts, and MyST, make anchors of headings
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    for path, _, name in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", page.read_text()):
        assert f"def {name}" in (ROOT / path).read_text(), (path, name)


def test_the_names_that_explain_a_kernel_are_in_it():
    text = (ROOT / "docs" / "kernels.md").read_text().partition("## How to read a kernel")[2].partition("\n## ")[0]
    kernel = generate.render(plan(preset("int8-fast"), head_dim=128, dtype=torch.float16, wanted=Wanted(right=True)))
    names = set(re.findall(r"`([A-Za-z_.]+)`", text)) - {"unit", "row_block", "l"}
    assert len(names) > 20 and not {name for name in names if name not in kernel}
