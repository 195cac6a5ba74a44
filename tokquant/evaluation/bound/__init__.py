"""Certified error bounds: how far quantized attention can be from exact attention."""

from tokquant.evaluation.bound.certificate import Bound, error_bound

__all__ = ["Bound", "error_bound"]
