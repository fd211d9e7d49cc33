"""Evaluation: figures against independent formulas, names that do no harm, files that read back."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from fieldmark.errors import ResourceError, RunError
from fieldmark.inference.evaluation import make_output_folder, save_evaluation, score_predictions
from fieldmark.runs.folder import PhotoPredictions

CLASSES = ("2", "10", "great, tit", "$x$\n")


def score(probabilities, labels, classes=CLASSES, split="val"):
    paths = tuple(f"{number}.jpg" for number in range(len(labels)))
    run = SimpleNamespace(classes=classes, prior=np.full(len(classes), 1 / len(classes)))
    return score_predictions(run, PhotoPredictions(paths, labels, probabilities), split)


@pytest.fixture
def evaluated():
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, size=57)]).astype(np.int64)  # class 3 has no photo
    probabilities = rng.dirichlet(np.ones(4), size=60).astype(np.float32)
    return probabilities, labels, score(probabilities, labels)


def test_the_class_table_agrees_with_scikit_learn(evaluated):
    probabilities, labels, scores = evaluated
    predicted = probabilities.argmax(axis=1)
    recall = sklearn_metrics.recall_score(labels, predicted, labels=range(3), average=None)
    precision = sklearn_metrics.precision_score(labels, predicted, labels=range(3), average=None)
    assert [row.recall for row in scores.score_classes()[:3]] == pytest.approx(recall)
    assert [row.precision for row in scores.score_classes()[:3]] == pytest.approx(precision)
    assert np.array_equal(scores.confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4)))
    assert scores.metrics["top1"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))


def test_every_interval_holds_its_value_and_matches_wilson_by_statsmodels(evaluated):
    from statsmodels.stats.proportion import proportion_confint

    *_, scores = evaluated
    for row in scores.score_classes()[:3]:
        low, high = proportion_confint(row.right, row.photos, method="wilson")
        assert (row.recall_low, row.recall_high) == pytest.approx((low, high))
        assert row.recall_low <= row.recall <= row.recall_high
    low, high = scores.top1_interval
    assert low < scores.metrics["top1"] < high


def test_a_class_without_photos_keeps_its_place_and_has_no_recall(evaluated):
    *_, scores = evaluated
    row = scores.score_classes()[3]
    assert (row.name, row.photos) == ("$x$\n", 0)
    assert np.isnan(row.recall)
    assert scores.as_dict()["classes"][3]["recall"] is None
    assert "without a photo here: $x$" in repr(scores)


def test_taken_for_is_the_largest_off_diagonal():
    labels = np.array([0, 0, 0, 0, 0, 1, 2], np.int64)
    predicted = np.array([0, 0, 0, 2, 2, 1, 2])  # class 0: three right, two taken for class 2
    scores = score(np.eye(4, dtype=np.float32)[predicted], labels)
    assert [(row.taken_for, row.taken_for_photos) for row in scores.score_classes()[:2]] == [("great, tit", 2), ("", 0)]


def test_the_files_read_back_and_hold_the_names_unharmed(evaluated, tmp_path):
    *_, scores = evaluated
    paths = save_evaluation(scores, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["evaluation.json", "classes.csv", "confusion.csv", "confusion.png"]
    assert json.loads(paths[0].read_text())["confusion"] == scores.confusion.tolist()
    with paths[1].open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(CLASSES)
    with paths[2].open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list(CLASSES)
    assert np.array_equal(np.array([row[1:] for row in rows], int), scores.confusion)
    with Image.open(paths[3]) as image:
        assert image.width > 400


def test_top5_is_not_told_where_it_says_nothing(evaluated):
    *_, scores = evaluated
    assert "top-5" not in repr(scores)


def test_predictions_that_are_not_finite_are_refused_in_one_sentence():
    with pytest.raises(RunError, match=r"predictions of 1 of its 2 photos are not finite, so the weights"):
        score(np.array([[0.5, 0.5], [np.nan, np.nan]], np.float32), np.array([0, 1]), ("a", "b"))


def test_a_file_where_the_folder_should_be_is_named(evaluated, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ResourceError, match=r"file.* cannot be made: .*Give another folder as --out"):
            make_output_folder(path)
        with pytest.raises(ResourceError, match=r"Give another folder as --out"):
            save_evaluation(evaluated[2], path)
    assert (tmp_path / "file").read_text() == "mine"
