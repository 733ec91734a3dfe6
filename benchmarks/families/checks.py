"""What must hold for a run that is ok, computed from the saved model by code that shares nothing with the harness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.records import Record
from harness.utils.names import kind_of

GROUP = 32  # inputs that share a scale, as in scheme=group32
_SAME_PERPLEXITY = 1e-6  # relative error of the float model's perplexity
_SAME_RTN = 1e-3  # nats: packed kernels may round activations, but not more than this and a part of what rounding does
_MOVED = 0.02  # nats by which a rewrite and 8 bits may move nll, in addition to a multiple of what rounding does
_BITS = 1e-6
_ALIVE = 1e-3  # KL that rounding to 2 bits must cause at least
_ALWAYS = ("perplexity", "kl", "top1_agreement", "bits_per_weight", "model_size_mib", "prefill_ms_p50", "decode_ms_p50")


@dataclass(frozen=True)
class Reference:
    """The saved model as transformers runs it.

    windows   token windows (W, T) of the evaluation text
    logits    float logits (W, T, V)
    linears   shapes (N, K) by name of the modules in blocks that were seen to compute x W^T + b
    owners    by name of a module with a matrix, the first name of that matrix: others share it
    matrices  number of weights in all matrices of the blocks, of linears or not
    """

    folder: Path
    windows: Tensor
    logits: Tensor
    linears: dict[str, tuple[int, int]]
    owners: dict[str, str]
    matrices: int

    @property
    def nll(self) -> float:
        return nll(self.logits, self.windows)


@torch.inference_mode()
def reference(folder: Path, text: str, seq_len: int, max_windows: int) -> Reference:
    """Open the saved model with transformers alone, score the text, and observe which linears run."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: seq_len * max_windows]).view(max_windows, seq_len)
    model = _opened(folder)
    names = _running(model, windows[:1])
    blocks = {_list_of(name) for name in names}
    matrices = {
        id(parameter): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and _list_of(name) in blocks
    }
    linears = {name: _matrix(model.get_submodule(name)) for name in names}
    shapes = {name: (int(weight.shape[0]), int(weight.shape[1])) for name, weight in linears.items()}
    firsts: dict[int, str] = {}
    owners = {name: firsts.setdefault(id(module.weight), name) for name, module in _with_matrix(model)}
    return Reference(folder, windows, _logits(model, windows), shapes, owners, sum(matrices.values()))


def blind(of: Reference) -> str | None:
    """Why the checks would see nothing: a model whose logits hardly depend on the linears of its blocks."""
    moved = kl(of.logits, rounded_logits(of, set(of.linears), 2))
    return f"rounding to 2 bits moves the logits by KL={moved:.2g} only" if moved < _ALIVE else None


def nll(logits: Tensor, windows: Tensor) -> float:
    """Mean over windows of the mean negative log likelihood of their last T - 1 tokens, in nats."""
    return float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), windows[:, 1:].flatten()))


