"""What the compiler makes of every kernel: registers, memory and instructions, found without a GPU.

    python -m harness.kernels.inspect [--arch 80,90] [--kernel w8a8] [--format md|json]

Pointers and integers are taken as multiples of 16, as a model's shapes are, where triton looks whether they are: it
decides how wide the loads are. A case whose name ends in _sm90 is of a launch that older GPUs never get, and is not
compiled for them.
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

from harness.kernels.case import Case

MODULES = ("w4a16", "w8a8")
ARCHES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have, by the CUDA programming guide
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class Resources:
    """What one compiled case takes of an SM.

    registers     of a thread
    shared        bytes of a block
    spilled       bytes of stack and local memory of a thread
    matmul        whether the kernel asks for a matmul at all
    tensor_core   the instruction that does it: wgmma, mma, or nothing
    instructions  SASS instructions, the padding left out
    load_bits     of the widest load from global memory
    """

    registers: int
    shared: int
    spilled: int
    matmul: bool
    tensor_core: str
    instructions: int
    load_bits: int


def compiled(case: Case, arch: int) -> Resources:
    """Compile `case` for compute capability `arch` (90 is 9.0) and read what came out."""
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
    found: list[Case] = importlib.import_module(f"harness.kernels.{module}").cases()
    return found


def main() -> str | None:
    """Print the table; returns what keeps it from doing so."""
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
    parser.add_argument("--arch", type=_arches, default=ARCHES, help=f"compute capabilities, {arches} unless told")
    parser.add_argument("--kernel", choices=MODULES, help="one module alone")
    parser.add_argument("--format", choices=("md", "json"), default="md")
    return parser.parse_args()


def _arches(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(",") if part.isdigit())
    if not found or not set(found) <= set(ARCHES):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(map(str, ARCHES))}; write one, or 80,90")
    return found


def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install ptqbench[kernels]"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so that nothing is compiled; unset it"
    return None


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _divisible(case: Case) -> dict[tuple[int], list[list[object]]]:
    looked_at = [i for i, parameter in enumerate(case.kernel.params) if not parameter.do_not_specialize]
    kinds = [case.signature[name] for name in case.kernel.arg_names]
    return {(i,): [["tt.divisibility", 16]] for i in looked_at if kinds[i].startswith(("*", "i"))}


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
    found = re.search(rf"\b{word}:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage names no {word}: {text.strip()[:200]}")
    return int(found[1])


def _cuobjdump(flag: str, cubin: bytes) -> str:
    """What the tool of that name in the triton package says of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
