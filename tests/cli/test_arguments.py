"""The command line as a newcomer types it: flags anywhere, help everywhere, one line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.cli.arguments import ordered
from harness.cli.commands import COMMANDS, TABLE, options_of
from harness.cli.completion import words_of
from harness.reports import FORMATS
from harness.utils.errors import LIMIT, Refusal
from tests.conftest import ROOT, TINY

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bits=3", "-m", "seed=1"], ["-m", "bits=3", "seed=1"]),
        (["--config-dir", "conf", "bits=3", "--multirun"], ["--config-dir=conf", "--multirun", "bits=3"]),
        (["bits=3", "--cfg", "job", "seed=1"], ["--cfg=job", "bits=3", "seed=1"]),
        (["bits=3", "-c", "job", "-p", "data"], ["--cfg=job", "--package=data", "bits=3"]),
        (["bits=3", "-cd", "a=b"], ["--config-dir=a=b", "bits=3"]),
        (["--info", "bits=3"], ["--info=all", "bits=3"]),
        (["~skip", "--help"], ["--help", "~skip"]),
    ],
)
def test_flags_stand_anywhere(words: list[str], expected: list[str]) -> None:
    assert ordered(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--multrun"], "--multrun is an unknown flag; did you mean --multirun?"),
        (["--bits=3"], "--bits=3 is an unknown flag; expected bits=3, without -"),
        (["bits=3", "--cfg"], "--cfg has no value; expected --cfg=job|hydra|all"),
        (["--cfg=jib"], "--cfg=jib is unknown; did you mean job?"),
        (["--multirun=3"], "--multirun=3: --multirun has no value; expected --multirun"),
        (["tabel"], "tabel is neither a command nor KEY=VALUE; did you mean table?"),
        (["runs=x", "table"], "table is a command, which is the first word: python -m harness table"),
        (["=3"], "=3 has no key; expected KEY=VALUE, without spaces around ="),
        (["method=null"], "method=null is no name; expected one of: any4"),
        (["model.path=~/models/llama"], 'a quoted ~ is no folder; expected model.path="$HOME/models/llama"'),
        (["model.path=/data/modèle"], "\"model.path='/data/modèle'\""),
        (["model.path=/data/run(2)"], "\"model.path='/data/run(2)'\""),
        (["model.path=/ckpt/epoch=3"], "\"model.path='/ckpt/epoch=3'\""),
        (["bits=3,4"], "bits=3,4 has several values: add -m to run each of them, or write 'bits=[3,4]' for a list"),
        (["bits=range(2,4)"], "bits=range(2,4) has several values: add -m"),
        (["+bits=3"], "+bits exists already; expected bits=VALUE, without +"),
        (["~bit"], "~bit is an unknown key"),
        (["method.damp=1", "method=gptq"], "method.damp=1 is an unknown key; did you mean method.gptq.damp?"),
        (["gptq.damp=1", "method=gptq"], "gptq.damp=1 is an unknown key; did you mean method.gptq.damp?"),
        (["method.gptq.damp=1"], "did you mean method.gptq.damp (with method=gptq)?"),
        (["bits=${bit}"], "is no key of the configuration"),
        (["-cn", "nothing"], "--config-name=nothing is no file of the configuration"),
        (["-cd", "/nowhere"], "--config-dir=/nowhere is no folder"),
        (["bits", "=", "3"], "bits = has a space; expected bits=VALUE, without spaces around ="),
        (["model={a:1}"], "model={a:1} is no name; expected one of: "),
        (["model@x=tiny"], "model@x is an unknown axis; did you mean model?"),
        (["model.path=/nowhere/model"], "model.path=/nowhere/model has no config.json; expected a transformers folder"),
        (["hydra/launcher=workerz"], "hydra/launcher=workerz is unknown; did you mean workers?"),
        (["skip.a=3"], "skip.a=3: skip is a list, set as a whole; expected 'skip=[3]'"),
        (["+skip.a=3"], "+skip.a=3: skip is a list, set as a whole; expected 'skip=[3]'"),
        (["skip.a.b=3"], "skip.a.b=3: skip is a list, set as a whole; expected 'skip=[3]'"),
        (["skip.0=*.head"], "skip.0=*.head: skip is a list, set as a whole; expected 'skip=[*.head]'"),
        (["seed=1", "~skip.a"], "~skip.a: skip is a list, set as a whole; expected 'skip=[VALUE]'"),
        (["bits=3", "analysis.outliers.a=[x,y]"], "a list, set as a whole; expected 'analysis.outliers=[x,y]'"),
        (["skip.a=3,4", "-m"], "skip.a=3: skip is a list, set as a whole; expected 'skip=[3]'"),
        (["bits=nine"], "scheme.weight.bits='nine' has type str; expected int"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, command: Command
) -> None:
    done = command(*words, *(["results_dir=" + str(tmp_path / "new")] if "=" in words[0] else []))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) <= LIMIT + len("error: \n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["runs=x", "--help"]])
def test_every_command_has_help(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([name, *words], [*words[-1:], name, *words[:-1]]):
        assert main(line) == 0
        text = capsys.readouterr().out
        for key, option in COMMANDS[name].options.items():
            assert f"\n  {key}={'|'.join(option.choices)}" in text
            assert f"(default: {option.default})" in " ".join(text.split()) or not option.default


def test_the_options_of_a_table_name_all_formats() -> None:
    assert tuple(TABLE.options["format"].choices) == FORMATS


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("frmat=csv", "frmat=csv is unknown; did you mean format?"),
        ("--format=csv", "--format=csv is no flag; expected format=csv"),
        ("csv", "csv is unknown; did you mean format=csv?"),
        ("output=", "output= has no value; expected output=VALUE"),
        ("format=cvs", "format=cvs is unknown; did you mean csv?"),
    ],
)
def test_mistaken_options_suggest_the_right_one(argument: str, message: str) -> None:
    with pytest.raises(Refusal) as error:
        options_of(TABLE, [argument])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["table", "report"])
def test_a_file_in_a_missing_folder_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, f"runs={ROOT}/results/reference", "output=/nowhere/x.html"]) == 1
    assert capsys.readouterr().err == (
        "error: output=/nowhere/x.html: folder /nowhere does not exist; create it, or name another\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ptqbench table ru", ["runs="]),
        ("ptqbench table format=", ["format=md", "format=csv", "format=parquet", "format=latex"]),
        ("python -m harness report o", ["output="]),
        ("ptqbench method=", None),
    ],
)
def test_completion_of_commands(line: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert words_of(["-sc", "query=bash"]) == expected


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("ptqbench method=gp", {"method=gptq"}),
        ("ptqbench bits=3 -m sch", {"scheme=", "scheme."}),
        ("ptqbench method=gptq method.gptq.d", {"method.gptq.damp="}),
        ("ptqbench ta", {"table"}),
    ],
)
def test_completion_in_a_shell(line: str, some: set[str]) -> None:
    script = "import sys; from harness.cli import main; sys.argv[0] = 'ptqbench'; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": line}
    done = subprocess.run(
        [sys.executable, "-c", script, "-sc", "query=bash"], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.stderr == ""
    assert some <= set(done.stdout.split())


def test_the_script_for_bash_completes_the_installed_command(command: Command) -> None:
    done = command("-sc", "install=bash")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion ptqbench")


@pytest.mark.parametrize("axis", ["bits=4,9", "data.seq_len=5000,6000", "data.sampling=first,rnadom"])
def test_a_sweep_that_is_refused_writes_nothing(axis: str, tmp_path: Path, command: Command) -> None:
    done = command("-m", *TINY, "measure=off", f"results_dir={tmp_path}/new/runs", axis, "isolate=false")
    assert done.returncode == 1
    assert "nothing was" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
