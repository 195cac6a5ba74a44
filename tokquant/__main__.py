"""`python -m tokquant`."""

from tokquant.cli import main

main()
