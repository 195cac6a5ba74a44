"""`tokquant show`: the kernel that a scheme becomes."""

import sys
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax

from tokquant.cli import options, output
from tokquant.errors import nearest, quote
from tokquant.kernels.compile import compile

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def show(
    scheme: Annotated[str, typer.Argument(help="A preset or the path of a YAML file.")] = "int8",
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 64,
    causal: options.Causal = False,
    lse: Annotated[bool, typer.Option("--lse", help="With the log-sum-exp as a second output.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the tensors: fp16, bf16 or fp32.")] = "fp16",
    json: options.Json = False,
) -> None:
    """Print the Triton kernel of a scheme: the very text that is launched, which runs alone."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {quote(dtype)} is none; use {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    kernel = compile(scheme, head_dim=head_dim, causal=causal, return_lse=lse, dtype=DTYPES[dtype])
    if json:
        output.print_json(
            {"scheme": kernel.scheme.name, "kernel": kernel.plan.name, "config": asdict(kernel.config), "source": kernel.source}
        )
    elif sys.stdout.isatty():
        Console().print(Syntax(kernel.source, "python", background_color="default"))
    else:
        print(kernel.source, end="")
