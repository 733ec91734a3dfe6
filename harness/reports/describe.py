"""What a run is, in words and columns: model, method, format, text, device. No results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config import one_source
from harness.core.formats.elements import element
from harness.records import METRICS, Record, Text

DTYPES = ("float64", "float32", "float16", "bfloat16")
# The columns in which runs of one model and text may differ, in the order of tables.
TIMED = ("batch", "prompt")  # what the times of a run are of: sequences at once, and tokens of the prompt
SETTING = ("method", "scheme", "bits", "options", "calibration", "kv", "dtype", "execution", "runtime", *TIMED)

EAGER = "eager"  # how calls are timed unless a run says otherwise

# What the schemes of this project have, unless their name says otherwise.
_GRID = {False: "full", True: "narrow"}  # of symmetric weights: without and with quantized activations
_ZERO_POINT = "integer"
_SCALE_DTYPE = "float16"
_W4A8, _W4A8_GROUP = ("w4a8", "w4afp8"), 64  # of 4-bit weights with 8-bit activations

Json = dict[str, Any]

# What the schemes of small floats have, by a word in their names.
_FLOATS: dict[str, Json] = {
    "mxfp8": {"element": "e4m3", "scale_dtype": "e8m0", "group_size": 32},
    "mxfp6": {"element": "e2m3", "scale_dtype": "e8m0", "group_size": 32},
    "mxfp4": {"element": "e2m1", "scale_dtype": "e8m0", "group_size": 32},
    "nvfp4": {"element": "e2m1", "scale_dtype": "e4m3", "group_size": 16, "tensor_scale": True},
    "fp8_block": {"element": "e4m3", "group_size": 128},
    "fp8": {"element": "e4m3"},
}


def describe(record: Record) -> Json:
    """The columns that describe a run, as far as its record has them; a failed run may lack any."""
    config, text, execution = record.config, record.data.evaluation or Text(), record.execution
    steps = config.get("method") or {}
    scheme = config.get("scheme") if steps else None
    return {
        "run_id": record.run_id,
        "status": "refused" if record.refused else record.status,
        "model": record.model.name or _configured_model(config),
        "method": "_".join(steps) if isinstance(steps, dict) and steps else "none",
        "scheme": record.model.format or at(scheme, "name"),
        "bits": record.model.bits or (None if "mixed.budget" in record.options else _bits(config, scheme)),
        "options": options_text(config, record.options) or _checkpoint(record),
        "kv": execution.kv or str(at(config, "kv", "name") or "none"),
        "dtype": execution.dtype or _configured_dtype(config),
        "baseline_dtype": execution.baseline_dtype,
        "execution": execution.mode,
        "kernel": execution.kernel,
        "runtime": str(at(config, "measure", "runtime") or EAGER),
        "batch": at(config, "measure", "batch_size"),
        "prompt": at(config, "measure", "prompt_len"),
        "device": execution.device,
        "processor": _processor(record),
        "data": text.source or _configured_text(config),
        "protocol": record.data.protocol,
        "windows": text.num_windows,
        "seq_len": text.seq_len,
        "calibration": _calibration(record),
        "seed": config.get("seed"),
        "fingerprint": record.model.fingerprint,
        "tokens_sha256": text.tokens_sha256,
        "commit": record.environment.commit,
    }


def _processor(record: Record) -> str | None:
    """What a run was timed on: the GPU, or the CPU with its threads and the features that kernels use; else None."""
    if not any(metric.kind == "time" and metric.ratio in record.metrics for metric in METRICS):
        return None
    machine = record.environment
    if machine.gpu and str(record.execution.device).startswith("cuda"):
        return machine.gpu
    return f"{machine.cpu}, {machine.threads} threads, {machine.native}" if machine.cpu else None


def _checkpoint(record: Record) -> str:
    """The folder or file of a model that another program quantized; the folder of an exported `model.gguf`."""
    path = at(record.config, "model", "path")
    if not record.model.checkpoint or not path:
        return ""
    file = Path(str(path))
    return file.parent.name if file.name == "model.gguf" else file.name


def _configured_model(config: Json) -> Any:
    """The model's name of a run without its own record of the model, as of a failed one."""
    model = config.get("model")
    return one_source(model).get("name") if isinstance(model, dict) else model


def label(record: Record) -> str:
    """A run in a few words: model, method, format, options."""
    row = describe(record)
    parts = [row["model"], row["method"], row["scheme"], f"bits={row['bits']}" if row["bits"] else ""]
    parts += [row["options"], f"kv={row['kv']}" if row["kv"] != "none" else "", row["dtype"]]
    parts += ["simulated" if row["execution"] == "simulated" else "", row["runtime"] if row["runtime"] != EAGER else ""]
    return " ".join(str(part) for part in parts if part)


