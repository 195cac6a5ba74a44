"""Loads local models, and cuts texts into windows of tokens."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tokquant.errors import quote


def load(path: str | os.PathLike, *, device: torch.device, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """The model of a folder, of the class that it was saved as, and its tokenizer. Without `dtype` it keeps its own type.

    Raises ValueError naming the folder; nothing is downloaded.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path}: is no folder of a model; it has no config.json")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        name = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise ValueError(f"transformers {transformers.__version__} has no {name}")
        model = kind.from_pretrained(path, dtype=dtype or "auto", local_files_only=True).to(device).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: its tokenizer cannot be read; save it there, as the model is ({reason})") from None


def read(path: str | os.PathLike) -> list[str]:
    """The texts of a file: of .jsonl each line's `text`, or the line where it is a string; else each line that is not empty.

    Raises ValueError naming file and line.
    """
    path = Path(path)
    try:
        # splitlines() would also cut at U+2028 and the like, which a JSON string may contain unescaped
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error})") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: is no JSON: {error}") from None
            text = entry.get("text") if isinstance(entry, dict) else entry
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: {quote(entry)} has no text; write {{"text": "..."}}')
            line = text
        if line.strip():
            texts.append(line)
    return texts


def windows(tokenizer: Any, texts: Iterable[str], tokens: int, limit: int | None = None) -> list[Tensor]:
    """The tokens of all texts one after another, cut into `[1, tokens]`, the first `limit` of them; the rest is left out.

    Raises ValueError where there is not one.
    """
    ids: list[int] = []
    for text in texts:
        # lines are separated by a newline, as in the file
        ids += tokenizer(text + "\n", add_special_tokens=not ids, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * tokens:
            break
    found = list(torch.tensor(ids, dtype=torch.long)[: len(ids) // tokens * tokens].view(-1, 1, tokens))[:limit]
    if not found:
        raise ValueError(f"texts: {len(ids)} tokens in all make no window of {tokens}; give more, or shorter windows")
    return found
