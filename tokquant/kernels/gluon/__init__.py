"""A second main loop of attention, for Hopper alone."""
