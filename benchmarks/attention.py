"""Attention over whole sequences beside torch's: `tokquant bench attention`, whose options it takes."""

import sys

from tokquant.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "attention"]
    main()
