"""Text files: byte order marks, line ends, encodings, compressed files, and JSON lines that are refused by number."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.config import DataConfig
from harness.data import corpora, texts, windows
from harness.models import Tokenizer

BYTES = Tokenizer(lambda text, _special: list(text.encode()))
TEXT = " \n = Title = \n \n A first row ; \n A second row . \n"
BOM = b"\xef\xbb\xbf"
FORMS = {
    "plain": TEXT.encode(),
    "bom": BOM + TEXT.encode(),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "cr": TEXT.replace("\n", "\r").encode(),
    "bom_crlf": BOM + TEXT.replace("\n", "\r\n").encode(),
}


def config(path: Path, source: str, **keys: Any) -> DataConfig:
    return DataConfig(source=source, path=str(path), calibration_path=str(path), seq_len=8, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["text_file", "wikitext2"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_same_text_gives_the_same_hashes(tmp_path: Path, source: str, form: str, compressed: bool) -> None:
    path, plain = tmp_path / ("a.txt.gz" if compressed else "a.txt"), tmp_path / "plain.txt"
    path.write_bytes(gzip.compress(FORMS[form], mtime=0) if compressed else FORMS[form])
    plain.write_bytes(FORMS["plain"])
    cfg, expected = config(path, source, num_samples=2, calibration_seq_len=4), config(plain, source)
    stream = windows.evaluation(cfg, BYTES)
    same = windows.evaluation(expected, BYTES)
    for name in ("text_sha256", "tokens_sha256", "text_tokens"):
        assert stream.info[name] == same.info[name]
    calibration = windows.calibration(cfg, BYTES, 0)
    assert calibration.info["text_sha256"] == same.info["text_sha256"]
    assert same.warnings == ()
    assert stream.warnings == tuple(text.replace("calibration_path", "path") for text in calibration.warnings)
    assert (form == "plain") == (stream.warnings == ())
    if not compressed:
        assert corpora.identity(cfg, "evaluation") == corpora.identity(expected, "evaluation")


def test_a_warning_says_what_was_normalized(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(FORMS["bom_crlf"])
    (warning,) = windows.evaluation(config(path, "text_file"), BYTES).warnings
    start = "data.path=a.txt: a byte order mark was removed, 5 line ends (CRLF, CR) became LF"
    assert warning.startswith(start)


def test_the_rows_of_a_hub_have_line_feeds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = Title = \r\n", "", " A row . \r\n"]
    monkeypatch.setattr(corpora, "_hub_rows", lambda *_, **__: rows)
    documents = corpora.documents(DataConfig(source="wikitext2"), "evaluation")
    assert documents.texts == ["\n\n = Title = \n\n\n\n\n A row . \n"]
    assert documents.warnings[0].startswith("data.path=wikitext2:evaluation: 2 line ends (CRLF, CR) became LF")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_line_ends_of_json_lines_are_no_text(tmp_path: Path, end: str, mark: bytes) -> None:
    documents = ["one\r\ntwo", "\ufeffthree", "nul \0"]
    path = tmp_path / "c4.json"
    path.write_bytes(mark + end.join(json.dumps({"text": text}) for text in [*documents, "end"]).encode())
    result = corpora.documents(config(path, "c4"), "calibration")
    assert result.texts == [*documents, "end"]
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": null}', '"text" is null, not a string'),
        ('{"text": 5}', '"text" is a number, not a string'),
        ('{"text": true}', '"text" is a boolean, not a string'),
        ('{"text": ["a"]}', '"text" is an array, not a string'),
        ('{"text": {"a": "b"}}', '"text" is an object, not a string'),
        ('{"text": "\\ud800 x"}', "\\ud800 is half of a surrogate pair, not a character"),
        ('{"title": "a"}', 'no key "text"'),
        ('["text"]', "an array, not an object"),
        ('"text"', "a string, not an object"),
        ("null", "null, not an object"),
        ("5", "a number, not an object"),
        ('{"text": "a"', "Expecting ',' delimiter at column 13"),
        ("text", "Expecting value at column 1"),
        ("[" * 100_000, "too deeply nested, or a number with too many digits"),
        ('{"text": ' + "9" * 5000 + "}", "too deeply nested, or a number with too many digits"),
    ],
)
def test_a_json_line_without_a_text_is_refused_by_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "c4.json"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    message = f'data.path={path} cannot be read (line 3: {reason}); expected JSON lines with a "text" key'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        corpora.documents(config(path, "c4"), "evaluation")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text".encode("utf-16"), "its byte order mark is that of UTF-16"),
        ("text".encode("utf-32"), "its byte order mark is that of UTF-32"),
        ("text".encode("utf-16-le"), "byte 1 is NUL"),
        (b"text \xff", "invalid start byte"),
        ("sur\ud800rogate".encode("utf-8", "surrogatepass"), "invalid continuation byte"),
        (gzip.compress(b"text" * 100, mtime=0)[:-9], "ended before"),
    ],
)
@pytest.mark.parametrize("source", ["text_file", "c4"])
def test_files_that_are_not_utf8_text_are_refused(tmp_path: Path, content: bytes, reason: str, source: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot be read .*{reason}.*; expected ") as raised:
        corpora.documents(config(path, source), "evaluation")
    assert str(raised.value).startswith(f"data.path={path}")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^data.path="):
        texts.identity("data.path", Path(name))
