"""`python -m harness`: see README.md."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; tqdm reads this once, when it is imported
    from harness.cli import main

    sys.exit(main())
