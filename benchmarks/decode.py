"""A query after many keys beside torch's attention: `tokquant bench decode`, whose options it takes."""

import sys

from tokquant.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "decode"]
    main()
