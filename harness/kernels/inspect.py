"""Compile every kernel, without a GPU, and list the registers, memory and instructions that it uses.

    python -m harness.kernels.inspect [--arch 80,90] [--kernel w8a8] [--format md|json]

Where triton checks divisibility, pointers and integers are assumed to be multiples of 16, as they are for a model's
shapes: this determines the width of the loads. A case whose name ends in _sm90 is launched on GPUs from sm_90 on only,
and is not compiled for older ones.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.kernels.triton.case import Case

MODULES = ("w4a16", "small_floats", "w8a8")
ARCHES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes available to one block, from the CUDA programming guide
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class Resources:
    """The resources of a streaming multiprocessor (SM) that one compiled case uses.

    registers     per thread
    shared        bytes of shared memory per block
    spilled       bytes of stack and local memory per thread
    matmul        whether the kernel contains a matmul
    tensor_core   the instruction that computes the matmul: "wgmma", "mma", or "" if none does
    instructions  number of SASS instructions, without padding
    load_bits     width of the widest load from global memory
    """

    registers: int
    shared: int
    spilled: int
    matmul: bool
    tensor_core: str
    instructions: int
    load_bits: int


def compiled(case: Case, arch: int) -> Resources:
    """Compile `case` for compute capability `arch` (90 is 9.0) and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constexprs, _divisible(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", _cuobjdump("-sass", kernel.asm["cubin"]))
    return Resources(
        registers=_usage("REG", usage),
        shared=kernel.metadata.shared,
        spilled=_usage("STACK", usage) + _usage("LOCAL", usage),
        matmul="tt.dot" in kernel.asm["ttir"],
        tensor_core=_tensor_core(kernel.asm["ptx"]),
        instructions=sum(opcode != "NOP" for opcode in opcodes),
        load_bits=max(map(_load_bits, opcodes), default=0),
    )


def cases(module: str) -> list[Case]:
    """The cases of one kernel module."""
    module_cases: list[Case] = importlib.import_module(f"harness.kernels.triton.{module}").cases()
    return module_cases


def main() -> str | None:
    """Print the table. Returns: the reason why it cannot be printed, or None."""
    options = _options()
    if problem := _problem():
        return problem
    modules = MODULES if options.kernel is None else (options.kernel,)
    rows = [
        {"case": f"{module}.{case.name}", "arch": arch, **asdict(compiled(case, arch))}
        for module in modules
        for case in cases(module)
        for arch in options.arch
        if arch >= 90 or not case.name.endswith("_sm90")
    ]
    sys.stdout.write(json.dumps(rows, indent=1) + "\n" if options.format == "json" else _markdown(rows))
    return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m harness.kernels.inspect", description="Compile without a GPU.")
    arches = ",".join(map(str, ARCHES))
    parser.add_argument(
        "--arch", type=_arches, default=ARCHES, help=f"compute capabilities, comma-separated; default {arches}"
    )
    parser.add_argument("--kernel", choices=MODULES, help="compile only the kernels of this module")
    parser.add_argument("--format", choices=("md", "json"), default="md", help="format of the printed table")
    return parser.parse_args()


def _arches(text: str) -> tuple[int, ...]:
    arches = tuple(int(part) for part in text.split(",") if part.isdigit())
    if not arches or not set(arches) <= set(ARCHES):
        expected = ", ".join(map(str, ARCHES))
        raise argparse.ArgumentTypeError(f"{text} is not supported; expected a comma-separated list of {expected}")
    return arches


def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install ptqbench[kernels]"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so triton compiles nothing; unset it"
    return None


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _divisible(case: Case) -> dict[tuple[int], list[list[object]]]:
    specialized = [i for i, parameter in enumerate(case.kernel.params) if not parameter.do_not_specialize]
    types = [case.signature[name] for name in case.kernel.arg_names]
    return {(i,): [["tt.divisibility", 16]] for i in specialized if types[i].startswith(("*", "i"))}


def _tensor_core(ptx: str) -> str:
    if "wgmma.mma_async" in ptx:
        return "wgmma"
    return "mma" if "mma.sync" in ptx else ""


def _load_bits(opcode: str) -> int:
    name, *suffixes = opcode.split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    return max((_BITS[part] for part in suffixes if part in _BITS), default=32)


def _usage(word: str, text: str) -> int:
    match = re.search(rf"\b{word}:(\d+)", text)
    if match is None:
        raise RuntimeError(f"the output of cuobjdump -res-usage has no {word}: {text.strip()[:200]}")
    return int(match[1])


def _cuobjdump(flag: str, cubin: bytes) -> str:
    """The output of cuobjdump, the copy in the triton package, for a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        process = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return process.stdout + process.stderr


if __name__ == "__main__":
    sys.exit(main())
