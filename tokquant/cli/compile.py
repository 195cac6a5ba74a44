"""`tokquant compile`: a scheme's kernel for a GPU that need not be here, and what it takes of it."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.cli import options, output
from tokquant.kernels.compile import compile as compile_kernel


def compile(
    scheme: Annotated[str, typer.Argument(help="A preset or the path of a YAML file.")] = "int8",
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 128,
    target: Annotated[str, typer.Option("--target", help="sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.")] = "sm_90",
    causal: options.Causal = False,
    json: options.Json = False,
) -> None:
    """Compile a kernel for any NVIDIA GPU: registers, spills, shared memory, and the instructions of its main loop."""
    kernel = compile_kernel(scheme, head_dim=head_dim, causal=causal, target=target)
    resources = kernel.resources
    if json:
        output.print_json(
            {
                "scheme": kernel.scheme.name,
                "kernel": kernel.plan.name,
                "target": target,
                "config": asdict(kernel.config),
                "resources": asdict(resources),
                "decisions": kernel.plan.explain(),
            }
        )
        return
    table = Table(title=escape(f"{kernel.scheme.name} for {target}, head_dim {head_dim}"), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    config = kernel.config
    rows = {
        "tiles": f"{config.block_m} queries x {config.block_n} keys, {config.num_warps} warps, {config.num_stages} stages",
        "registers a thread": str(resources.registers),
        "spilled bytes a thread": str(resources.spill_bytes),
        "shared memory a block": f"{resources.shared_bytes} bytes",
        "blocks a multiprocessor": str(resources.blocks_per_multiprocessor),
        "instructions a score": f"{resources.instructions_per_score:.2f} in the loop over whole tiles",
        "tensor-core instructions": ", ".join(f"{count} {name}" for name, count in resources.tensor_core.items()),
        **kernel.plan.explain(),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    output.console().print(table)
