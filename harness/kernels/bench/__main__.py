"""Start the kernel benchmark."""

import os
import sys

# GNU OpenMP's waiting threads would take the processor from the threads of the next library: 0.1 ms, as in a run.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"

from harness.kernels.bench.race import main  # it loads the library, which reads the setting

main(sys.argv[1:])
