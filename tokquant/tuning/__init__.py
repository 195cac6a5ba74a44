"""Autotuning: a model ranks a kernel's launches from their traffic and machine code, then the best are timed."""
