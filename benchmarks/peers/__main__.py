"""Time whole models: the embedded model in this project and in llama.cpp, on the same weights.

    python -m benchmarks.peers [rounds]

Every model reads a prompt of 128 tokens and then decodes 32, one at a time, in turn with all others; figures are
medians over rounds, speedups those of the ratios within a round. llama.cpp's files are written from the packaged GGUF
file, so that all models have its weights, rounded in different ways: the relative error of the prompt's last logits,
to those of float32 in this project, shows it. llama.cpp keeps its KV cache in float16, this project in the model's
dtype. Writes results/benchmarks/peers.json and peers.md, with the reason for each model that is left out.
"""

import sys

from harness.utils.spinning import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # waiting threads of one library would take the processor from those of the next
    from benchmarks.peers.run import main  # it loads the libraries, which read the setting

    main(*map(int, sys.argv[1:]))
