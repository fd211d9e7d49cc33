"""Laws of the hierarchical fallback: where the class is not sure, a group answers that is right as often as wanted."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from fieldmark.config import dump_config, load_config
from fieldmark.errors import RunError
from fieldmark.files import read_values
from fieldmark.inference.calibration import calibrate_run, fit_fallback, load_calibration
from fieldmark.inference.predictor import Prediction
from fieldmark.inference.taxonomy import Fallback, Taxonomy, describe_fallback
from fieldmark.runs.folder import Run, write_predictions

CLASSES = ("crow", "raven", "gull", "tern")
ROWS = [["crow", "Corvus"], ["raven", "Corvus"], ["gull", "Larus"], ["tern", "Sterna"]]
TREE = Taxonomy(("class", "genus"), ROWS)


def make_photos(count=1000):
    """Crows and ravens are often confused with each other, and some gulls with both; all else seldom."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, count)
    logits = rng.normal(0, 1, (count, 4)) + 6 * np.eye(4)[labels]
    is_crow = labels < 2
    logits[is_crow, 0] = logits[is_crow, 1] = 4
    logits[is_crow, :2] += rng.normal(0, 1, (is_crow.sum(), 2)) + np.eye(2)[labels[is_crow]]
    gulls = np.flatnonzero(is_crow)[:60]
    logits[gulls, 2] = rng.normal(3, 1, len(gulls))
    labels[gulls] = 2
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True), labels


def fitted(accuracy=0.95, confidence_level=0.0, threshold=0.9):
    probabilities, labels = make_photos()
    return fit_fallback(
        probabilities, labels, TREE, threshold=threshold, accuracy=accuracy, confidence_level=confidence_level
    ), probabilities


@pytest.mark.parametrize("confidence_level", [0.0, 0.9])
def test_answers_of_a_group_alone_are_as_often_right_as_wanted(confidence_level):
    found, probabilities = fitted(confidence_level=confidence_level)
    _, labels = make_photos()
    answers = [found.answer(row) for row in probabilities]
    groups = [place for place, answer in enumerate(answers) if answer.level == "genus"]
    right = [answers[place].name == ROWS[labels[place]][1] for place in groups]
    assert len(groups) > 100
    assert np.mean(right) >= 0.95
    assert found.scores[1].right == pytest.approx(np.mean(right))
    assert found.scores[1].answered == pytest.approx(len(groups) / 1000)
    # Where the class is sure, nothing coarser answers.
    assert all(
        (answer.level == "class") == (row.max() >= 0.9) for answer, row in zip(answers, probabilities, strict=True)
    )


def test_a_level_that_is_never_right_often_enough_is_not_used():
    probabilities, labels = make_photos()
    wrong = np.where(labels < 2, 2, 0)  # the label is of another genus than all that is seen
    found = fit_fallback(probabilities, wrong, TREE, threshold=0.9, accuracy=0.95, confidence_level=0.0)
    assert found.thresholds == (0.9, None)
    assert {found.answer(row).level for row in probabilities} == {"class", ""}
    assert "genus  is not used" in describe_fallback(found)


def test_where_every_class_is_sure_there_is_nothing_to_fit():
    found, _ = fitted(threshold=0.0)
    assert found.thresholds == (0.0, None)
    assert found.scores[0].answered == 1


def test_it_survives_json_and_says_what_is_missing():
    found, probabilities = fitted()
    stored = json.loads(json.dumps(asdict(found)))
    again = read_values(Fallback, stored)
    assert json.loads(json.dumps(asdict(again))) == stored
    assert [again.answer(row) for row in probabilities[:50]] == [found.answer(row) for row in probabilities[:50]]
    with pytest.raises(ValueError, match="lacks rows"):
        read_values(Fallback, {name: value for name, value in stored.items() if name != "rows"})


def test_a_prediction_answers_with_the_finest_name_that_is_sure():
    found, _ = fitted()
    row = np.array([0.5, 0.49, 0.005, 0.005], np.float32)
    unsure = Prediction("x.jpg", CLASSES, row, "", 0.9, found)
    assert (unsure.label, unsure.is_unknown) == ("crow", True)
    assert (unsure.answer.level, unsure.answer.name) == ("genus", "Corvus")
    assert unsure.answer.probability == pytest.approx(0.99)
    alone = Prediction("x.jpg", CLASSES, row, "", 0.9)
    assert (alone.answer.level, alone.answer.name) == ("", "")
    sure = Prediction("x.jpg", CLASSES, row, "", 0.4)
    assert (sure.answer.level, sure.answer.name) == ("class", "crow")
    broken = Prediction("x.jpg", CLASSES, row * np.nan, "is empty", 0.4, found)
    assert (broken.answer.level, broken.answer.name) == ("", "")


@pytest.fixture
def run(tmp_path):
    probabilities, labels = make_photos()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_config(load_config()))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    write_predictions(
        folder / "predictions" / "val.parquet",
        paths=[f"{number}.jpg" for number in range(len(labels))],
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        classes=CLASSES,
    )
    return Run(folder)


def test_a_run_keeps_it_with_its_calibration_until_it_is_calibrated_without(run, tmp_path):
    table = tmp_path / "taxonomy.csv"
    table.write_text("class,genus\n" + "".join(f"{','.join(row)}\n" for row in ROWS))
    wish = {"confidence_level": 0.0, "folds": 5, "seed": 0}
    found = calibrate_run(run, wanted="accuracy", wanted_value=0.95, taxonomy=table, **wish)
    groups = load_calibration(run).back_off
    assert groups.thresholds[0] == found.threshold
    assert groups.scores[0].answered == pytest.approx(found.coverage)
    assert groups.scores[1].right >= 0.95
    found = calibrate_run(run, wanted="coverage", wanted_value=0.5, taxonomy=table, **wish)
    assert load_calibration(run).back_off.scores[1].right >= found.accuracy
    calibrate_run(run, wanted="accuracy", wanted_value=0.95, **wish)
    assert load_calibration(run).back_off is None
    calibrate_run(run, wanted="none", wanted_value=1.0, taxonomy=table, **wish)
    assert load_calibration(run).back_off is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows", [["crow", "Corvus"]], "its taxonomy is not of the run's classes"),
        ("rows", [["crow"]] * 4, r"rows of other than 2 names \(class, genus\)"),
        ("thresholds", [0.9], "2 levels and 1 thresholds"),
        ("thresholds", [0.9, float("nan")], r"has back_off.thresholds.1 = nan"),
        ("thresholds", ["x", 0.5], r"has back_off.thresholds.0 = 'x'"),
        ("scores", [{"level": "class"}], r"lacks back_off.scores.0.answered"),
        ("levels", 3, r"has back_off.levels = 3"),
    ],
)
def test_a_stored_fallback_that_does_not_fit_the_model_is_refused(run, tmp_path, key, value, message):
    table = tmp_path / "taxonomy.csv"
    table.write_text("class,genus\n" + "".join(f"{','.join(row)}\n" for row in ROWS))
    found = calibrate_run(
        run, wanted="accuracy", wanted_value=0.95, taxonomy=table, confidence_level=0.0, folds=5, seed=0
    )
    values = asdict(found)
    values["back_off"][key] = value
    (run.path / "calibration.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=message):
        load_calibration(run)
