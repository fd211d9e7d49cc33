"""A run folder answers or says in one sentence which of its files is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fieldmark.errors import RunError
from fieldmark.runs.folder import Run, RunResults

MODEL = {
    "create": {"name": "test_resnet", "num_classes": 3},
    "eval": {
        "transform": "weights",
        "size": 32,
        "crop_fraction": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    },
    "precision": "32-true",
    "channels_last": True,
    "parameters": 10,
    "weights": {"source": "x"},
}

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


MUTANTS = [None, True, 7, -1, float("nan"), "x", [], [1], {}, {"a": 1}]


def _mutate(content):
    """Every value of nested objects, and each first item of a list, as something else; and every key left out."""
    for key in list(content) if isinstance(content, dict) else range(min(len(content), 1)):
        for other in MUTANTS:
            yield _changed(content, key, other)
        if isinstance(content, dict):
            yield {name: value for name, value in content.items() if name != key}
        if isinstance(content[key], dict | list):
            for inner in _mutate(content[key]):
                yield _changed(content, key, inner)


def _changed(content, key, value):
    copy = content.copy()
    copy[key] = value
    return copy


def _read_all(path):
    run = Run(path)
    return run.classes, run.prior, run.summary, run.environment, run.eval_spec(), run.metrics, run.predictions()


@pytest.mark.parametrize("name", ["classes.json", "model.json", "data.json", "summary.json", "environment.json"])
def test_no_value_of_any_file_ends_in_anything_but_one_sentence(make_run, name):
    path = make_run("run")
    (path / "model.json").write_text(json.dumps(MODEL))
    _read_all(path)
    content = json.loads((path / name).read_text())
    refusals = []
    for mutant in _mutate(content):
        (path / name).write_text(json.dumps(mutant))
        try:
            _read_all(path)
        except RunError as error:
            refusals.append(str(error))
    assert len(refusals) > 5
    assert not any("\n" in refusal for refusal in refusals)
    # Other classes may be well formed, and not fit the predictions.
    assert all(name in refusal or (name == "classes.json" and "val.parquet" in refusal) for refusal in refusals)


def test_a_pooling_that_no_version_has_is_named(make_run):
    path = make_run("run")
    (path / "model.json").write_text(json.dumps({**MODEL, "create": {**MODEL["create"], "pool": "maximum"}}))
    with pytest.raises(RunError, match=r"model.json has create.pool = 'maximum': Input should be 'average' or 'cov"):
        _ = Run(path).model_info


@pytest.mark.parametrize(("key", "value"), [("status", "done"), ("epochs", "many"), ("val", [])])
def test_a_value_of_another_kind_is_named_with_its_key_and_what_was_expected(make_run, key, value):
    path = make_run("run")
    (path / "summary.json").write_text(json.dumps({"status": "finished", key: value}))
    with pytest.raises(RunError, match=rf"summary.json has {key} = .*: Input should be .*it is damaged, or another"):
        _ = Run(path).summary


@pytest.mark.parametrize("content", [b"", b"PK garbage", b"x" * 1000])
@pytest.mark.parametrize("name", ["predictions/val.parquet", "predictions/val_epochs.npz"])
def test_garbage_among_the_predictions_is_named_in_one_sentence(make_run, name, content):
    path = make_run("run", keep_epochs=True)
    assert RunResults(path, split="val").epoch_predictions is not None
    (path / name).write_bytes(content)
    with pytest.raises(RunError, match=name) as caught:
        RunResults(path, split="val")
    assert "\n" not in str(caught.value)


def test_epochs_of_other_photos_are_refused(make_run):
    path = make_run("run", keep_epochs=True)
    np.savez_compressed(path / "predictions/val_epochs.npz", predicted=np.zeros((2, 3), int))
    with pytest.raises(RunError, match=r"predictions of shape \(2, 3\), not of"):
        RunResults(path, split="val")


@pytest.mark.parametrize("line", ["{", "[]", '{"epoch": "x", "val": {}}', '{"epoch": 1, "val": {"top1": "x"}}', "{}"])
def test_an_epoch_that_is_none_is_named_in_one_sentence(make_run, line):
    path = make_run("run")
    (path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        _ = Run(path).metrics


def test_a_run_shows_its_result_and_its_confusions_in_a_notebook(make_run):
    path = make_run("<one>")
    summary = json.loads((path / "summary.json").read_text())
    summary["val"]["top1_interval"] = [0.7, 0.9]
    (path / "summary.json").write_text(json.dumps(summary))
    run = Run(path)
    result = f"finished, 4 classes, validation top-1 {summary['val']['top1']:.4f}, 95 % interval 0.7000 to 0.9000)"
    assert repr(run) == f"Run({str(path)!r}, {result}"
    page = run._repr_html_()
    assert page.count("<svg") == 1
    assert "&lt;one&gt;" in page
    assert "auk → auk: " in page
    (path / "predictions/val.parquet").unlink()
    (path / "classes.json").write_text("{")
    (path / "metrics.jsonl").write_text("{\n")
    assert repr(Run(path)) == f"Run({str(path)!r}, finished)"
    assert "<svg" not in Run(path)._repr_html_()
