"""The command line. One file, one command."""

import sys

import typer

from tokquant.cli import cache, calibrate, compare, compile, doctor, run, schemes, show, tune

app = typer.Typer(
    name="tokquant",
    help="Token-level quantized attention: declare a scheme, get its flash-attention kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (run, compare, schemes, show, compile, tune, calibrate, doctor):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run a command. What the user got wrong is one message on stderr and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
