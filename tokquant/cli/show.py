"""`tokquant show`: the kernel that a scheme becomes."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax

from tokquant.cli import features, options, output
from tokquant.kernels.compile import compile


def show(
    scheme: Annotated[str, typer.Argument(help="A preset or the path of a YAML file.")] = "int8",
    layer: options.Layer = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    causal: options.Causal = False,
    lse: features.Lse = False,
    dtype: options.Dtype = "fp16",
    json: options.Json = False,
) -> None:
    """Print the Triton kernel of a scheme: the very text that is launched, which runs alone."""
    kernel = compile(scheme, layer=layer, head_dim=head_dim, causal=causal, return_lse=lse, dtype=options.dtype_of(dtype))
    if json:
        output.print_json(
            {"scheme": kernel.scheme.name, "kernel": kernel.plan.name, "config": asdict(kernel.config), "source": kernel.source}
        )
    elif sys.stdout.isatty():
        Console().print(Syntax(kernel.source, "python", background_color="default"))
    else:
        print(kernel.source, end="")
