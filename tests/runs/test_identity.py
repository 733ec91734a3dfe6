"""Identity of runs: what changes the run id and the digest of the code, and which finished runs are repeated."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import config, models
from harness.config import Decides, RunConfig, build_run, decides
from harness.records import Record, path_of, read, write
from harness.runs import execute_run, identity
from harness.runs.sources import Sources
from tests.conftest import ROOT, TINY, resolve

Tiny = Callable[..., dict[str, Any]]
CLASSES = [
    cls
    for cls in vars(config).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__.startswith("harness.config")
]
# Values that differ from those of the fixture `everything`, for fields whose type is not enough to find one.
OTHER = {
    "model.package": "other==1",
    "model.id": "other/model",
    "model.revision": "abc",
    "model.path": "elsewhere",
    "model.dtype": "float64",
    "model.baseline_dtype": "float64",
    "data.source": "text_file",
    "data.path": "other.txt",
    "data.calibration_path": "other.txt",
    "data.calibration_source": "c4",
    "data.sampling": "random",
    "data.protocol": "gptq",
    "data.bos": "always",
    "engine.propagate": "float",
    "analysis.sensitivity": "block",
    "analysis.outliers": ("*",),
    "mixed.widths": (2, 4),
    "mixed.sensitivity": "elsewhere",
    "model.architecture": {"model_type": "gpt2"},
    "skip": ("*.down_proj",),
    "execution": "simulated",
    "device": "cuda",
    "save": "elsewhere",
    "stale": "keep",
    "warnings": ("one",),
    "kv": None,
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_of_a_configuration_class_says_when_it_decides(cls: type) -> None:
    for item in dataclasses.fields(cls):
        assert isinstance(item.metadata.get("decides"), Decides), f"{cls.__name__}.{item.name}"


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A configuration in which every condition holds: it calibrates, analyses and chooses widths."""
    raw = resolve(*TINY, "kv=kivi4", "data.protocol=strided", "data.stride=8", "analysis.sensitivity=linear")
    raw["mixed"] |= {"budget": 4.0, "sensitivity": "somewhere"}
    monkeypatch.setattr(identity.mixed, "identity", lambda *_: {})
    monkeypatch.setattr(identity.data, "identity", lambda *_: "text")
    monkeypatch.setattr(identity, "device_of", str)
    return build_run(raw)


def test_a_field_changes_the_run_id_if_it_decides_and_only_then(everything: RunConfig) -> None:
    base = identity.run_id(everything, WEIGHTS)
    changes = 0
    for key, item, changed in _changes(everything):
        assert (identity.run_id(changed, WEIGHTS) != base) == (decides(item) is not Decides.NEVER), key
        changes += 1
    assert changes > 40


def _changes(cfg: RunConfig) -> Iterator[tuple[str, dataclasses.Field[Any], RunConfig]]:
    """For each field of a configuration class: its key, the field, and a configuration with another value for it."""
    for item in dataclasses.fields(cfg):
        value = getattr(cfg, item.name)
        if type(value) in CLASSES:
            for inner in dataclasses.fields(value):
                key = f"{item.name}.{inner.name}"
                part = _replaced(value, inner.name, OTHER[key] if key in OTHER else _other(getattr(value, inner.name)))
                yield key, inner, _replaced(cfg, item.name, part)
        elif item.name not in ("steps", "scheme"):  # not configuration classes; another test changes them
            yield item.name, item, _replaced(cfg, item.name, OTHER[item.name] if item.name in OTHER else _other(value))


def _replaced(config: Any, name: str, value: Any) -> Any:
    """A copy with another value for a field, without the checks of its class."""
    copied = object.__new__(type(config))
    for item in dataclasses.fields(config):
        object.__setattr__(copied, item.name, getattr(config, item.name))
    object.__setattr__(copied, name, value)
    return copied


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


def test_the_default_of_a_later_field_leaves_the_run_id_unchanged(everything: RunConfig) -> None:
    conditions = identity._conditions(everything)
    assert "bos" not in identity._deciding(everything.data, conditions)
    changed = dataclasses.replace(everything.data, bos="never")
    assert identity._deciding(changed, conditions)["bos"] == "never"


@pytest.mark.parametrize("kv", ["kv4_token", "kivi4", "nvfp4"])
def test_a_cache_that_is_not_rotated_keeps_its_run_id(kv: str) -> None:
    base = build_run(resolve(*TINY, f"kv={kv}"))
    assert base.kv is not None
    assert "rotated" not in identity._deciding(base.kv, identity._conditions(base))["key"]
    for part in ("key", "value"):
        changed = build_run(resolve(*TINY, f"kv={kv}", f"kv.{part}.rotated=true"))
        assert identity.run_id(changed, WEIGHTS) != identity.run_id(base, WEIGHTS)


