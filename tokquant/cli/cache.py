"""`tokquant cache`: lists, clears, exports and imports the results of tuning."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tokquant.cli import options, output
from tokquant.cli.tune import launch_of
from tokquant.kernels import tuned

app = typer.Typer(
    no_args_is_help=True,
    help="List, clear, export or import what `tokquant tune` has learned.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
File = Annotated[Path, typer.Argument(help="A JSON file of entries.")]


@app.command("list")
def list_entries(json: options.Json = False) -> None:
    """Show the entries of the cache folder.

    The whole includes quantization. Beside it is torch's 16-bit attention, which backend 'auto' takes where the table says so.
    """
    entries = list(tuned.entries())
    if json:
        output.print_json([entry.model_dump() for entry in entries])
        return
    sizes = ("batch x heads", "queries", "keys", "launch")
    times = ("ms", "untuned ms", "whole ms", "torch's ms", "planned as")
    table = output.table(f"{_entries(len(entries))} in {tuned.folder()}", ["kernel", "device", "Triton", *sizes, *times])
    for entry in entries:
        key = entry.key
        untuned = "" if entry.default_ms is None else f"{entry.default_ms:.4f}"
        launch = launch_of(entry.config, entry.split)
        rank = "" if entry.rank is None else f"{entry.rank} of {entry.timed}"
        whole = "" if entry.whole_ms is None else f"{entry.whole_ms:.4f}"
        sdpa = "" if entry.sdpa_ms is None else f"{entry.sdpa_ms:.4f}" + ", taken" * entry.sixteen_bit
        shape = (str(size) for size in (key.batch_heads, key.n_q, key.n_k))
        measured = (f"{entry.ms:.4f}", untuned, whole, sdpa)
        table.add_row(key.kernel, escape(key.device), key.triton, *shape, launch, *measured, rank)
    output.console().print(table)


@app.command()
def clear(json: options.Json = False) -> None:
    """Remove the entries of the cache folder, and nothing else."""
    _say(json, "removed", tuned.clear(), tuned.folder())


@app.command()
def export(file: File, json: options.Json = False) -> None:
    """Write all entries into one file, for another machine with the same GPU."""
    _say(json, "written", tuned.export(file), file)


@app.command("import")
def import_entries(file: File, json: options.Json = False) -> None:
    """Add the entries of an exported file. They replace entries with the same key."""
    entries = tuned.load(file)
    if any(tuned.record(entry) is None for entry in entries):
        raise OSError(f"{tuned.folder()} cannot be written; set TOKQUANT_CACHE_DIR to a folder that can")
    _say(json, "imported", len(entries), tuned.folder())


def _say(json: bool, action: str, count: int, path: Path) -> None:
    if json:
        output.print_json({action: count, "path": str(path)})
    else:
        output.console().print(escape(f"{_entries(count)} {action}: {path}"), soft_wrap=True)


def _entries(count: int) -> str:
    return f"{count} entry" if count == 1 else f"{count} entries"
