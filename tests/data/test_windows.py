"""Texts and tokens: joins, windows, sampling, hashes, overlap, and texts that are refused."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from harness.config import DataConfig
from harness.data import corpora, windows
from harness.models import Tokenizer

BOS = 300
BYTES = Tokenizer(lambda text, _special: list(text.encode()))
WITH_BOS = Tokenizer(lambda text, special: [BOS] * special + list(text.encode()), BOS)


def config(tmp_path: Path, content: str | bytes = "", name: str = "a.txt", **keys: object) -> DataConfig:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    defaults: dict[str, object] = {"source": "text_file", "path": str(path), "seq_len": 8}
    return DataConfig(**{**defaults, **keys})  # type: ignore[arg-type]


def test_wikitext_rows_are_joined_as_the_hub_stores_them() -> None:
    raw = " \n = Title = \n \n A row \u2028 with an odd break . \n"
    assert corpora.wikitext_join(raw) == "\n\n = Title = \n\n\n\n\n A row \u2028 with an odd break . \n"


@pytest.mark.parametrize("local", [True, False])
def test_wikitext_is_its_file_in_the_protocol_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    raw = " \n = Title = \n \n A row . \n"
    monkeypatch.setattr(corpora, "_hub_rows", lambda *_, **__: ["", " = Title = \n", "", " A row . \n"])
    for protocol, expected in (("llamacpp", raw), ("gptq", corpora.wikitext_join(raw))):
        keys = {"source": "wikitext2", "protocol": protocol}
        cfg = config(tmp_path, raw, **keys) if local else DataConfig(**keys)  # type: ignore[arg-type]
        assert corpora.documents(cfg, "evaluation").texts == [expected]
        calibration = DataConfig(**keys, calibration_path=cfg.path)  # type: ignore[arg-type]
        assert corpora.documents(calibration, "calibration").texts == [corpora.wikitext_join(raw)]


def test_pydocs_parts_contain_each_paragraph_once() -> None:
    from pydoc_data.topics import topics

    def paragraphs(raw: str) -> list[str]:
        return [" ".join(paragraph.split()) for paragraph in raw.split("\n\n") if paragraph.split()]

    first, second = corpora.pydocs("calibration"), corpora.pydocs("evaluation")
    parts = paragraphs(first) + paragraphs(second)
    assert set(parts) == set(paragraphs("\n\n".join(topics.values())))
    assert len(parts) == len(set(parts))
    assert 0.8 < len(first) / len(second) < 1.25


def test_windows_do_not_overlap_and_an_incomplete_one_is_dropped(tmp_path: Path) -> None:
    stream = windows.evaluation(config(tmp_path, "abcdefghijklmnopqrst"), BYTES)
    assert ["".join(map(chr, row)) for row in stream.windows.tolist()] == ["abcdefgh", "ijklmnop"]
    assert stream.info["num_windows"] == 2
    assert stream.info["text_tokens"] == 20
    assert stream.info["source"] == "a.txt"
    assert stream.info["text_sha256"] == hashlib.sha256(b"abcdefghijklmnopqrst").hexdigest()
    limited = windows.evaluation(config(tmp_path, "abcdefghijklmnopqrst", max_windows=1), BYTES)
    assert limited.windows.shape == (1, 8)
    assert limited.info["tokens_sha256"] != stream.info["tokens_sha256"]


def test_strided_windows_overlap_and_name_their_protocol(tmp_path: Path) -> None:
    cfg = config(tmp_path, "abcdefghijklmnopqrst", protocol="strided", stride=3)
    stream = windows.evaluation(cfg, BYTES)
    assert ["".join(map(chr, row)) for row in stream.windows.tolist()] == [
        *("abcdefgh", "defghijk", "ghijklmn", "jklmnopq", "mnopqrst"),
    ]
    assert cfg.protocol_id == "strided-8-3"
    assert cfg.unscored == 4
    limited = config(tmp_path, "abcdefghijklmnopqrst", protocol="strided", stride=3, max_windows=2)
    assert torch.equal(windows.evaluation(limited, BYTES).windows, stream.windows[:2])


def rows(tokens: windows.Tokens) -> list[str]:
    """Windows as texts; BOS is shown as ^."""
    return ["".join("^" if i == BOS else chr(i) for i in row) for row in tokens.windows.tolist()]


def test_bos_follows_the_protocol_begins_each_window_or_is_left_out(tmp_path: Path) -> None:
    def stream(bos: str) -> windows.Tokens:
        return windows.evaluation(config(tmp_path, "abcdefghijklmnopqrst", seq_len=5, bos=bos), WITH_BOS)

    assert rows(stream("protocol")) == ["^abcd", "efghi", "jklmn", "opqrs"]
    assert rows(stream("always")) == ["^abcd", "^efgh", "^ijkl", "^mnop", "^qrst"]  # each character is scored once
    assert rows(stream("never")) == ["abcde", "fghij", "klmno", "pqrst"]
    fields = {bos: (stream(bos).info["bos"], stream(bos).info["bos_id"]) for bos in ("protocol", "always", "never")}
    assert fields == {"protocol": ("first window", BOS), "always": ("every window", BOS), "never": ("none", None)}
    assert config(tmp_path, bos="always").protocol_id == "gptq-8-bos"


def test_strided_windows_with_bos_score_each_token_once(tmp_path: Path) -> None:
    cfg = config(tmp_path, "abcdefghijkl", seq_len=7, protocol="strided", stride=3, bos="always")
    stream = windows.evaluation(cfg, WITH_BOS)
    assert rows(stream) == ["^abcdef", "^defghi", "^ghijkl"]
    assert "".join(row[1 + cfg.unscored :] for row in rows(stream)) == "defghijkl"


def test_the_protocol_of_llama_cpp_scores_the_second_half_and_replaces_first_tokens(tmp_path: Path) -> None:
    cfg = config(tmp_path, "abcdefghijklmnopqrstu", protocol="llamacpp")
    stream = windows.evaluation(cfg, WITH_BOS)
    assert rows(stream) == ["^abcdefg", "^ijklmno"]
    assert rows(windows.evaluation(cfg, BYTES)) == ["abcdefgh", "ijklmnop"]
    assert cfg.protocol_id == "llamacpp-8"
    # perplexity.cpp: logits of the positions n_ctx / 2 to n_ctx - 2 are scored
    assert len(rows(stream)[0]) - 1 - cfg.unscored == 8 - 1 - 8 // 2
    assert stream.info["bos"] == "every window"
    assert stream.warnings == ()
    with pytest.raises(ValueError, match="bos=never has no use with protocol=llamacpp"):
        config(tmp_path, protocol="llamacpp", bos="never")


def test_windows_that_lack_the_bos_of_their_tokenizer_give_a_warning(tmp_path: Path) -> None:
    def warned(tokenizer: Tokenizer, **keys: object) -> tuple[str, ...]:
        return windows.evaluation(config(tmp_path, "abcdefghijklmnopqrst", **keys), tokenizer).warnings

    (warning,) = warned(WITH_BOS)
    assert warning.startswith("data.bos=protocol: the tokenizer adds BOS, windows 2 to 2 have none")
    assert "data.bos=always" in warning
    assert len(warned(WITH_BOS, bos="never", max_windows=1)) == 1
    assert warned(WITH_BOS, bos="always") == warned(WITH_BOS, max_windows=1) == warned(BYTES) == ()


def test_a_tokenizer_without_bos_cannot_begin_windows_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.bos=always: the tokenizer of this model has no BOS token; expected"):
        windows.evaluation(config(tmp_path, "abcdefghijkl", bos="always"), BYTES)


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_calibration_sequences_begin_with_bos(tmp_path: Path, sampling: str) -> None:
    keys = {"calibration_path": str(tmp_path / "a.txt"), "num_samples": 3, "calibration_seq_len": 4}
    cfg = config(tmp_path, "abcdefghijklmnop", sampling=sampling, bos="always", **keys)
    calibration = windows.calibration(cfg, WITH_BOS, 0)
    assert all(row[0] == "^" and row[1:] in "abcdefghijklmnop" for row in rows(calibration))
    assert sampling == "random" or rows(calibration) == ["^abc", "^def", "^ghi"]
    assert calibration.info["bos"] == "every window"
    as_before = windows.calibration(dataclasses.replace(cfg, bos="protocol"), WITH_BOS, 0)
    assert as_before.info["bos"] == ("first window" if sampling == "first" else "each document")
    assert sampling == "random" or rows(as_before)[0] == "^abc"


def test_overlap_is_found_between_windows_that_begin_with_bos(tmp_path: Path) -> None:
    content = "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(400))
    keys = {"calibration_path": str(tmp_path / "b.txt"), "num_samples": 1, "calibration_seq_len": 101}
    (tmp_path / "b.txt").write_text(content[13:])  # a run of 64 characters crosses windows of 50
    cfg = config(tmp_path, content, seq_len=51, bos="always", **keys)
    stream, calibration = windows.evaluation(cfg, WITH_BOS), windows.calibration(cfg, WITH_BOS, 0)
    with pytest.raises(ValueError, match=f"shares {100 - 64 + 1} runs of tokens"):
        windows.check_overlap(cfg, calibration, stream)


def test_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path=a.txt has 3 tokens, fewer than one window of data.seq_len=8"):
        windows.evaluation(config(tmp_path, "abc"), BYTES)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no text"):
        windows.evaluation(config(tmp_path, " \n "), BYTES)
    with pytest.raises(ValueError, match=r"cannot be read \(its byte order mark is that of UTF-16\); expected"):
        windows.evaluation(config(tmp_path, b"\xff\xfe\x00"), BYTES)
    with pytest.raises(ValueError, match="data.path=.*none.txt is not a file"):
        windows.evaluation(config(tmp_path, path=str(tmp_path / "none.txt")), BYTES)
    with pytest.raises(ValueError, match='JSON lines with a "text" key'):
        windows.evaluation(config(tmp_path, "{}\n", source="c4"), BYTES)


def test_missing_calibration_text_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.calibration_path=None; data=text_file has no calibration text"):
        windows.calibration(config(tmp_path, "abc"), BYTES, seed=0)


def test_first_sampling_takes_consecutive_sequences(tmp_path: Path) -> None:
    cfg = config(tmp_path, "abcdefghijkl", calibration_path=str(tmp_path / "a.txt"), num_samples=2)
    cfg = DataConfig(**{**vars(cfg), "calibration_seq_len": 5})
    assert windows.calibration(cfg, BYTES, 0).windows.tolist() == [list(b"abcde"), list(b"fghij")]
    with pytest.raises(ValueError, match="has 12 tokens; expected data.num_samples=3 x data.calibration_seq_len=5"):
        windows.calibration(DataConfig(**{**vars(cfg), "num_samples": 3}), BYTES, 0)


def test_random_sampling_draws_like_gptq(tmp_path: Path) -> None:
    documents = ["short", "a document that is long enough", "another one that is long enough too"]
    lines = "\n".join(json.dumps({"text": document}) for document in documents)
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    keys = {"source": "c4", "calibration_path": str(path), "sampling": "random", "num_samples": 4}
    cfg = config(tmp_path, "x", **keys, calibration_seq_len=10)
    generator, expected = random.Random(7), []
    for _ in range(4):
        while len(document := documents[generator.randint(0, 2)]) <= 10:
            pass
        start = generator.randint(0, len(document) - 10 - 1)
        expected.append(list(document.encode()[start : start + 10]))
    assert windows.calibration(cfg, BYTES, 7).windows.tolist() == expected
    assert windows.calibration(cfg, BYTES, 8).windows.tolist() != expected


def test_c4_evaluation_joins_the_first_1100_documents_by_spaces(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"d{i}"}) for i in range(1200))
    stream = windows.evaluation(config(tmp_path, lines, source="c4"), BYTES)
    joined = " ".join(f"d{i}" for i in range(1100))
    assert stream.info["text_sha256"] == hashlib.sha256(joined.encode()).hexdigest()


def test_calibration_can_use_another_corpus(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(3))
    (tmp_path / "c4.json").write_text(lines)
    keys = {"source": "wikitext2", "calibration_source": "c4", "calibration_path": str(tmp_path / "c4.json")}
    cfg = config(tmp_path, "one row\n", **keys)
    assert corpora.documents(cfg, "calibration").texts == ["document 0", "document 1", "document 2"]
    assert corpora.documents(cfg, "evaluation").texts == ["one row\n"]
    mixed = DataConfig(source="wikitext2", calibration_source="c4")
    assert corpora.identity(mixed, "calibration") == corpora.describe(mixed, "calibration") == "c4:calibration"
    assert corpora.identity(mixed, "evaluation") == "wikitext2:evaluation"
    assert corpora.identity(mixed, "calibration") != corpora.identity(DataConfig(source="wikitext2"), "calibration")


def test_overlap_is_found_at_any_position() -> None:
    generator = torch.Generator().manual_seed(0)
    evaluation = torch.randint(0, 5000, (4, 500), generator=generator)
    calibration = torch.randint(0, 5000, (3, 300), generator=generator)
    assert windows.overlap(calibration, evaluation) == 0
    calibration[1, 17:97] = evaluation.reshape(-1)[460:540]  # 80 tokens, across two windows
    assert windows.overlap(calibration, evaluation) == 80 - 64 + 1
    calibration[1, 17:97] = torch.roll(calibration[1, 17:97], 1)
    assert windows.overlap(calibration, evaluation) > 0


def test_overlap_is_refused_unless_allowed(tmp_path: Path) -> None:
    content = "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(600))
    keys = {"calibration_path": str(tmp_path / "a.txt"), "num_samples": 2, "calibration_seq_len": 100}
    cfg = config(tmp_path, content, **keys)
    stream, calibration = windows.evaluation(cfg, BYTES), windows.calibration(cfg, BYTES, 0)
    with pytest.raises(ValueError, match="shares .* runs of tokens with evaluation text a.txt; choose another text"):
        windows.check_overlap(cfg, calibration, stream)
    allowed = DataConfig(**{**vars(cfg), "allow_overlap": True})
    assert "perplexity is too low" in str(windows.check_overlap(allowed, calibration, stream))
    other = config(tmp_path, content[::-1].upper(), "b.txt")
    assert windows.check_overlap(cfg, calibration, windows.evaluation(other, BYTES)) is None


def test_pydocs_parts_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        windows, "_OVERLAP_TOKENS", 200
    )  # tokens are bytes here; about 64 tokens of a subword tokenizer
    cfg = DataConfig(source="pydocs", calibration_seq_len=2048, num_samples=80)
    assert windows.check_overlap(cfg, windows.calibration(cfg, BYTES, 0), windows.evaluation(cfg, BYTES)) is None


def test_identity_depends_on_the_content_alone(tmp_path: Path) -> None:
    before = corpora.identity(config(tmp_path, "abc"), "evaluation")
    assert corpora.identity(config(tmp_path, "abc", "b.txt"), "evaluation") == before
    assert corpora.identity(config(tmp_path, "abd"), "evaluation") != before


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_an_unreachable_hub_gives_one_line_with_the_remedy(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.utils.hub.reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"data.path=None.*the hub cannot be reached.*data.path=FILE, or use data=pydocs"
    ):
        corpora.documents(DataConfig(source=source), "evaluation")  # type: ignore[arg-type]
