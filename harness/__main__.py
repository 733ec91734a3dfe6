"""`python -m harness`, the same as the installed script `ptqbench`: see README.md."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
