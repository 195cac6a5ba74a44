"""Puts the help of every command, as typer writes it, in place of the line `<!-- commands -->`."""

import re

import typer.main
from typer.cli import get_docs_for_click

from tokquant.cli import app as command_line


def described() -> str:
    """All commands in Markdown: what each does, then a heading and the options of each."""
    group = typer.main.get_command(command_line)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="tokquant").partition("\n")[2]
    # its lists of commands are cut short; here is a whole one, and headings follow
    text = re.sub(r"^\*\*Commands\*\*:\n\n(\* .*\n)+", "", text, flags=re.M)
    # outside of code, what stands between angles is a placeholder and no markup
    text = re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text)
    listed = [f"- [`{name}`](#tokquant-{name}): {_first_line(command.help)}" for name, command in group.commands.items()]
    return "\n".join([*listed, "", "## For every command", text])


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def setup(app):
    """Fill the page when it is read."""

    def fill(app, document, source):
        source[0] = source[0].replace("<!-- commands -->", described()) if document == "commands" else source[0]

    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
