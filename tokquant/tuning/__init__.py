"""Which launch of a kernel is fastest: what bytes and machine code say, then what a clock says."""
