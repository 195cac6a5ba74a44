"""Plugins: Python files that register a user's own precisions."""

import importlib.util
import sys
from pathlib import Path


def load(path: Path) -> None:
    """Run a Python file that registers precisions (see docs/precisions.md).

    Raises ValueError that names the file if it cannot be read or run. It is code: load only files that you trust.
    """
    if not path.is_file():
        raise ValueError(f"plugin: there is no file {path}")
    name = f"tokquant_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Triton reads the source of fragments through their module
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"plugin: {path} failed: {type(error).__name__}: {error}") from error
