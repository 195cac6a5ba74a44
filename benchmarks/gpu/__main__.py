"""Runs all benchmarks and tests of one GPU, in minutes; see `python benchmarks/gpu --help`."""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

sys.path.insert(0, str(Path(__file__).parents[2]))  # this clone's tokquant, even if another is installed

import page
from record import Record
from running import STAGES, Setting, run, run_in_process

from tokquant.errors import nearest, quote
from tokquant.evaluation import packages
from tokquant.evaluation.machine import machine

RESULTS = Path(__file__).parents[1] / "results"


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(STAGES)}; all if left out.")] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="For all of them together.")] = 9.0,
    output: Annotated[Path, typer.Option("--output", help="Results go to a folder in it that has the GPU's name.")] = RESULTS,
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes: whether everything runs, on a CPU too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what an earlier run has measured, too.")] = False,
) -> None:
    """Measure ceilings, tests, launches, attention and decoding beside others, and profiles, and compare them with the aims.

    A second run goes on where the first ended; if a version has changed it starts over, and keeps the earlier results as
    *.earlier.json. The results name what there was no time for.
    """
    chosen = stages or list(STAGES)
    for stage in chosen:
        if stage not in STAGES:
            raise typer.BadParameter(f"stage: {quote(stage)} is not valid; use {', '.join(STAGES)}{nearest(stage, STAGES)}")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not small:
        raise typer.BadParameter("there is no GPU; --small runs everything on a CPU, with tiny shapes")
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    facts = machine(device, "triton") | {"python": platform.python_version()} | packages.versions()
    if has_gpu:
        properties = torch.cuda.get_device_properties(device)
        facts |= {"cuda": str(torch.version.cuda), "multiprocessors": str(properties.multi_processor_count)}
    name = [*(facts["device"] if has_gpu else "cpu").lower().split(), *["small"] * small]
    folder = output / "-".join(name)
    end = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory() as cache:
        # a cache of this run's own: stages use the launches tuned in this run, and no others
        os.environ.setdefault("TOKQUANT_CACHE_DIR", cache)
        for index, stage in enumerate(chosen):
            Record(folder / f"{stage}.json", facts, again).write()
            shares = [STAGES[each] for each in chosen[index:]]
            stage_end = time.time() + (end - time.time()) * shares[0] / sum(shares)
            (run_in_process if has_gpu else run)(stage, Setting(device, small, folder, facts, stage_end))
            page.write(folder)
    print((folder / "page.md").read_text().split("\n## ")[1])


if __name__ == "__main__":
    typer.run(main)
