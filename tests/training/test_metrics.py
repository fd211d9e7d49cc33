"""Figures agree with scikit-learn and statsmodels, and with formulas done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference
from statsmodels.stats.proportion import proportion_confint

from fieldmark.training import metrics
from fieldmark.training.evaluate import Predictions, softmax
from fieldmark.training.loop import NonFiniteError


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(7) * 0.5, size=400)
    labels = np.where(rng.random(400) < 0.6, probabilities.argmax(1), rng.integers(0, 7, 400))
    return probabilities, labels


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_agrees_with_scikit_learn(predictions, k):
    probabilities, labels = predictions
    assert metrics.top_k(probabilities, labels, k=k) == pytest.approx(
        reference.top_k_accuracy_score(labels, probabilities, k=k, labels=range(7))
    )


def test_of_equal_probabilities_the_first_class_counts_as_argmax_does():
    probabilities = np.full((2, 4), 0.25)
    assert metrics.top_k(probabilities, np.array([0, 1]), k=1) == 0.5


def test_macro_recall_is_balanced_accuracy(predictions):
    probabilities, labels = predictions
    expected = reference.balanced_accuracy_score(labels, probabilities.argmax(1))
    assert metrics.macro_recall(probabilities, labels) == pytest.approx(expected)


def test_macro_recall_leaves_out_classes_without_photos():
    probabilities = np.eye(3)[[0, 0, 1]]
    assert metrics.macro_recall(probabilities, np.array([0, 0, 1])) == 1.0


def test_log_loss_agrees_with_scikit_learn(predictions):
    probabilities, labels = predictions
    expected = reference.log_loss(labels, probabilities, labels=range(7))
    assert metrics.log_loss(probabilities, labels) == pytest.approx(expected)


def test_prior_top1_weighs_each_class_by_its_share_in_training():
    probabilities = np.eye(2)[[0, 0, 0, 1]]
    labels = np.array([0, 0, 1, 1])  # recall 1 for class 0, 1/2 for class 1
    assert metrics.prior_top1(probabilities, labels, np.array([0.9, 0.1])) == pytest.approx(0.95)


def test_prior_top1_with_the_own_shares_is_plain_accuracy(predictions):
    probabilities, labels = predictions
    shares = np.bincount(labels, minlength=7) / len(labels)
    assert metrics.prior_top1(probabilities, labels, shares) == pytest.approx(metrics.top_k(probabilities, labels, k=1))


def test_calibration_error_is_zero_where_confidence_is_accuracy_and_large_where_not():
    confident = np.tile([0.75, 0.25], (400, 1))
    right = np.array([0, 0, 0, 1] * 100)
    assert metrics.calibration_error(confident, right) == pytest.approx(0)
    assert metrics.calibration_error(confident, np.ones(400, int)) == pytest.approx(0.75)


def test_calibration_bins_have_the_edges_of_scikit_learns_calibration_curve():
    from sklearn.calibration import calibration_curve

    confidence = np.array([0.5, 0.6, 0.6, 0.7, 0.8, 0.81, 1.0, 1.0])
    is_right = np.array([0, 1, 0, 1, 1, 0, 1, 1], bool)
    accuracy, mean = calibration_curve(is_right, confidence, n_bins=5)
    counts = np.bincount(metrics.confidence_bins(confidence, bins=5), minlength=5)
    assert counts.tolist() == [0, 0, 3, 2, 3]
    expected = (counts[counts > 0] * np.abs(accuracy - mean)).sum() / len(confidence)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    assert metrics.calibration_error(probabilities, 1 - is_right, bins=5) == pytest.approx(expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_every_metric_survives_logits_that_are_not_finite(poison):
    logits = np.zeros((6, 3), np.float32)
    logits[2, 1] = poison
    labels = np.array([0, 1, 2, 0, 1, 2])
    found = metrics.summarize(softmax(logits), labels, np.full(3, 1 / 3))
    assert set(found) == {"top1", "top5", "macro_recall", "prior_top1", "log_loss", "calibration_error"}
    # One class alone at minus infinity still leaves probabilities; any other value leaves none.
    assert np.isfinite(found["calibration_error"]) == (poison == -np.inf)
    assert np.isfinite(found["log_loss"]) == (poison == -np.inf)


def test_outputs_that_are_not_finite_are_refused():
    logits = np.zeros((3, 2), np.float32)
    logits[1] = np.nan
    Predictions(np.arange(2), logits[[0, 2]]).require_finite(step=4)
    with pytest.raises(NonFiniteError, match="the output for 1 of 3 photos after update 4 is not finite"):
        Predictions(np.arange(3), logits).require_finite(step=4)


def test_confusion_matrix_agrees_with_scikit_learn(predictions):
    probabilities, labels = predictions
    own = metrics.confusion_matrix(probabilities.argmax(1), labels, num_classes=7)
    assert (own == reference.confusion_matrix(labels, probabilities.argmax(1), labels=range(7))).all()


@given(trials=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_agrees_with_statsmodels(trials, share):
    successes = round(trials * share)
    expected = proportion_confint(successes, trials, method="wilson")
    assert metrics.wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-12)


def test_the_competitions_headline_has_the_interval_that_it_should_have_stated():
    low, high = metrics.wilson_interval(272, 300)
    assert (round(low, 3), round(high, 3)) == (0.868, 0.935)


def test_better_means_strictly_better_and_knows_the_direction():
    assert metrics.is_better("top1", 0.5, None)
    assert metrics.is_better("top1", 0.6, 0.5)
    assert not metrics.is_better("top1", 0.5, 0.5)
    assert not metrics.is_better("top1", math.nan, 0.1)
    assert metrics.is_better("log_loss", 0.4, 0.5)
    assert not metrics.is_better("log_loss", 0.6, 0.5)


def test_no_photos_give_nan_and_not_a_crash():
    figures = metrics.summarize(np.zeros((0, 3)), np.zeros(0, int), np.ones(3) / 3)
    assert all(math.isnan(value) for value in figures.values())
