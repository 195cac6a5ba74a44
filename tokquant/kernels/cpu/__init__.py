"""Kernels for CPUs: each plan becomes a C++ file, which is built once and called through a C interface."""
