"""`python -m harness.reproduce`, the same as `python -m harness reproduce`: reruns of committed records."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
