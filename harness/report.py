"""`python -m harness.report`, the same as `python -m harness report`: the HTML report."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
