"""Start the kernel benchmark."""

import sys

from harness.kernels.bench.race import main

main(sys.argv[1:])
