"""A run keeps its calibration, and everything after it uses it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fieldmark.errors import DataError, RunError
from fieldmark.inference.calibrate import calibrate_run, describe_calibration, load_calibration, save_calibration_figure
from fieldmark.inference.calibration import log_probabilities
from fieldmark.inference.taxonomy import taxonomy_scores
from fieldmark.runs.folder import Run, write_predictions


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, 3))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(400)[:, None] > shares.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    loud = np.exp(3 * logits)  # three times too sure
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text("")
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    write_predictions(
        folder / "predictions" / "val.parquet",
        paths=[f"{number}.jpg" for number in range(400)],
        labels=labels,
        probabilities=(loud / loud.sum(axis=1, keepdims=True)).astype(np.float32),
        classes=["a", "b", "c"],
    )
    return Run(folder)


def calibrated(run, **wish):
    wish = {"wanted": "none", "wanted_value": 1.0, **wish}
    return calibrate_run(run, **wish, assurance=0, folds=5, seed=0)


def test_a_run_that_is_three_times_too_sure_is_cooled_and_remembers_it(run):
    assert load_calibration(run) is None
    found = calibrated(run, wanted="accuracy", wanted_value=0.9)
    assert found.temperature == pytest.approx(3, rel=0.2)
    assert load_calibration(run) == found
    text = describe_calibration(found)
    assert f"{found.coverage:.1%} of the photos are answered" in text
    assert "wanted: accuracy 90.0%" in text
    assert save_calibration_figure(run, found).stat().st_size > 10_000


def test_without_a_wish_the_text_says_how_to_get_an_unknown(run):
    assert "ask for --accuracy or --coverage" in describe_calibration(calibrated(run))


def test_probabilities_that_underflow_stay_finite():
    assert np.isfinite(log_probabilities(np.array([[0, 1]], np.float32))).all()


def test_what_cannot_be_had_leaves_the_run_as_it_was(run):
    with pytest.raises(DataError, match=r"400 photos cannot show an accuracy of 99\.0%"):
        calibrate_run(run, wanted="accuracy", wanted_value=0.99, assurance=0.99, folds=5, seed=0)
    assert load_calibration(run) is None


def test_a_broken_calibration_says_what_to_do(run):
    (run.path / "calibration.json").write_text("{")
    with pytest.raises(RunError, match=r"is not JSON.*calibrate again"):
        load_calibration(run)


def test_taxonomy_scores_come_from_the_stored_predictions(run, tmp_path):
    table = tmp_path / "taxonomy.csv"
    table.write_text("class,genus\na,X\nb,X\nc,Y\n")
    scores = taxonomy_scores(run, table)
    assert scores["genus"] > scores["class"]
