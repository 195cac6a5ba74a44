"""The CPU target: one C++ file a plan, built once, called through a plain C interface."""
