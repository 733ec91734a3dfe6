"""Two models of one name in one table are told apart, and never taken for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from harness.records import Record
from harness.reports import label, mean_over_seeds, to_frame
from harness.reports.match import match
from harness.reports.names import told_apart
from harness.reports.table import to_markdown
from tests.reports.test_table import make


def of(
    run_id: str, fingerprint: str | None, *, path: str | None = None, name: str = "my_llama", **model: Any
) -> Record:
    """A finished run of the model `name`, from a folder if it has a `path`."""
    record = make(run_id, 10.0)
    record.config["model"] = {"name": name, "path": path} | model
    record.model = replace(record.model, name=name, fingerprint=fingerprint)
    return record


def names(*records: Record) -> list[str | None]:
    return [record.model.name for record in told_apart(records)]


def test_folders_get_as_many_parents_as_tell_them_apart() -> None:
    assert names(of("1", "f1", path="/x/a/my_llama"), of("2", "f2", path="/x/b/my_llama/")) == [
        "a/my_llama",
        "b/my_llama",
    ]
    deep = of("1", "f1", path="/a/c/my_llama"), of("2", "f2", path="/b/c/my_llama"), of("3", "f3", path="d/my_llama")
    assert names(*deep) == ["a/c/my_llama", "b/c/my_llama", "d/my_llama"]
    named = of("1", "f1", path="/a/m", name="mine"), of("2", "f2", path="/b/m", name="mine")
    assert names(*named) == ["mine (a/m)", "mine (b/m)"]


def test_one_model_and_random_models_keep_their_name() -> None:
    assert names(of("1", "f1", path="/x/my_llama"), of("2", "f1", path="copy/my_llama")) == ["my_llama"] * 2
    shape = {"architecture": {"model_type": "llama"}}
    assert names(of("1", "f1", **shape), of("2", "f2", **shape)) == ["my_llama"] * 2


def test_changed_weights_of_one_folder_get_their_fingerprint() -> None:
    found = of("1", "f1234567", path="/x/my_llama"), of("2", "f1239999", path="/x/my_llama")
    assert names(*found) == ["my_llama f1234", "my_llama f1239"]
    hub = of("1", "aaaa1", id="org/my_llama"), of("2", "bbbb1", id="org/my_llama")
    assert names(*hub) == ["my_llama aaaa", "my_llama bbbb"]


def test_a_run_that_failed_before_its_weights_were_known_has_the_name_of_its_folder() -> None:
    found = of("1", "f1", path="/a/my_llama"), of("2", "f2", path="/b/my_llama"), of("3", None, path="/b/my_llama")
    assert names(*found) == ["a/my_llama", "b/my_llama", "b/my_llama"]
    assert names(*found[:2], of("4", None))[2] == "my_llama"


def test_two_models_are_two_rows_and_no_pair() -> None:
    one, other = of("1", "f1", path="/x/a/my_llama"), of("2", "f2", path="/x/b/my_llama")
    frame = to_frame([one, other])
    assert list(frame["model"]) == ["a/my_llama", "b/my_llama"]
    assert "| a/my_llama |" in to_markdown(frame)
    assert "model my_llama" not in to_markdown(frame)
    assert len(mean_over_seeds([one, other])) == 2
    pairs, alone = match([one], [other], ("old", "new"))
    assert (pairs, len(alone)) == ([], 2)
    assert [label(record).split()[0] for record in told_apart([one, other])] == ["a/my_llama", "b/my_llama"]
    assert frame["rank_low"].isna().all() or list(frame["rank_low"]) == [1, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_few_records_are_unchanged(count: int) -> None:
    records = [of(str(i), "f1", path="/x/my_llama") for i in range(count)]
    assert told_apart(records) == records
