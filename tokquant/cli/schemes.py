"""`tokquant schemes`: lists presets, prints one, or prints the JSON schema of the grammar."""

from typing import Annotated

import typer

from tokquant.cli import options, output
from tokquant.errors import SchemeError
from tokquant.evaluation.page.numbers import thousandths
from tokquant.schemes import QuantScheme, SchemeMap, preset_names, read, resolve
from tokquant.schemes.presets import source


def schemes(
    name: Annotated[str | None, typer.Argument(help="Print this preset or YAML file instead of the list.")] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1, help="The head_dim at which bits per value are counted.")] = 128,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema of a scheme, for editors.")] = False,
    json: options.Json = False,
) -> None:
    """List the presets with their bits per value, scales included, or print one as YAML."""
    if json_schema:
        output.print_json(QuantScheme.model_json_schema())
        return
    if name is not None:
        resolved = read(name)
        if json:
            output.print_json(resolved.to_data() if isinstance(resolved, SchemeMap) else resolved.model_dump(mode="json"))
        else:
            print(source(name) if name in preset_names() else resolved.to_yaml(), end="")
        return
    if json:
        output.print_json(
            [{**resolve(preset).model_dump(mode="json"), "bits": _bits(resolve(preset), head_dim)} for preset in preset_names()]
        )
        return
    title = f"presets; bits per value at head_dim {head_dim}, scales included"
    table = output.table(title, ["scheme", "q", "k", "v", "p"], ["bits q / k / v"])
    for preset in preset_names():
        scheme = resolve(preset)
        bits = _bits(scheme, head_dim)
        table.add_row(
            preset,
            *(str(operand) for operand in (scheme.q, scheme.k, scheme.v)),
            f"{scheme.p.precision} {scheme.p.granularity}",
            " / ".join(thousandths(each) for each in bits.values()) if bits else "does not fit",
        )
    output.console().print(table)


def _bits(scheme: QuantScheme, head_dim: int) -> dict[str, float] | None:
    try:
        return scheme.bits_per_value(head_dim)
    except SchemeError:
        return None
