"""A run folder answers or says in one sentence which of its files is wrong."""

from __future__ import annotations

import pytest

from fieldmark.errors import RunError
from fieldmark.runs.folder import Run

READERS = {
    "classes.json": lambda run: run.classes,
    "model.json": lambda run: run.model_info["create"],
    "data.json": lambda run: run.data_info["prior"],
    "summary.json": lambda run: run.summary["status"],
    "environment.json": lambda run: run.environment["versions"],
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "7", '"x"', "[1]", "[" * 100_000])
def test_a_file_of_another_kind_is_named_in_one_sentence(make_run, name, content):
    path = make_run("run")
    (path / name).write_text(content)
    with pytest.raises(RunError, match=name) as caught:
        READERS[name](Run(path))
    assert "\n" not in str(caught.value)


def test_a_run_without_validation_does_not_send_to_evaluate(make_run):
    path = make_run("run", overrides=["data.train_on=train+val", "train.select=last"])
    (path / "predictions" / "val.parquet").unlink()
    with pytest.raises(RunError, match="leaves no validation photos"):
        Run(path).predictions()
