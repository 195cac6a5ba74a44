"""Kernels in Triton: the template, which runs as it stands, and the fragments that fill its holes."""
