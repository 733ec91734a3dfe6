"""Folders that are not what they should be: incomplete, damaged, of another class; each is one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from harness import models
from harness.config import ModelConfig
from harness.utils.errors import LIMIT
from harness.utils.explain import cut, explain
from tests.support.families import build as build_family

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_family("llama").save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    return tmp_path / "saved"


def change(folder: Path, edit: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def load(folder: Path) -> list[str]:
    """The warnings of a load."""
    warnings: list[str] = []
    models.open(ModelConfig(name="x", path=str(folder)), 0).load(torch.float32, CPU, warnings.append)
    return warnings


def refused(folder: Path, early: bool = True) -> str:
    """The line with which a folder is refused; `early`: before a weight is loaded."""
    source = models.open(ModelConfig(name="x", path=str(folder)), 0)

    def steps() -> None:
        source.check()
        source.skeleton()
        if not early:
            source.load(torch.float32, CPU)

    with pytest.raises(ValueError, match=r"^model.path=") as caught:
        steps()
    line = str(caught.value)
    assert len(line) <= LIMIT
    assert "\n" not in line
    assert line.startswith("model.path=")
    assert folder.name in line
    assert "; " in line
    return line


def test_a_complete_checkpoint_has_no_warning(folder: Path) -> None:
    assert load(folder) == []


def test_missing_weights_are_named_and_counted(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(UP))
    assert f"lacks 1 weight of LlamaForCausalLM ({UP}); expected" in refused(folder, early=False)
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks 2 weights" in refused(folder, early=False)


def test_a_missing_head_is_refused_unless_it_is_tied(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "(lm_head.weight); expected the head too, or tie_word_embeddings=true" in refused(folder, early=False)
    configure(folder, tie_word_embeddings=True)
    assert load(folder) == []


def test_a_base_model_without_its_prefix_and_head(folder: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight")
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(folder, strip)
    assert "(lm_head.weight)" in refused(folder, early=False)
    configure(folder, tie_word_embeddings=True)
    assert load(folder) == []


def test_names_of_another_architecture_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: [tensors.update({f"a.{name}": tensors.pop(name)}) for name in list(tensors)])
    assert "lacks 21 weights" in refused(folder, early=False)


def test_unexpected_tensors_are_a_warning(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"model.extra.{i}.weight": torch.ones(2) for i in range(4)}))
    (warning,) = load(folder)
    assert warning == (
        "model=saved: 4 tensors of the checkpoint have no place in LlamaForCausalLM and were ignored: "
        "model.extra.0.weight, model.extra.1.weight, and 2 more"
    )


def test_tensors_that_the_class_ignores_without_a_report_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = type(build_family("llama"))
    monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", {r"layers\.2\."})
    change(folder, lambda tensors: tensors.update({"model.layers.2.up_proj.weight": torch.ones(2)}))
    (warning,) = load(folder)
    assert warning.startswith(
        "model=saved: 1 tensor of the checkpoint has no place in LlamaForCausalLM and was ignored"
    )
    assert warning.endswith("ignored: model.layers.2.up_proj.weight")


def test_a_head_that_the_config_ties_but_the_file_does_not_is_a_warning(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    assert load(folder) == [
        "model=saved: config.json has tie_word_embeddings=true, but the checkpoint has another head, which is used"
    ]


def test_custom_code_is_never_run(folder: Path) -> None:
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (warning,) = load(folder)
    assert "custom code, modeling_own.py, is not run" in warning
    configure(folder, model_type="own")
    assert "model_type=own needs custom code, modeling_own.py" in refused(folder)


def test_shapes_that_differ_from_the_config_are_named(folder: Path) -> None:
    configure(folder, intermediate_size=96)
    assert "model.layers.0.mlp.down_proj.weight is (32, 64) in the file, (32, 96) by config" in refused(folder, False)


def shard(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    build_family("llama").save_pretrained(folder, max_shard_size="30KB")  # type: ignore[operator]
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_file_of_several(folder: Path) -> None:
    shards = shard(folder)
    assert load(folder) == []
    shards[1].unlink()
    assert f"{shards[1].name} is missing, 1 of the {len(shards)} weight files are" in refused(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "has no weight_map" in refused(folder)
    index.write_text("[")
    assert "is not JSON" in refused(folder)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
        (truncate, "is damaged or in another format"),
        (lambda file: file.write_bytes(b""), "is damaged or in another format"),
        (lambda file: file.unlink(), "has no model.safetensors, pytorch_model.bin or index"),
        (lambda file: file.rename(file.with_name("pytorch_model.bin")), "pytorch_model.bin is damaged"),
    ],
)
def test_damaged_files(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder / "model.safetensors")
    assert message in refused(folder)


def test_weights_in_torch_format(folder: Path) -> None:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert load(folder) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds no mapping"),
        ("{}", "config.json has no model_type"),
        ('{"model_type": "llamb"}', "has no model_type=llamb"),
        ('{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}', "not a multiple"),
        ('{"model_type": "llama", "hidden_size": "64"}', "expected int"),
        ('{"model_type": "llama", "dtype": "float7"}', "float7"),
        ('{"model_type": "vit"}', "it is a ViTConfig); expected a causal language model"),
    ],
)
def test_configs_that_cannot_be_read(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    assert message in refused(folder)


def test_a_model_with_an_encoder_is_named(tmp_path: Path) -> None:
    shape = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(shape).save_pretrained(tmp_path / "t5")
    assert "it is a T5ForConditionalGeneration, with an encoder); expected a causal" in refused(tmp_path / "t5")


def test_an_attention_that_is_not_installed(folder: Path) -> None:
    configure(folder, _attn_implementation="flash_attention_2")
    assert "; remove _attn_implementation from config.json, or install its package" in refused(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json says that it is an adapter" in refused(folder)
    (folder / "config.json").unlink()
    assert "adapter_config.json says that it is an adapter" in refused(folder)


def test_a_tokenizer_without_files_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    with pytest.raises(ValueError, match=r"model.path=.*vocab.txt of the tokenizer is missing.*save the model's token"):
        _ = models.open(ModelConfig(name="x", path=str(tmp_path)), 0).tokenizer


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    source = models.open(ModelConfig(name="x", path=str(folder)), 0)
    source.check_tokens(torch.tensor([[0, 127]]), "data.path=a.txt")
    with pytest.raises(
        ValueError, match=r"^data.path=a.txt has token 128, but model.path=.*saved has only 128 tokens;"
    ):
        source.check_tokens(torch.tensor([[0, 128]]), "data.path=a.txt")


# The same model as a repository in a cache of the hub.


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of the model `org/small` in a cache, offline."""
    from huggingface_hub import constants

    repository = folder.parent / "hub" / "models--org--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def hub_source() -> models.Source:
    return models.open(ModelConfig(name="x", id="org/small", revision="main"), 0)


