"""Evaluation: figures against independent formulas, names that do no harm, files that read back."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from fieldmark.errors import RunError
from fieldmark.inference.evaluation import format_scores, save_scores, score

CLASSES = ("2", "10", "great, tit", "$x$\n")


@pytest.fixture
def judged():
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, size=57)]).astype(np.int64)  # class 3 has no photo
    probabilities = rng.dirichlet(np.ones(4), size=60).astype(np.float32)
    return probabilities, labels, score(probabilities, labels, CLASSES, np.full(4, 0.25), split="val")


def test_the_class_table_agrees_with_scikit_learn(judged):
    probabilities, labels, scores = judged
    predicted = probabilities.argmax(axis=1)
    recall = sklearn_metrics.recall_score(labels, predicted, labels=range(3), average=None)
    precision = sklearn_metrics.precision_score(labels, predicted, labels=range(3), average=None)
    assert [row.recall for row in scores.classes[:3]] == pytest.approx(recall)
    assert [row.precision for row in scores.classes[:3]] == pytest.approx(precision)
    assert np.array_equal(scores.confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4)))
    assert scores.metrics["top1"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))


def test_every_interval_holds_its_value_and_matches_wilson_by_statsmodels(judged):
    from statsmodels.stats.proportion import proportion_confint

    *_, scores = judged
    for row in scores.classes[:3]:
        low, high = proportion_confint(row.right, row.photos, method="wilson")
        assert (row.recall_low, row.recall_high) == pytest.approx((low, high))
        assert row.recall_low <= row.recall <= row.recall_high
    assert scores.top1_low < scores.metrics["top1"] < scores.top1_high


def test_a_class_without_photos_keeps_its_place_and_has_no_recall(judged):
    *_, scores = judged
    row = scores.classes[3]
    assert (row.name, row.photos) == ("$x$\n", 0)
    assert np.isnan(row.recall)
    assert scores.as_dict()["classes"][3]["recall"] is None
    assert "without a photo here: $x$" in format_scores(scores)


def test_taken_for_is_the_largest_off_diagonal():
    labels = np.array([0, 0, 0, 0, 0, 1, 2], np.int64)
    predicted = np.array([0, 0, 0, 2, 2, 1, 2])  # class 0: three right, two taken for class 2
    scores = score(np.eye(4, dtype=np.float32)[predicted], labels, CLASSES, np.full(4, 0.25), split="val")
    assert [(row.taken_for, row.taken_for_photos) for row in scores.classes[:2]] == [("great, tit", 2), ("", 0)]


def test_the_files_read_back_and_hold_the_names_unharmed(judged, tmp_path):
    *_, scores = judged
    paths = save_scores(scores, tmp_path / "new" / "folder")
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


def test_top5_is_not_told_where_it_says_nothing(judged):
    *_, scores = judged
    assert "top-5" not in format_scores(scores)


def test_photos_without_labels_cannot_be_evaluated():
    with pytest.raises(RunError, match=r"'test' cannot be evaluated: 1 of its 2 photos have no label"):
        score(np.full((2, 2), 0.5, np.float32), np.array([0, -1]), ("a", "b"), np.full(2, 0.5), split="test")
