"""Calibration: static scales from observed activations."""
