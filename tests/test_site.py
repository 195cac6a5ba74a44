"""The pages of docs/ as a site: it builds without a warning, and has every public name, every command and every picture."""

import importlib.util
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from typer.main import get_command

import tokquant as tq
from tokquant import io_model
from tokquant.activations import Activations, sample
from tokquant.cli import app
from tokquant.integrations import diffusers, transformers

DOCS = Path(__file__).parent.parent / "docs"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(page: Path) -> str:
    """What a reader sees of it."""
    return unescape(re.sub(r"<[^>]+>", "", page.read_text()))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built once: a warning is an error, and so is a reference that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", DOCS, folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_there_and_in_the_menu(site):
    menu = (site / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}.html"' in menu
        # a page of Sphinx's own may stand in its place, as search.html does
        title = re.search(r"^# (.*)$", page.read_text(), re.M)
        assert not title or f"<h1>{title[1]}<" in (site / f"{page.stem}.html").read_text(), page.name


def test_every_public_name_is_documented(site):
    text = (site / "api.html").read_text()
    for module in (tq, tq.bias, tq.folding, io_model, transformers, diffusers):
        for name in getattr(module, "__all__", ("fold", "split", "Folded")):
            kind = "module-" if isinstance(getattr(module, name), ModuleType) else ""
            assert f'id="{kind}{module.__name__}.{name}"' in text, name


def test_docstrings_and_signatures_are_shown_as_a_reader_would_write_them(site):
    text = shown(site / "api.html")
    assert " at 0x" not in text and "pydantic" not in text
    assert not re.search(r"^(Args|Raises):$", text, re.M) and "|---" not in text and "`" not in text
    assert "-slope * |i + N_k - N_q - j|" in text


def test_every_command_and_option_is_described_by_its_own_help(site):
    text = shown(site / "commands.html")
    for name, command in get_command(app).commands.items():
        assert f"tokquant {name}" in text
        for option in command.params:
            assert max(option.opts, key=len) in text, (name, option.opts)


def test_pictures_are_drawn_from_the_activations_alike_every_time_and_are_those_that_pages_show(tmp_path):
    figures = loaded(DOCS / "figures.py")
    layers = {name: tensors for name, tensors in Activations(sample()).items() if name in ("layers.0", "layers.2", "layers.3")}
    drawn = {}
    for turn in ("first", "second"):
        folder = tmp_path / turn
        folder.mkdir()
        drawn[turn] = {path.name: path.read_bytes() for path in figures.write(folder, layers, longest=512)}
    assert drawn["first"] == drawn["second"]
    shown = {name for page in DOCS.glob("*.md") for name in re.findall(r"\]\(figures/([^)]+)\)", page.read_text())}
    assert set(drawn["first"]) == shown == {path.name for path in (DOCS / "figures").iterdir()}
    for path in (DOCS / "figures").iterdir():
        assert path.stat().st_size < 60_000 and b"<dc:date>" not in path.read_bytes()
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_p_costs_more_with_more_keys_under_one_maximum_and_not_under_one_for_each_block():
    figures = loaded(DOCS / "figures.py")
    unit, block, finer, half = figures.p_errors(4096).values()
    assert unit[4096] > 1.5 * unit[256] and block[4096] < 1.2 * block[256]
    assert unit[4096] > 1.5 * block[4096] > 2 * finer[4096] > 2 * half[4096]