def kl(logits: Tensor, other: Tensor) -> float:
    """Mean KL divergence of `other` from `logits`, in nats per token, over all but the last position."""
    p, q = (values[:, :-1].double().log_softmax(-1) for values in (logits, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def rounded_logits(of: Reference, names: set[str], bits: int) -> Tensor:
    """Logits of the saved model with the weights of `names` rounded to nearest, in groups of inputs.

    A linear whose inputs cannot be split into groups stays float: the harness refuses it.
    """
    model = _opened(of.folder)
    done = set[int]()
    for name in sorted(names & set(of.linears)):
        weight = _matrix(model.get_submodule(name))
        if weight.data_ptr() not in done and weight.shape[1] % GROUP == 0:  # blocks may share a linear
            done.add(weight.data_ptr())
            weight.copy_(_round(weight, bits))
    return _logits(model, of.windows)


def violations(record: Record, method: str, bits: int, of: Reference) -> list[str]:
    """What is wrong with a run that is ok: one line for each, none if all checks hold."""
    metrics = record.metrics
    wrong = [
        f"{name} is absent without a warning"
        for name in _ALWAYS
        if name not in metrics and not any(name.split("_")[0] in warning for warning in record.warnings)
    ]
    if "perplexity" not in metrics:
        return wrong
    moved = abs(metrics["nll"] - of.nll)
    if method == "none":
        wrong += [f"kl={metrics['kl']:.3g} of the float model"] if metrics.get("kl", 0) != 0 else []
        relative = abs(metrics["perplexity"] / math.exp(of.nll) - 1)
        return wrong + (
            [f"perplexity differs from transformers' by {relative:.2g}"] if relative > _SAME_PERPLEXITY else []
        )
    quantized = {row["name"] for row in record.layers if "weight_error" in row}
    rounded = rounded_logits(of, quantized if method == "rtn" else set(of.linears), bits)
    noise = abs(nll(rounded, of.windows) - of.nll) + kl(of.logits, rounded)
    if method != "rtn":
        far = [f"nll moved by {moved:.3g}, rounding moves it by {noise:.2g}"] if moved > _MOVED + 5 * noise else []
        far += [f"kl={metrics['kl']:.3g}, rounding {noise:.2g}"] if metrics.get("kl", 0) > _MOVED + 5 * noise else []
        return wrong + far + _wrong_bits(record, of)
    error = abs(metrics["nll"] - nll(rounded, of.windows))
    wrong += [f"nll differs from that of rounded weights by {error:.2g}"] if error > _SAME_RTN + 0.05 * noise else []
    return wrong + _wrong_names(record, quantized, of) + _wrong_bits(record, of)


def _wrong_names(record: Record, quantized: set[str], of: Reference) -> list[str]:
    """Linears that run in the blocks but stay float without a warning, and what is quantized although it is none."""
    text = " ".join(record.warnings)
    silent = [name for name in of.linears if name not in quantized and name not in text and kind_of(name) not in text]
    # A module that does not run may share the matrix of one that does.
    running = {of.owners[name] for name in of.linears}
    others = sorted(name for name in quantized if of.owners.get(name) not in running)
    wrong = [f"{len(silent)} linears stay float without a warning: {silent[0]}"] if silent else []
    return wrong + ([f"{len(others)} quantized modules are no linears: {others[0]}"] if others else [])


def _wrong_bits(record: Record, of: Reference) -> list[str]:
    """Compare bits_per_weight with stored bits of what is quantized, and 32 bits of all other matrices."""
    rows = list(
        {of.owners.get(row["name"], row["name"]): row for row in record.layers if "weight_error" in row}.values()
    )
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    bits = (sum(row["stored_bits"] for row in rows) + 32 * (of.matrices - weights)) / of.matrices
    stated = record.metrics["bits_per_weight"]
    return [f"bits_per_weight={stated:.3f}; counted {bits:.3f}"] if abs(stated / bits - 1) > _BITS else []


def _opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: Any, windows: Tensor) -> Tensor:
    return torch.stack([model(input_ids=window[None]).logits[0] for window in windows])


def _round(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest on an asymmetric grid with float16 scales, in groups of 32 inputs."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    decoded: Tensor = (codes - zero).mul(scale).flatten(1)
    return decoded


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear as (N out, K in), a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if type(module).__name__ == "Conv1D" else weight.detach()


def _running(model: nn.Module, tokens: Tensor) -> list[str]:
    """Names of modules inside lists that compute x W^T + b with their `weight`, as seen in one forward."""
    names: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0] if inputs else None
            if not (isinstance(x, Tensor) and isinstance(output, Tensor)) or name in names or _list_of(name) is None:
                return
            weight, bias = _matrix(module), getattr(module, "bias", None)
            if x.is_floating_point() and x.shape[-1] == weight.shape[1] and output.shape[-1] == weight.shape[0]:
                product = F.linear(x.to(weight.dtype), weight, bias)
                if product.shape == output.shape and torch.allclose(product, output, rtol=1e-4, atol=1e-5):
                    names.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in _with_matrix(model)]
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return names


def _with_matrix(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with a matrix as `weight`, by each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if getattr(getattr(module, "weight", None), "ndim", 0) == 2]


def _list_of(name: str) -> str | None:
    """Name of the outermost list that contains a module: model.layers of model.layers.3.mlp.experts.0.w1."""
    parts = name.split(".")
    return next((".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()), None)
