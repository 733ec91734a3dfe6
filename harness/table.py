"""`python -m harness.table`, the same as `python -m harness table`: tables of records."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", *sys.argv[1:]]))
