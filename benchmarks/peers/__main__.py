"""Time whole models: a model in this project and in llama.cpp, on the same weights.

    python -m benchmarks.peers [smollm2 | llama3_2_1b [rounds]]

Every model reads a prompt of 128 tokens and then decodes 32, one at a time, in turn with all others; figures are
medians over rounds, speedups those of the ratios within a round. smollm2 is the embedded model, whose GGUF file
llama.cpp writes in other types; llama3_2_1b has the shape of Llama-3.2-1B and random weights. So all models have the
same weights, rounded in different ways: the relative error of the prompt's last logits, to those of the first row,
shows it. llama.cpp keeps its KV cache in float16, this project in the model's dtype. Writes
results/benchmarks/peers_NAME.json and .md, with the reason for each model that is left out.
"""

import sys

from harness.utils.spinning import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # waiting threads of one library would take the processor from those of the next
    from benchmarks.peers.run import main  # it loads the libraries, which read the setting

    main(sys.argv[1:])
