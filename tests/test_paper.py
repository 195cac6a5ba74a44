"""The paper's tables: the script runs, and its page says what its figures say."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "benchmarks" / "paper"
FIGURES = ROOT / "benchmarks" / "results" / "paper-errors.json"
STUDIES = ["errors", "speed"]
NAMES = ["FP8, e5m2 without scales", "FP8, e4m3 scaled", "half INT8", "full INT8", "tokquant int8"]


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """The rows of a study at small sizes, each run once."""
    folder = tmp_path_factory.mktemp("paper")

    @cache
    def rows(name):
        command = [sys.executable, PAPER, name, "--small", "--results", folder, "--figures", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "|---|" in result.stdout
        return json.loads((folder / f"paper-{name}.json").read_text())["rows"]

    return rows


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_rows_like_those_that_are_kept(name, ran):
    rows = ran(name)
    whole = json.loads((ROOT / "benchmarks" / "results" / f"paper-{name}.json").read_text())["rows"]
    assert rows and rows[0].keys() == whole[0].keys() and len(whole) >= len(rows)


def test_pictures_are_those_of_the_rows_that_are_kept_and_are_shown(tmp_path):
    result = subprocess.run([sys.executable, PAPER, "--draw", "--figures", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (ROOT / "docs" / "evidence").iterdir()}
    shown = {name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"\]\(evidence/([^)]+)\)", page.read_text())}
    assert shown == drawn.keys()


def by_input(rows):
    return {(row["data"], row["scale"], row["tokens"], row["scheme"]): row["rel_l1"] for row in rows}


def test_schemes_come_in_the_papers_order(ran):
    found = by_input(ran("errors"))
    for data in ("normal", "uniform"):
        for scale in ("1", "1/8"):
            e5m2, e4m3, half, full, ours = (found[data, scale, 256, name] for name in NAMES)
            assert e5m2 > e4m3 > full > ours > 0.9 * half


def test_long_sequences_leave_int8_where_it_is_and_not_the_papers_arithmetic():
    found = by_input(json.loads(FIGURES.read_text())["rows"])
    assert found["normal", "1/8", 16384, "tokquant int8"] < 0.015
    assert found["normal", "1/8", 16384, "full INT8"] == pytest.approx(0.043, abs=0.001)


def test_the_page_has_the_figures_of_the_run():
    found, rows, data, scale = by_input(json.loads(FIGURES.read_text())["rows"]), 0, "", ""
    for line in (ROOT / "docs" / "paper.md").read_text().splitlines():
        if head := re.match(r"\| (?:(normal|uniform), scores times (1|D\^-1/2)[^:]*: )?(\d+) \|", line):
            data, scale = (head[1], head[2].replace("D^-1/2", "1/8")) if head[1] else (data, scale)
            written = [float(x) for x in re.findall(r"([\d.]+) %", line)]
            assert written == pytest.approx([100 * found[data, scale, int(head[3]), name] for name in NAMES], abs=0.006)
            rows += 1
    assert rows == 9
