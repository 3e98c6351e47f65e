"""`python -m vitscale` is `vitscale`."""

import sys

from vitscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
