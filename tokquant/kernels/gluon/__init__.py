"""A second main loop of attention, for Hopper alone, written in Gluon, Triton's language with explicit layouts."""
