"""Templates of the Triton kernels, each of which also runs as it is, and the fragments that fill their holes."""