def options_text(config: Json, options: Json) -> str:
    """Options that are not at their defaults, and fields of the scheme that its name does not say.

    The float baseline has none but a quantized head.
    """
    steps, head = config.get("method"), config.get("head")
    heads = [] if head is None else [f"head={head}"]
    if not steps:
        return " ".join(heads)
    prefix = f"{next(iter(steps))}." if isinstance(steps, dict) and len(steps) == 1 else ""
    parts = [f"{key.removeprefix(prefix)}={value}" for key, value in options.items()]
    parts += _unusual_fields(config.get("scheme"))
    skip = config.get("skip") or []
    skip = [skip] if isinstance(skip, str) else skip
    return " ".join(parts + heads + ([f"skip={','.join(map(str, skip))}"] if skip else []))


def _unusual_fields(scheme: Any) -> list[str]:
    weight = at(scheme, "weight")
    if not isinstance(weight, dict):
        return []
    usual = usual_fields(scheme)
    parts = [f"{key}={weight[key]}" for key in usual if weight.get(key, usual[key]) != usual[key]]
    size = None if "group_size" in usual else weight.get("group_size")
    if size not in (None, -1) and str(size) not in str(at(scheme, "name")):
        parts.append(f"group_size={size}")
    return parts


def _bits(config: Json, scheme: Any) -> Any:
    """Bits of a code; those of the step that has codes of its own, where the scheme leaves them to it."""
    if at(scheme, "weight") is not None:
        return code_bits(at(scheme, "weight"))
    steps = at(config, "method") if isinstance(scheme, dict) else None
    return next((step["bits"] for step in steps.values() if "bits" in step), None) if isinstance(steps, dict) else None


def code_bits(fmt: Any) -> Any:
    """Bits of a code: `bits` of an integer format, those of the element of a float format."""
    try:
        return element(str(at(fmt, "element"))).bits
    except ValueError:
        return at(fmt, "bits")


def usual_fields(scheme: Any) -> Json:
    """The fields of a scheme's weights with the values that its name says, or that this project's schemes have."""
    weight = at(scheme, "weight") or {}
    return next((fields(scheme) for key, fields in _USUAL.items() if key in weight), {})


def _usual_integers(scheme: Any) -> Json:
    grid = _GRID[bool(at(scheme, "activation"))] if at(scheme, "weight", "symmetric") else "full"
    size = {"group_size": _W4A8_GROUP} if str(at(scheme, "name")).startswith(_W4A8) else {}
    return {"grid": grid, "zero_point": _ZERO_POINT, "scale_dtype": _SCALE_DTYPE} | size


def _usual_floats(scheme: Any) -> Json:
    name = str(at(scheme, "name"))
    said = next((fields for word, fields in _FLOATS.items() if word in name), {})
    return {
        "element": None,
        "scale_dtype": "float32",
        "scale_rule": "floor",
        "top": None,
        "tensor_scale": False,
        "scale_search": "none",
    } | said


def _usual_levels(scheme: Any) -> Json:
    named = at(scheme, "name") in ("nf4", "fp4")
    return {"group_size": 64, "double_quant": named, "scale_dtype": "float32" if named else "float16"}


def _usual_learned(scheme: Any) -> Json:
    return {"levels_dtype": "float16"}


_USUAL = {"element": _usual_floats, "table": _usual_levels, "levels": _usual_learned, "grid": _usual_integers}


def at(config: Any, *keys: str) -> Any:
    """A value of a nested configuration, None if there is none: that of a failed run may have any shape."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _configured_dtype(config: Any) -> str | None:
    """The float type of a run that failed before its model was loaded, if its configuration names one."""
    dtype = at(config, "model", "dtype")
    return dtype if dtype in DTYPES else None


def _configured_text(config: Any) -> str | None:
    """The evaluation text of a run that failed before the text was read."""
    source, path = at(config, "data", "source"), at(config, "data", "path")
    return Path(str(path)).name if path else source and f"{source}:evaluation"


def _calibration(record: Record) -> str | None:
    """The calibration data as "8 x 512 tokens of pydocs:calibration, random"; None if the run has none."""
    text = record.data.calibration
    if text is None:
        return None
    sampling = ", random" if text.sampling == "random" else ""
    return f"{text.num_windows} x {text.seq_len} tokens of {text.source}{sampling}"


DESCRIBED = tuple(describe(Record("")))  # the columns
