"""The contract between the harness and a quantization method: a few optional hooks.

A method is a frozen, keyword-only dataclass. Its fields are the keys of its YAML file and the options of the command
line. A hook is a pure function of its arguments and fields: no printing, globals, devices or global seeds. A fact that
users of a run must know (for example a raised damping) goes into the run's record through `warnings.warn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.core.block import Block
from harness.core.checks import above_zero, at_least
from harness.core.formats.qtensor import QTensor
from harness.core.formats.rounding import round_to_nearest
from harness.core.groups import InputGroup as InputGroup
from harness.core.residual import Residual as Residual
from harness.core.scheme import Scheme
from harness.core.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """How the floats of a quantized block are trained to reproduce the block's output in the float model.

    epochs  passes over the calibration data
    lr      step of Adam, as a share of the root mean square of the trained tensor
    batch   sequences per step
    """

    epochs: int
    lr: float
    batch: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not self.lr > 0:
            raise ValueError(
                f"epochs={self.epochs}, batch={self.batch}, lr={self.lr}: one is out of range; expected more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the floats of a quantized model are trained to reproduce the float model's distribution of the next token.

    epochs    passes over the calibration data
    lr        first step of Adam, as a share of the root mean square of the trained tensor
    batch     sequences per step
    bfloat16  compute products in bfloat16; what is trained stays float32
    weights   train the weights too, which are rounded anew in each step
    """

    epochs: int
    lr: float
    batch: int
    bfloat16: bool
    weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """How a rotation of the residual stream is trained for rounded inputs; like `Distillation`.

    lr  largest first step on the orthogonal matrices
    """

    epochs: int
    lr: float
    batch: int
    bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods; a method overrides the hooks that it needs and inherits the others.

    `needs` lists the statistics of the inputs that are collected before `transform` and `quantize`: a class variable,
    or a property if it depends on the options.
    """

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return ()

    @property
    def sequential(self) -> bool:
        """Whether the inputs of a group are observed after the preceding groups of its block were quantized."""
        return False

    @property
    def finetune(self) -> Finetune | None:
        """How a block is fine-tuned after its linears are quantized, through the tuners of their QTensors.

        None means no fine-tuning. It is used only if `needs` requests calibration data.
        """
        return None

    @property
    def distillation(self) -> Distillation | None:
        """How the whole model is trained after all steps, through the tuners of its QTensors; None: it is not."""
        return None

    @property
    def rotation(self) -> Rotation | None:
        """How the stream is turned further, by training, after `rotate`; None: it is not."""
        return None

    @property
    def searches(self) -> bool:
        """Whether `transform` calls `group.error`, which needs the block's activations."""
        return False

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError if the method cannot quantize to `scheme`; called before the model is loaded.

        By default every scheme that has a weight format is accepted.
        """
        _ = scheme.format

    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Rewrite the float model once, without data. Must not change the function that it computes.

        `weights` (N out, K in) are views of those that will be quantized, by the names of their linears. A linear that
        is replaced by a `Rotated` stays one that will be quantized.
        """

    def rotate(self, residual: Residual) -> None:
        """Rewrite the float model once at its residual stream, by `fold`, `turn` and `online`; needs no data.

        Must not change the model's function. The harness refuses a model whose stream cannot be rotated before it
        calls this hook.
        """

    def transform(self, group: InputGroup, stats: Stats) -> None:
        """Rewrite the weights of one input group, by `group.rescale`. Must not change the model's function."""

    def adjust(self, weight: Tensor, scheme: Scheme, stats: Stats) -> Tensor:
        """Another weight (N, K) to choose codes of, in the place of `weight`, which must stay unchanged.

        It may compute another function, near to that of `weight` and easier to quantize. Called before the hooks below,
        of this step or of a later one, with the statistics of both.
        """
        return weight

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        """Choose the codes of one weight (N, K), without changing the weight. By default: round to nearest."""
        return round_to_nearest(weight, scheme.format)

    def quantize_block(self, block: Block) -> Mapping[str, QTensor]:
        """Choose the codes of all weights of a block at once, by name; overridden in the place of `quantize`."""
        return {
            name: self.quantize(block.weights[name], block.schemes[name], block.stats[name]) for name in block.weights
        }


@dataclass(frozen=True, kw_only=True)
class Finetuned(Method):
    """Base class of methods that fine-tune a block after its linears are quantized.

    epochs  passes over the calibration data; 0 for no fine-tuning
    lr      step of Adam, as a share of the root mean square of the trained tensor
    """

    epochs: int = 1
    lr: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs")
        above_zero(self, "lr")

    @property
    def finetune(self) -> Finetune | None:
        return Finetune(epochs=self.epochs, lr=self.lr) if self.epochs else None


def chooses(method: Method | type[Method]) -> bool:
    """Whether a method chooses codes, of a weight or of a block, in another way than by rounding to nearest."""
    return overrides(method, "quantize") or overrides(method, "quantize_block")


def overrides(method: Method | type[Method], hook: str) -> bool:
    """Whether a method overrides `hook` of the base class."""
    cls = method if isinstance(method, type) else type(method)
    return getattr(cls, hook) is not getattr(Method, hook)
