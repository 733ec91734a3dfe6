"""Quantized models as other tools write them: what `experiment=checkpoints` measures.

    python -m benchmarks.checkpoints MODEL prepare
    PYTHONPATH=PEERS python -m benchmarks.checkpoints MODEL llama.cpp
    PEER/bin/python -m benchmarks.checkpoints MODEL auto-round torchao bitsandbytes hqq
    python -m benchmarks.checkpoints MODEL ours

MODEL is smollm2 or gemma3_270m. `prepare` writes the float model as a folder and as a GGUF file, and the calibration
tokens of this project's runs, which tools that calibrate use. Each tool is its own program in its own environment:
PEERS is a folder with llama-cpp-python, PEER an environment with transformers and the tool (HQQ: transformers 4.57).
Writes results/checkpoints/MODEL/NAME; what is there already stays.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoints import calibrated, llama_cpp, ours, prepare, rounded

ROOT = Path("results/checkpoints")
MODELS = ("smollm2", "gemma3_270m")
TOOLS: dict[str, Callable[[str, Path], None]] = {
    "prepare": prepare.prepare,
    "llama.cpp": llama_cpp.write,
    "auto-round": calibrated.auto_round,
    "torchao": rounded.torchao,
    "bitsandbytes": rounded.bitsandbytes,
    "hqq": rounded.hqq,
    "ours": ours.write,
}


def main() -> None:
    """Write the files of the tools of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description="Quantize by other tools.")
    parser.add_argument("model", choices=MODELS, help="the model")
    parser.add_argument("tools", nargs="+", choices=TOOLS, help="prepare comes first")
    options = parser.parse_args()
    folder = ROOT / options.model
    folder.mkdir(parents=True, exist_ok=True)
    for tool in options.tools:
        TOOLS[tool](options.model, folder)


if __name__ == "__main__":
    main()
