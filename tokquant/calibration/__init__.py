"""Calibration: from activations to static scales."""
