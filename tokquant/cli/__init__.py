"""The command line `tokquant`; each command has a file."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from tokquant.cli import (
    bench,
    cache,
    calibrate,
    compare,
    compile,
    doctor,
    eval,
    exchange,
    io,
    record,
    run,
    schemes,
    search,
    show,
    tune,
)
from tokquant.plugins import load

app = typer.Typer(
    name="tokquant",
    help="Token-level quantized attention: declare a scheme, get its flash-attention kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokquant {version('tokquant')}")
        raise typer.Exit


@app.callback()
def plugins(
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", envvar="TOKQUANT_PLUGINS", help="A Python file that registers precisions; repeat for more."),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)] = False,
) -> None:
    """Load the user's plugins before a command runs."""
    for path in plugin or []:
        load(path)


for _module in (run, compare, search, schemes, show, compile, tune, io, bench, calibrate, record, eval, doctor):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))
app.command("export")(exchange.export)
app.command("import")(exchange.import_scales)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run a command. A user error is printed to stderr as one message, with exit code 2."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
