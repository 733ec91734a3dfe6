"""4-bit weight-only matmuls of other libraries behind one interface, to compare with the kernels of this project.

Each library gets the same float weight and quantizes and packs it in its own way, or gets it rounded to nearest where
it takes codes, so libraries may multiply by different weights: `decoded` returns the weight of each. Each module names
the version for which its calls were written. Except for torch, none of the libraries is a dependency; those for CPUs
are the extra `peers`. A library for CPUs runs with torch's number of threads.
"""

from harness.kernels.bench.peers import (
    auto_round,
    bitsandbytes,
    fbgemm,
    gemlite,
    humming,
    int4pack,
    onnxruntime,
    openvino,
    torchao,
)
from harness.kernels.bench.peers.base import Built as Built
from harness.kernels.bench.peers.base import Peer as Peer

PEERS: tuple[Peer, ...] = (
    Peer("torch int4pack", ("cuda", "cpu"), int4pack.build),
    Peer("gemlite", ("cuda",), gemlite.build),
    Peer("torchao", ("cuda", "cpu"), torchao.build),
    Peer("bitsandbytes nf4", ("cuda", "cpu"), bitsandbytes.build),
    Peer("humming", ("cuda",), humming.build),
    Peer("fbgemm", ("cuda",), fbgemm.build),
    Peer("onnxruntime", ("cpu",), onnxruntime.build),
    Peer("onnxruntime int8", ("cpu",), onnxruntime.build_int8, rounds_inputs=True),
    Peer("openvino", ("cpu",), openvino.build),
    Peer("openvino int8", ("cpu",), openvino.build_int8, rounds_inputs=True),
    Peer("auto-round", ("cpu",), auto_round.build),
)
