"""GGUF files that this project writes: blocks decode as the package gguf decodes them, models and tokenizers return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.core import FloatWeight, IntWeight
from harness.models.exchange import gguf_file
from harness.models.exchange.gguf import GGUF, pretrained
from harness.models.exchange.gguf_blocks import blocks_of
from harness.models.exchange.gguf_layout import settings
from harness.models.exchange.gguf_types import READ
from harness.models.exchange.gguf_vocabulary import Vocabulary
from harness.runs import execute_run
from tests.conftest import resolve
from tests.support import checkpoints as made
from tests.support.families import build

SHORT = ("data.seq_len=64", "data.max_windows=6", "data.num_samples=4", "data.calibration_seq_len=32", "measure=off")
G32 = ("method=rtn", "scheme=group64", "scheme.weight.group_size=32", "scheme.weight.symmetric=true", "bits=4")
SHAPE = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-5},
    "mistral": {"tie_word_embeddings": True},
    "qwen2": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "num_hidden_layers": 7, "num_key_value_heads": 1, "sliding_window": 16},
}


@pytest.mark.parametrize("size", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_integers_are_blocks_of_gguf(bits: int, size: int) -> None:
    fmt = IntWeight(bits=bits, symmetric=True, granularity="channel" if size == -1 else "group", group_size=size)
    weight = torch.randn(6, 192)
    quantized = fmt.quantized(weight, fmt.weight_params(weight))
    stored = blocks_of(quantized)
    assert stored is not None
    kind, data = stored
    assert kind == f"Q{bits}_0"
    decoded = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
    assert torch.equal(decoded, quantized.dequantize())
    assert torch.equal(READ[kind]("x", data).dequantize(), quantized.dequantize())


def test_mxfp4_is_a_type_of_gguf() -> None:
    fmt = FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype="e8m0")
    weight = torch.randn(6, 192) * torch.logspace(-3, 3, 6)[:, None]
    quantized = fmt.quantized(weight, fmt.weight_params(weight))
    stored = blocks_of(quantized)
    assert stored is not None
    decoded = torch.from_numpy(dequantize(stored[1], GGMLQuantizationType[stored[0]]))
    assert torch.equal(decoded, quantized.dequantize())


@pytest.mark.parametrize(
    "fmt",
    [
        IntWeight(bits=3, granularity="group", group_size=32, symmetric=True),
        IntWeight(bits=4, granularity="group", group_size=16, symmetric=True),
        IntWeight(bits=4, granularity="group", group_size=32, symmetric=False),
        IntWeight(bits=4, granularity="group", group_size=32, symmetric=True, scale_dtype="float32"),
    ],
)
def test_what_no_type_of_gguf_holds(fmt: IntWeight) -> None:
    weight = torch.randn(6, 64)
    assert blocks_of(fmt.quantized(weight, fmt.weight_params(weight))) is None


def _base(folder: Path, family: str, **options: Any) -> Path:
    return made.with_tokenizer(made.floats(folder, family, **SHAPE, **options), [("a", "b")])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_file_is_a_checkpoint_with_the_same_figures(family: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "float", family, **FAMILIES[family])
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", "execution=simulated")
    saved = (f"save={tmp_path / 'saved'}", "export=gguf")
    ours, _ = execute_run(resolve(*common, f"model.path={base}", *G32, *saved))
    assert (ours.status, ours.unsaved) == ("ok", None), (ours.error, ours.unsaved)
    theirs, _ = execute_run(resolve(*common, f"model.path={tmp_path / 'saved' / 'model.gguf'}", "method=checkpoint"))
    assert theirs.status == "ok", theirs.error
    assert theirs.window_nll == ours.window_nll
    assert theirs.metrics["bits_per_weight"] == 4.5
    assert theirs.data.evaluation == ours.data.evaluation


def test_a_float_model_without_a_vocabulary_is_a_file(tmp_path: Path) -> None:
    model = build("llama", **SHAPE)
    gguf_file.write_gguf(tmp_path / "x.gguf", "x", model, {}, None)
    returned = pretrained(GGUF(tmp_path / "x.gguf"))
    assert all(map(torch.equal, model.state_dict().values(), returned.state_dict().values()))


def test_scaled_frequencies_return(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    base = _base(tmp_path / "float", "llama", rope_parameters=rope)
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", *G32)
    record, _ = execute_run(resolve(*common, f"save={tmp_path / 'saved'}", "export=gguf"))
    assert record.unsaved is None
    file = tmp_path / "saved" / "model.gguf"
    (factors,) = (tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    assert (factors[0], factors[-1]) == pytest.approx((1, 8))
    frequencies = pretrained(GGUF(file)).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(frequencies, plain / torch.tensor(factors), rtol=1e-6)


def test_frequencies_that_are_scaled_in_another_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = ("string", "llama.rope.scaling.type", "yarn")
    monkeypatch.setattr(gguf_file, "settings", lambda *arguments: (*settings(*arguments), field))
    base = _base(tmp_path / "float", "llama")
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", *G32)
    record, _ = execute_run(resolve(*common, f"save={tmp_path / 'saved'}", "export=gguf"))
    assert "cannot be read again: llama.rope.scaling.type=yarn, expected linear or none" in str(record.unsaved)
    assert not (tmp_path / "saved").exists()
    assert list(tmp_path.glob("saved*")) == []


@pytest.mark.parametrize(
    ("family", "options", "overrides", "message"),
    [
        ("gpt_neox", {}, (), "export=gguf cannot hold model_type=gpt_neox; expected one of llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, (), "cannot hold hidden_act=gelu; expected silu, or export=native"),
        ("gemma3_text", {"head_dim": 32}, (), "cannot hold query_pre_attn_scalar=256; expected 32"),
        ("llama", {}, ("scheme.weight.symmetric=false",), "cannot hold scheme.weight.symmetric=false; expected true"),
        ("llama", {}, ("scheme.weight.group_size=16",), "cannot hold scheme.weight.group_size=16; expected a multiple"),
        ("llama", {}, ("bits=3",), "export=gguf cannot hold bits=3; expected 4, 5, 8"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_beforehand(
    family: str, options: dict[str, Any], overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    base = _base(tmp_path / "float", family, **options)
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", *G32)
    record, _ = execute_run(resolve(*common, *overrides, f"save={tmp_path / 'saved'}", "export=gguf"))
    assert message in str(record.error)
    assert record.stages == {}
    assert not (tmp_path / "saved").exists()


def _fields(tokenizer: Any, size: int) -> dict[str, Any]:
    vocabulary = Vocabulary(tokenizer, size)
    assert vocabulary.problem is None
    return {key.removeprefix("tokenizer."): value for _, key, value in vocabulary.fields()}


def _characters() -> PreTrainedTokenizerFast:
    """BPE on characters with bytes for others, as SentencePiece makes it."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "a", "b", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = models.BPE(
        {token: place for place, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.ByteFallback()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_vocabulary_of_characters_has_scores_and_bytes() -> None:
    fields = _fields(_characters(), 266)
    assert fields["ggml.model"] == "llama"
    assert fields["ggml.token_type"][:5] == [3, 3, 3, 3, 6]
    assert fields["ggml.token_type"][260:] == [1] * 5 + [5]
    assert fields["ggml.tokens"][265] == "[PAD265]"
    assert fields["ggml.scores"][263:265] == [0, -1]
    assert (fields["ggml.bos_token_id"], fields["ggml.unknown_token_id"]) == (2, 3)
    assert (fields["ggml.add_bos_token"], fields["ggml.add_space_prefix"]) == (False, False)


LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
            "llama-bpe",
        ),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
    ],
)
def test_the_rule_that_splits_texts_has_the_name_of_llama_cpp(steps: list[Any], rule: str | None) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(["<think>"])
    if rule is None:
        assert "splits texts by" in str(Vocabulary(tokenizer, 5).problem)
        return
    fields = _fields(tokenizer, 5)
    assert (fields["ggml.model"], fields["ggml.pre"], fields["ggml.merges"]) == ("gpt2", rule, ["a b"])
    assert fields["ggml.token_type"] == [1, 1, 1, 3, 4]


def test_other_tokenizers_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert Vocabulary(tokenizer, 1).problem == "a tokenizer of the type WordLevel"


def test_the_tokenizer_in_the_file_is_that_of_the_model(tmp_path: Path) -> None:
    base = _base(tmp_path / "float", "llama")
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", *G32)
    record, _ = execute_run(resolve(*common, f"save={tmp_path / 'saved'}", "export=gguf"))
    assert record.unsaved is None
    text = "Caf\u00e9 12,345  \n\tx"
    returned = AutoTokenizer.from_pretrained(tmp_path / "saved", gguf_file="model.gguf")
    assert returned(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
