"""Shared options of commands that run a local transformers model, and loading of the model and texts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import Tensor

from tokquant.cli import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = typer.Option("--model", help="The folder of a transformers model and its tokenizer.")
TEXTS = typer.Option("--texts", help="Texts for the model: one per line, or a .jsonl file with `text`.")
Model = Annotated[Path, MODEL]
Texts = Annotated[Path, TEXTS]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="Tokens per window; the texts are cut into windows.")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="How many windows to take; all, if left out.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Type of the model: fp16, bf16 or fp32; as it was saved, if left out.")
]


def load(
    model: Path, texts: Path, tokens: int, windows: int | None, device: str | None, dtype: str | None
) -> tuple["PreTrainedModel", list[Tensor]]:
    """The model, and windows `[1, tokens]` of the texts. Raises ValueError that names the option or file at fault."""
    try:
        import transformers

        from tokquant.integrations.transformers import texts as local
    except ImportError as error:
        raise ValueError(f"--model: transformers cannot be imported ({error}); pip install 'tokquant[hf]'") from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    contents = local.read(texts)
    model_type = None if dtype is None else options.dtype_of(dtype)
    loaded, tokenizer = local.load(model, device=options.device_of(device), dtype=model_type)
    try:
        return loaded, local.windows(tokenizer, contents, tokens, windows)
    except ValueError as error:
        raise ValueError(f"{texts}: {error}") from None
