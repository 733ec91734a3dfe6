"""Weights off their grid: the same function, no levels left, and a wrong pair refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness.models import off_grid
from harness.models.off_grid import Pair, take_off_grid

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def on_grid(model_type: str, **fields: Any) -> Any:
    """A random model whose linears have 16 levels in each group of 16 inputs, and whose norms are not constant."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **fields)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                module.weight.copy_(torch.randint(0, 16, module.weight.shape) * 0.01 - 0.08)
                if module.bias is not None:
                    module.bias.normal_()
            elif hasattr(module, "weight") and module.weight.ndim == 1:
                module.weight.uniform_(0.5, 1.5)
    return model


MODELS = [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("gemma3_text", {}), ("qwen3", {})]


@pytest.mark.parametrize(("model_type", "fields"), MODELS)
def test_the_logits_stay_and_no_weight_keeps_its_levels(model_type: str, fields: dict[str, Any]) -> None:
    model, tokens = on_grid(model_type, **fields), torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        exact, rounded = take_off_grid(model, 0)
        after = model(input_ids=tokens).logits
    assert exact < 1e-13 < rounded < 1e-6
    assert float((after - before).norm() / before.norm()) < 1e-5
    for name, parameter in model.model.layers.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 2:
            assert min(len(set(group.tolist())) for group in parameter.reshape(-1, 16)) > 8, name
            assert _largest_residue(parameter) > 0.01, name


def _largest_residue(weight: Tensor) -> float:
    """Distance of the weights from the 16 levels of their groups, relative to a level."""
    groups = weight.detach().double().reshape(-1, 16)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    codes = (groups - low) / ((high - low) / 15)
    return float((codes - codes.round()).abs().max())


def test_the_factors_are_narrow_and_come_from_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        model = on_grid("llama")
        norm = model.model.layers[1].input_layernorm.weight.detach().clone()
        torch.manual_seed(seed + 10)
        take_off_grid(model, seed)
        weights.append(model.model.layers[1].input_layernorm.weight.detach() / norm)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 2**-0.25 <= weights[0].min() < 0.9 < 1.1 < weights[0].max() <= 2**0.25
    assert weights[0][0] == pytest.approx(2 ** _fifth(0), rel=1e-6)


def _fifth(seed: int) -> float:
    """The exponent of the first factor of block 1, drawn after those of block 0."""
    generator = random.Random(seed)
    drawn = [generator.uniform(-0.25, 0.25) for _ in range(48 + 32 + 48 + 96 + 1)]
    return drawn[-1]


def test_a_pair_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(off_grid, "pairs", lambda block: [Pair(block.input_layernorm, (block.self_attn.q_proj,))])
    with pytest.raises(
        ValueError, match=r"^model.factor_seed=7: factors in 2 blocks change the logits by .*; expected at"
    ):
        take_off_grid(on_grid("llama"), 7)


def test_a_model_without_pairs_is_refused() -> None:
    shape = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"^model.factor_seed=0: factors in 0 blocks .*use model.factor_seed=null"):
        take_off_grid(AutoModelForCausalLM.from_config(shape).eval(), 0)
