"""`python -m harness.attribution`, the same as `python -m harness attribution`: linears by sensitivity."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main(["attribution", *sys.argv[1:]]))
