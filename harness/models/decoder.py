"""The decoder of a model: its blocks and the linears inside them, found from the module tree."""

from __future__ import annotations

from torch import nn

from harness.models.architecture import is_linear


class Decoder:
    """The decoder blocks of `model`, found once.

    prefix  name of the module list that contains them
    blocks  the blocks in order; modules inside them can be replaced later, and `linears` returns the current ones

    Raises: ValueError if the model has no list of equal blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix = _prefix(model)
        self.blocks: list[nn.Module] = list(model.get_submodule(self.prefix).children())

    def name(self, index: int) -> str:
        """Full name of block number `index`."""
        return f"{self.prefix}.{index}"

    def linears(self, index: int | None = None) -> dict[str, nn.Module]:
        """The linears of one block, or of all blocks, by full name in module order; without embedding and head."""
        start = f"{self.prefix if index is None else self.name(index)}."
        modules = self.model.named_modules()
        return {name: module for name, module in modules if name.startswith(start) and is_linear(module)}

    def uncovered(self) -> list[str]:
        """Names of matrices in the blocks that belong to no linear, such as fused experts: no method quantizes them."""
        covered = {id(parameter) for module in self.linears().values() for parameter in module.parameters()}
        return [
            name
            for name, parameter in self.model.named_parameters()
            if name.startswith(f"{self.prefix}.") and parameter.dim() >= 2 and id(parameter) not in covered
        ]


def _prefix(model: nn.Module) -> str:
    """Name of the list of decoder blocks: of the module lists whose items have one class, that with most parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    }
    if not sizes:
        raise ValueError(f"model of class {type(model).__name__} has no list of equal blocks; expected a decoder")
    largest: str = max(sizes, key=sizes.__getitem__)
    return largest
