"""Load exported folders in other libraries: do they compute what this project reads from the same files?

    PYTHONPATH=PEERS python -m benchmarks.engines [NAME ...]

Quantizes the embedded model once for each export, all of them or those whose name contains a NAME, and loads the folder
in float32 by this project's reader and by every engine of the export. The figure is the relative error of the logits of
one prompt. PEERS is a folder with libraries that this project does not need:

    pip install --no-deps --target PEERS compressed-tensors loguru auto-round auto-round-lib py-cpuinfo \\
        gptqmodel optimum defuser device-smi logbar pypcre tokenicer threadpoolctl pillow

Writes results/benchmarks/engines.json and .md, with the reason of each engine that did not load a folder.
"""

import sys

from benchmarks.engines.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