def test_a_hub_model_is_checked_in_the_same_way(hub: Path) -> None:
    warnings: list[str] = []
    hub_source().load(torch.float32, CPU, warnings.append)
    assert warnings == []
    change(hub, lambda tensors: tensors.pop(UP))
    with pytest.raises(ValueError, match=rf"^model.id=org/small lacks 1 weight of LlamaForCausalLM \({UP}\);"):
        hub_source().load(torch.float32, CPU)
    configure(hub, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError,
        match=r"^model.id=org/small is quantized already \(gptq, 4 bits, by quantization_config of config.json\);",
    ):
        hub_source().check()


def test_a_folder_as_id_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is a local folder; use model.path="):
        _ = models.open(ModelConfig(name="x", id=str(folder)), 0).shape


# Lines.


def test_lines_keep_the_remedy_and_the_end_of_a_path() -> None:
    line = str(explain(f"model.path=/{'a' * 300}/folder", "cannot be read", "b" * 300, "do this"))
    assert len(line) == LIMIT
    assert line.startswith("model.path=/aaa")
    assert "/folder cannot be read (bbb" in line
    assert line.endswith("...); do this")
    assert str(explain("key=1", "is wrong", "", "do this")) == "key=1 is wrong; do this"


def test_cuts() -> None:
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abc..."
