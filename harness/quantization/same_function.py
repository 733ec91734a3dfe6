"""The proof that a rewrite kept what a model computes."""

from __future__ import annotations

from torch import Tensor

from harness.calibration import SAME_FUNCTION, Limits, relative_error, within


def same_function(label: str, before: Tensor, after: Tensor, what: str, limits: Limits = SAME_FUNCTION) -> None:
    """Check that a rewrite by the step `label` changed the tensor `what` by no more than rounding.

    Raises: ValueError with the measured error if it did.
    """
    error, limit = relative_error(after, before), limits[before.dtype]
    if not within(error, limit):
        raise ValueError(
            f"method.{label}: the rewrite changed the float model's function: the relative error of {what} is "
            f"{error:.2g}; expected at most {limit:g}; use a method that does not rewrite, such as gptq"
        )
