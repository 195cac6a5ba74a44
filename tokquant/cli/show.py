"""`tokquant show`: prints the kernel of a scheme."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax

from tokquant.cli import features, options, output
from tokquant.kernels.compile import compile


def show(
    scheme: Annotated[
        str | None, typer.Argument(help="A preset or a YAML file; int8 if left out, or kv-int8 with --decode.")
    ] = None,
    layer: options.Layer = None,
    head_dim: options.HeadDim = 128,
    target: options.Target = "sm_90",
    causal: options.Causal = False,
    window: features.Window = None,
    softcap: features.Softcap = None,
    mask: features.Mask = "none",
    bias: features.Bias = "none",
    bias_rank: features.BiasRank = 16,
    sinks: features.Sinks = False,
    lse: features.Lse = False,
    varlen: features.Varlen = False,
    decode: features.Decode = False,
    shared_heads: features.SharedHeads = 1,
    dtype: options.Dtype = "fp16",
    json: options.Json = False,
) -> None:
    """Print the Triton kernel of a scheme: the very text that is launched. It needs only Triton.

    The text depends on whether there is a window or a softcap; their sizes are arguments of a call.
    """
    wanted = features.Wanted(
        causal=causal, window=window, softcap=softcap, mask=mask, bias=bias, bias_rank=bias_rank, sinks=sinks, lse=lse
    )
    kernel = compile(
        scheme if scheme is not None else "kv-int8" if decode else "int8",
        layer=layer,
        head_dim=head_dim,
        **wanted.flags(),
        varlen=varlen,
        shared_heads=shared_heads,
        decode=decode,
        target=target,
        dtype=options.dtype_of(dtype),
    )
    if json:
        output.print_json(
            {"scheme": kernel.scheme.name, "kernel": kernel.plan.name, "config": asdict(kernel.config), "source": kernel.source}
        )
    elif sys.stdout.isatty():
        Console().print(Syntax(kernel.source, "python", background_color="default"))
    else:
        print(kernel.source, end="")
