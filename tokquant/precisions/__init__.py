"""Number formats, one per file. All files of this folder are imported, and each registers its precision."""

from importlib import import_module
from pkgutil import iter_modules

from tokquant.precisions.base import PRECISIONS, Precision, get, names, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["PRECISIONS", "Precision", "get", "names", "register"]
