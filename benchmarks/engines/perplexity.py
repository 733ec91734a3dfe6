"""Perplexity of exported GGUF files in llama.cpp and in this project, under llama.cpp's protocol.

    PYTHONPATH=PEERS python -m benchmarks.engines.perplexity [windows]

Quantizes the embedded model, exports each form as a file, and scores windows of 512 tokens of pydocs: here as a row of
`method=checkpoint`, in llama.cpp by its own tokens and logits. llama.cpp rounds the inputs of linears to 8 bits, this
project does not. PEERS is a folder with llama-cpp-python. Writes results/benchmarks/perplexity.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compose import resolved
from benchmarks.engines import exports
from benchmarks.engines.cases import Case
from benchmarks.engines.run import OUTPUT
from benchmarks.peers.llama import library, opened
from harness.data.corpora import pydocs
from harness.records import environment
from harness.reports import markdown
from harness.runs import execute_run

LENGTH = 512
CASES = tuple(
    Case("gguf", overrides, ())
    for overrides in (
        ("scheme=group32_sym", "bits=8"),
        ("scheme=group32_sym", "bits=5"),
        ("scheme=group32_sym", "bits=4"),
        ("scheme=group64_sym", "bits=4"),
        ("method=gptq", "scheme=group32_sym", "bits=4"),
        ("scheme=w_mxfp4",),
    )
)


def main() -> None:
    """Score all files in both, print the table and write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines.perplexity", description="Perplexity in llama.cpp."
    )
    parser.add_argument("windows", nargs="?", type=int, default=20, help="windows that are scored")
    windows = parser.parse_args().windows
    rows = [_row(case, windows) for case in CASES]
    results = {
        "command": f"python -m benchmarks.engines.perplexity {windows}",
        "model": exports.MODEL,
        "rows": rows,
        "environment": asdict(environment()),
    }
    text = table(results)
    print(text)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "perplexity.json").write_text(json.dumps(results, indent=1) + "\n")
    (OUTPUT / "perplexity.md").write_text(text)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    columns = ("ptqbench", "llama.cpp", "difference")
    rows = [
        [row["settings"], f"{row['here']:.3f}", f"{row['llama.cpp']:.3f}", f"{row['llama.cpp'] / row['here'] - 1:+.2%}"]
        for row in results["rows"]
    ]
    head = (
        f"`{results['command']}` ({results['model']}, pydocs, llamacpp-{LENGTH}): perplexity of the same GGUF files by "
        "`method=checkpoint` and by llama.cpp (llama-cpp-python 0.3.36), which rounds the inputs of linears to 8 bits. "
        "GPTQ calibrates with random tokens here."
    )
    return f"{markdown.paragraph(head)}\n\n{markdown.table(('settings', *columns), rows, columns)}\n"


def _row(case: Case, windows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        exports.write(case, folder / "model")
        file = folder / "model" / "model.gguf"
        data = ("data=pydocs", "data.protocol=llamacpp", f"data.seq_len={LENGTH}", f"data.max_windows={windows}")
        run = ("method=checkpoint", f"model.path={file}", "measure=off", f"results_dir={folder / 'runs'}")
        record, _ = execute_run(resolved(*data, *run))
        if record.error:
            raise SystemExit(record.error)
        theirs = perplexity(file, pydocs("evaluation"), windows)
    return {"settings": " ".join(case.overrides), "here": record.metrics["perplexity"], "llama.cpp": theirs}


def perplexity(file: Path, text: str, windows: int) -> float:
    """The perplexity of the last 255 tokens of each of the first windows of a text (llama.cpp, tools/perplexity)."""
    model, context = opened(file, LENGTH, LENGTH)
    vocabulary = library().llama_model_get_vocab(model)
    tokens = _tokens(vocabulary, text)
    losses = [_loss(vocabulary, context, window) for window in tokens.unfold(0, LENGTH, LENGTH)[:windows]]
    return float(torch.stack(losses).mean().exp())


def _tokens(vocabulary: Any, text: str) -> Tensor:
    """The tokens of a text by the vocabulary of the file."""
    data = text.encode()
    count = -library().llama_tokenize(vocabulary, data, len(data), None, 0, True, False)
    tokens = (ctypes.c_int32 * count)()
    library().llama_tokenize(vocabulary, data, len(data), tokens, count, True, False)
    return torch.tensor(list(tokens))


def _loss(vocabulary: Any, context: Any, window: Tensor) -> Tensor:
    """The mean negative log-likelihood () of the second half of a window."""
    llama, first = library(), LENGTH // 2
    inputs = window.tolist()
    if llama.llama_vocab_get_add_bos(vocabulary):
        inputs[0] = llama.llama_vocab_bos(vocabulary)
    batch = llama.llama_batch_init(LENGTH, 0, 1)
    batch.n_tokens = LENGTH
    for place, token in enumerate(inputs):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    if status := llama.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode returned {status}")
    shape = (LENGTH, llama.llama_vocab_n_tokens(vocabulary))
    logits = torch.from_numpy(np.ctypeslib.as_array(llama.llama_get_logits(context), shape)).clone()
    llama.llama_batch_free(batch)
    return torch.nn.functional.cross_entropy(logits[first:-1].double(), window[first + 1 :])


if __name__ == "__main__":
    main()
