"""An import only goes down the list of layers, so data flows one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tokquant"

LAYERS = [
    ("autocast", "errors", "files", "tensor_files", "timing", "transfer", "whole_numbers"),
    ("precisions",),
    ("schemes",),
    ("transforms", "folding", "bias", "blocks"),
    ("tensor",),
    ("calibration.scales",),
    ("features",),
    ("quantize", "reference", "metrics", "activations"),
    ("inputs",),
    ("calibration", "export"),
    ("exchange",),
    ("slots", "windows", "paging", "pages"),
    ("reservation", "sequences", "cache_file"),
    ("kernels",),
    ("io_model",),
    ("tuning",),
    ("operators",),
    ("attention",),
    ("kv_cache", "sdpa", "tune", "varlen"),
    ("decode",),
    ("evaluation",),
    ("integrations", "io_model.plot"),
    ("plugins",),
    ("cli",),
    ("__init__", "__main__"),
]


def layer(module: str) -> int:
    """The highest layer whose name the module's dotted path begins with; the longest name wins."""
    found = [(len(name), level) for level, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"tokquant/{module} is in no layer"
    return max(found)[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    here = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokquant"):
            module = (node.module or "").removeprefix("tokquant").removeprefix(".")
            for target in [module] if module else [alias.name for alias in node.names]:
                assert layer(target) <= layer(here), f"{here} imports {target}, which is above it"