@pytest.mark.parametrize(
    "override", ["method.gptq.damp=0.5", "method=rtn", "scheme.weight.symmetric=true", "bits=5", "+seed=3"]
)
def test_method_and_scheme_change_the_run_id(override: str) -> None:
    base = build_run(resolve(*TINY, "method=gptq"))
    changed = build_run(resolve(*TINY, "method=gptq", override.removeprefix("+")))
    assert identity.run_id(base, WEIGHTS) != identity.run_id(changed, WEIGHTS)


def test_the_code_of_a_run_includes_the_property_that_says_which_targets_are_scored(tiny: Tiny) -> None:
    cfg = build_run(tiny("data.protocol=strided", "data.stride=8"))
    files = [module.file for module in _closure(Sources((ROOT,)), cfg).values()]
    assert any("def unscored" in file.read_text() for file in files)


class _Opened:
    """Replaces an opened model."""

    fingerprint = "weights"


WEIGHTS: Any = _Opened()
CACHE = ("kv=kv8_token", "kv.key.group_size=16", "kv.value.group_size=16")
CASES = {
    "float": ["method=none"],
    "gptq": ["method=gptq", "scheme=group32"],
    "composite": ["method=smoothquant_gptq", "scheme=w8a8_static", *CACHE],
    "aqlm": ["method=aqlm", "scheme=none"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source code; a test that changes it must restore it."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("harness", "methods"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_code_changes_with_every_module_that_it_reaches(case: str, tree: Path) -> None:
    cfg = build_run(resolve(*TINY, *CASES[case]))
    base = _code(tree, cfg)
    closure = _closure(Sources((tree,)), cfg)
    modules = {name: module for name, module in closure.items() if module.digest}  # without modules that only import
    assert len(modules) > 30
    for name, module in modules.items():
        with _edited(module.file, _mutated(module.file)):
            assert _code(tree, cfg) != base, name
    assert _code(tree, cfg) == base


def test_code_ignores_changes_that_compute_nothing(tree: Path) -> None:
    cfg = build_run(resolve(*TINY, *CASES["gptq"]))
    base = _code(tree, cfg)
    for name, module in _closure(Sources((tree,)), cfg).items():
        with _edited(module.file, _silently(module.file)):
            assert _code(tree, cfg) == base, name


def test_code_ignores_modules_that_it_does_not_reach(tree: Path) -> None:
    cfg = build_run(resolve(*TINY, *CASES["gptq"]))
    base, reached = _code(tree, cfg), {module.file for module in _closure(Sources((tree,)), cfg).values()}
    others = [file for file in sorted(tree.rglob("*.py")) if file not in reached]
    assert {"awq.py", "hqq.py", "frame.py", "kmeans.py"} <= {file.name for file in others}
    for file in others:
        text = file.read_text()
        with _edited(file, text + "\nADDED = 1\n"):
            assert _code(tree, cfg) == base, file


def test_a_moved_module_keeps_the_code(tree: Path) -> None:
    cfg = build_run(resolve(*TINY, *CASES["gptq"]))
    base = _code(tree, cfg)
    module = next(module for name, module in _closure(Sources((tree,)), cfg).items() if name.endswith(".damping"))
    package, _, stem = module.name.rpartition(".")
    module.file.rename(module.file.with_name("elsewhere.py"))
    importers = [file for file in tree.rglob("*.py") if f"{package}.{stem}" in file.read_text()]
    before = {file: file.read_text() for file in importers}
    try:
        for file, text in before.items():
            file.write_text(text.replace(f"{package}.{stem}", f"{package}.elsewhere"))
        assert _code(tree, cfg) == base
    finally:
        module.file.with_name("elsewhere.py").rename(module.file)
        for file, text in before.items():
            file.write_text(text)


def test_code_includes_cpp_sources_without_their_comments(tmp_path: Path) -> None:
    (tmp_path / "root.py").write_text("import kernel\n")
    (tmp_path / "kernel.py").write_text("built = 1\n")
    native = tmp_path / "dot.cpp"
    digests = []
    for text in (
        "int a = 1; // one\n",
        "/* another */ int a =\n 1;",
        "int a = 2; // one\n",
        'auto a = "//1";',
        'auto a = "//2";',
    ):
        native.write_text(text)
        digests.append(Sources((tmp_path,)).digest(["root"]))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_name_imported_from_a_package_is_followed_to_its_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("from package.one import first\nfrom .two import second as other\n")
    (tmp_path / "package/one.py").write_text("first = 1\n")
    (tmp_path / "package/two.py").write_text("second = 2\n")
    for line, expected in (("from package import first", "one"), ("from package import other", "two")):
        (tmp_path / "root.py").write_text(line + "\n")
        assert set(Sources((tmp_path,)).closure(["root"])) == {"root", f"package.{expected}"}


def test_kernels_of_another_device_are_not_reached() -> None:
    cfg = build_run(resolve(*TINY, *CASES["gptq"]))
    sources = Sources((ROOT,))
    on_cpu, on_gpu = (sources.closure(identity.roots(cfg, device), identity.unused(cfg)) for device in ("cpu", "cuda"))
    assert any(name.startswith("harness.kernels.triton.") for name in on_gpu)
    assert not any(name.startswith("harness.kernels.triton.") for name in on_cpu)
    assert "harness.kernels.cpu_int4" in on_cpu.keys() - on_gpu.keys()


@pytest.mark.parametrize("case", CASES)
def test_every_module_that_runs_is_reached(case: str, tiny: Tiny, tmp_path: Path) -> None:
    """A profiler sees no module of the project execute that is not part of the code of the run."""
    raw = tiny(*CASES[case], "measure=quick", "measure.prompt_len=8", "measure.repeats=1", "measure.decode_tokens=2")
    cfg = build_run(raw)
    files = {str(module.file) for module in _closure(Sources((ROOT,)), cfg).values()}
    executed: set[str] = set()

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            executed.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        identity.run.run(cfg, models.open(cfg.model, cfg.seed), Record("profiled", config=raw))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    executed = {file for file in executed if file.startswith((f"{ROOT}/harness/", f"{ROOT}/methods/"))}
    assert len(executed) > 15
    assert executed <= files


def test_a_finished_run_of_other_code_is_repeated_and_confirmed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny("bits=3", "measure=quick", "measure.prompt_len=8", "measure.repeats=2")
    first, _ = execute_run(raw)
    monkeypatch.setattr(identity, "code", lambda *_: "other")
    unchanged, skipped = execute_run(raw | {"stale": "keep"})
    assert skipped
    assert unchanged == first
    again, skipped = execute_run(raw)
    assert not skipped
    assert again.code == "other" != first.code
    assert again.metrics == first.metrics, "timings included"
    assert read(path_of(tmp_path, first.run_id)) == again
    assert execute_run(raw)[1], "confirmed once"


def test_a_run_whose_result_other_code_changes_says_which_metric(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny("bits=3")
    first, _ = execute_run(raw)
    first.metrics["nll"] += 0.5
    first.code = "earlier"
    write(first, tmp_path)
    again, skipped = execute_run(raw)
    assert not skipped
    assert again.metrics["nll"] == pytest.approx(first.metrics["nll"] - 0.5)
    (warning,) = [text for text in again.warnings if "code has changed" in text]
    assert f"nll {first.metrics['nll']:.6g} -> {again.metrics['nll']:.6g}" in warning
    assert "perplexity" not in warning


def _closure(sources: Sources, cfg: RunConfig) -> dict[str, Any]:
    return sources.closure(identity.roots(cfg, "cpu"), identity.unused(cfg))


def _code(tree: Path, cfg: RunConfig) -> str:
    return Sources((tree,)).digest(identity.roots(cfg, "cpu"), identity.unused(cfg))


class _edited:  # noqa: N801 - reads as a verb
    """A file with another text; at the end it is restored."""

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text

    def __enter__(self) -> None:
        self.before = self.file.read_text()
        assert self.text != self.before, self.file
        self.file.write_text(self.text)

    def __exit__(self, *_: object) -> None:
        self.file.write_text(self.before)


def _mutated(file: Path) -> str:
    """The text of a module with one constant, result or condition changed."""
    text = file.read_text()
    tree = ast.parse(text)
    silent = {id(node) for parent in ast.walk(tree) for node in _silent_parts(parent)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in silent]
    numbers = [node for node in nodes if type(node.value) in (int, float)]
    results = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    conditions = [node.test for node in ast.walk(tree) if isinstance(node, ast.If)]
    node = [*numbers, *nodes, *results, *conditions][0]
    lines = text.splitlines(keepends=True)
    start = sum(len(line.encode()) for line in lines[: node.lineno - 1]) + node.col_offset
    stop = sum(len(line.encode()) for line in lines[: (node.end_lineno or 0) - 1]) + (node.end_col_offset or 0)
    source = text.encode()
    return (source[:start] + b"(12345)" + source[stop:]).decode()


def _silent_parts(parent: ast.AST) -> Iterator[ast.AST]:
    """Nodes that must not be changed: docstrings, annotations, and parts of f-strings."""
    if isinstance(parent, ast.Expr) and isinstance(parent.value, ast.Constant):
        yield parent.value
    for part in (getattr(parent, "annotation", None), getattr(parent, "returns", None)):
        yield from ast.walk(part) if part is not None else ()
    if isinstance(parent, ast.JoinedStr):
        yield from ast.walk(parent)


def _silently(file: Path) -> str:
    """The text of a module with another docstring, comments, an annotation, and its imports in another order."""
    lines = file.read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    docstring = tree.body[0]
    imports = [
        node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import) and node.lineno == node.end_lineno
    ]
    imports = [node for node in imports if getattr(node, "module", "") != "__future__"]
    if len(imports) > 1:
        first, last = imports[0].lineno - 1, imports[-1].lineno - 1
        lines[first], lines[last] = lines[last], lines[first]
    lines[docstring.lineno - 1 : docstring.end_lineno] = ['"""Another docstring."""', "# a comment"]
    return "\n".join([*lines, "", "# the end"]) + "\n"
