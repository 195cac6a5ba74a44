"""How far quantized attention may be from exact attention, guaranteed."""

from tokquant.evaluation.bound.certificate import Bound, error_bound

__all__ = ["Bound", "error_bound"]
