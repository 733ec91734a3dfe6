"""The contract between the harness and a quantization method: four optional hooks.

A method is a frozen, keyword-only dataclass. Its fields are its YAML's keys and the command line's options.
A hook is a pure function of its arguments and fields: no printing, globals, devices or global seeds. What a
person has to know of a run (a damping that had to be raised) goes through `warnings.warn` into its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.core.qtensor import QTensor, round_to_nearest
from harness.core.ranges import above_zero, at_least
from harness.core.residual import Residual as Residual
from harness.core.rewrite import InputGroup as InputGroup
from harness.core.scheme import NATIVE, Scheme
from harness.core.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """How the floats of a quantized block are trained to give the float model's output of it.

    epochs  passes over the calibration data
    lr      step of Adam, as a share of the root mean square of the tensor that it moves
    batch   sequences a step
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
class Method:
    """Base of all methods; override what the idea needs and inherit the rest.

    `needs` names the statistics of the inputs to collect before `transform` and `quantize`: a class variable, or a
    property where it depends on the options.
    """

    @property
    def needs(self) -> Sequence[type[Stat]]:
        return ()

    @property
    def sequential(self) -> bool:
        """Whether a group's inputs are observed after the groups before it in its block were quantized."""
        return False

    @property
    def finetune(self) -> Finetune | None:
        """How a block is fine-tuned once its linears are quantized, by the tuners of their QTensors; None for not.

        Only where `needs` asks for calibration data.
        """
        return None

    @property
    def searches(self) -> bool:
        """Whether `transform` asks for `group.error`, which needs the block's activations."""
        return False

    def check(self, scheme: Scheme) -> None:
        """Raise ValueError if the method cannot quantize to `scheme`; called before the model is loaded.

        By default every format is taken but `native`, which says nothing to a method without a format of its own.
        """
        if scheme.name == NATIVE:
            raise ValueError(
                f"scheme={NATIVE} is for methods with a format of their own; use another, as scheme=group64"
            )

    def prepare(self, model: nn.Module) -> None:
        """Rewrite the float model once, without data (rotations). Must keep the function that it computes."""

    def rotate(self, residual: Residual) -> None:
        """Rewrite the float model once around its residual stream, by `fold`, `turn` and `online`; needs no data.

        Must keep the model's function. A model whose stream cannot be turned is refused before.
        """

    def transform(self, group: InputGroup, stats: Stats) -> None:
        """Rewrite the weights around one input group, by `group.rescale`. Must keep the model's function."""

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        """Choose the codes of one weight (N, K), which must not be changed. By default: round to nearest."""
        return round_to_nearest(weight, scheme.weight)


@dataclass(frozen=True, kw_only=True)
class Finetuned(Method):
    """Base of methods whose blocks are trained once their linears are quantized.

    epochs  passes over the calibration data; 0 for no training
    lr      step of that training, as a share of what it moves
    """

    epochs: int = 1
    lr: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs")
        above_zero(self, "lr")

    @property
    def finetune(self) -> Finetune | None:
        return Finetune(epochs=self.epochs, lr=self.lr) if self.epochs else None


def overrides(method: Method | type[Method], hook: str) -> bool:
    """Whether a method brings a `hook` of its own."""
    cls = method if isinstance(method, type) else type(method)
    return getattr(cls, hook) is not getattr(Method, hook)
