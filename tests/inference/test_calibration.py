"""Laws of temperature, coverage and the threshold for "unknown"."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from fieldmark.config import dump_config, load_config
from fieldmark.errors import DataError, RunError
from fieldmark.inference.calibration import (
    apply_temperature,
    calibrate,
    calibrate_run,
    coverage_curve,
    cross_fit,
    describe_calibration,
    fit_temperature,
    load_calibration,
    log_probabilities,
    save_calibration_figure,
    threshold_for_accuracy,
    threshold_for_coverage,
)
from fieldmark.inference.predict import apply_prior, estimate_prior
from fieldmark.inference.taxonomy import taxonomy_scores
from fieldmark.runs.folder import Run, write_predictions


def make_logits(n=2000, k=5, temperature=2.5, seed=0):
    """Logits whose true probabilities are softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, k))
    shares = apply_temperature(logits, temperature)
    labels = (rng.random(n)[:, None] > shares.cumsum(axis=1)).sum(axis=1).clip(0, k - 1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    logits, labels = make_logits(n=20_000, temperature=temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_for_two_classes_it_agrees_with_logistic_regression_without_intercept():
    logits, labels = make_logits(n=500, k=2)
    margin = (logits[:, 1] - logits[:, 0])[:, None]
    slope = LogisticRegression(C=np.inf, fit_intercept=False).fit(margin, labels).coef_[0, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1 / slope, rel=1e-3)


def test_log_probabilities_serve_as_well_as_logits():
    logits, labels = make_logits(n=300)
    assert fit_temperature(np.log(apply_temperature(logits, 1.0)), labels) == pytest.approx(
        fit_temperature(logits, labels), rel=1e-4
    )


def test_no_photo_counts_with_a_temperature_fitted_on_it():
    logits, labels = make_logits(n=40)
    before = cross_fit(logits, labels, folds=4, seed=1)
    labels[7] = (labels[7] + 1) % 5
    after = cross_fit(logits, labels, folds=4, seed=1)
    assert np.array_equal(before[7], after[7])
    assert not np.array_equal(before, after)


def test_cross_fitting_is_never_optimistic_where_there_is_nothing_to_learn():
    """On labels that are pure chance the in-sample loss beats the honest one."""
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(0, 1, (30, 3)), rng.integers(0, 3, 30)
    honest = cross_fit(logits, labels, folds=10, seed=0)[np.arange(30), labels]
    fitted = apply_temperature(logits, fit_temperature(logits, labels))[np.arange(30), labels]
    assert -np.log(honest).mean() > -np.log(fitted).mean()


@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=40))
def test_the_curve_says_what_counting_says(rows):
    confidence = np.array([value / 10 for value, _ in rows])
    is_right = np.array([right for _, right in rows])
    curve = coverage_curve(confidence, is_right)
    assert list(curve.thresholds) == sorted(set(confidence))
    for threshold, coverage, accuracy in zip(curve.thresholds, curve.coverage, curve.accuracy, strict=True):
        answered = confidence >= threshold
        assert coverage == pytest.approx(answered.mean())
        assert accuracy == pytest.approx(is_right[answered].mean())


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
@settings(max_examples=40)
def test_the_threshold_for_a_coverage_answers_at_least_that_and_the_next_less(seed, wanted):
    confidence = np.random.default_rng(seed).random(30).round(1)
    curve = coverage_curve(confidence, confidence > 0.5)
    threshold = threshold_for_coverage(curve, wanted)
    assert (confidence >= threshold).mean() >= wanted - 1e-9
    above = curve.thresholds[curve.thresholds > threshold]
    assert not len(above) or (confidence >= above[0]).mean() < wanted


def test_the_threshold_for_an_accuracy_is_the_lowest_that_reaches_it():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    curve = coverage_curve(confidence, np.array([True, True, False, True, False]))
    assert threshold_for_accuracy(curve, 0.75, confidence_level=0) == 0.7
    assert threshold_for_accuracy(curve, 1.0, confidence_level=0) == 0.9


def test_an_assured_accuracy_is_kept_on_new_photos():
    """The share of calibrations whose true accuracy falls short stays below one minus the level."""
    failures = chosen = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        confidence = rng.random(300)
        # Right with probability equal to the confidence: the accuracy above t is (1 + t) / 2.
        curve = coverage_curve(confidence, rng.random(300) < confidence)
        try:
            threshold = threshold_for_accuracy(curve, 0.75, confidence_level=0.9)
        except DataError:
            continue
        chosen += 1
        failures += (1 + threshold) / 2 < 0.75
    assert chosen > 150
    assert failures <= 30  # 200 draws at 10 %: 20 expected, 30 is 2.4 standard deviations above


def test_a_higher_confidence_level_never_answers_more():
    logits, labels = make_logits(n=400, temperature=1.0)
    probabilities = apply_temperature(logits, 1.0)
    curve = coverage_curve(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    thresholds = [
        threshold_for_accuracy(curve, 0.9, confidence_level=confidence_level)
        for confidence_level in (0, 0.5, 0.9, 0.95)
    ]
    assert thresholds == sorted(thresholds)


def test_calibration_lowers_loss_and_error_of_an_overconfident_model_and_survives_json():
    logits, labels = make_logits(temperature=3.0)
    found = calibrate(logits, labels, wanted="accuracy", wanted_value=0.9, confidence_level=0, folds=5, seed=0)
    assert found.log_loss_after < found.log_loss_before
    assert found.calibration_error_after < found.calibration_error_before / 3
    assert found.accuracy >= 0.9
    assert 0 < found.coverage < 1


def test_without_a_wish_everything_is_answered():
    logits, labels = make_logits(n=100)
    found = calibrate(logits, labels, wanted="none", wanted_value=0.5, confidence_level=0, folds=5, seed=0)
    assert (found.threshold, found.coverage) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_temperature(np.array([[0.0, -np.inf]]), np.array([0])),
            "1 of 1 photos have predictions that are not",
        ),
        (lambda: cross_fit(np.zeros((1, 3)), np.array([0]), folds=5, seed=0), "at least 2 photos and 2 folds"),
        (
            lambda: threshold_for_accuracy(
                coverage_curve(np.ones(2), np.array([True, False])), 0.9, confidence_level=0
            ),
            "accuracy of 90.0%: the highest on these photos is 50.0%. Ask for less",
        ),
        (
            lambda: threshold_for_accuracy(
                coverage_curve(np.ones(2), np.array([True, True])), 0.9, confidence_level=0.95
            ),
            "2 photos cannot show an accuracy of 90.0% at a confidence level of 95%",
        ),
        (
            lambda: threshold_for_accuracy(coverage_curve(np.ones(2), np.ones(2, bool)), 0.9, confidence_level=1),
            r"confidence level is a share from 0 to below 1; got 1",
        ),
        (lambda: threshold_for_coverage(coverage_curve(np.ones(2), np.ones(2, bool)), 0), "wanted coverage is a share"),
        (
            lambda: calibrate(*make_logits(n=9), wanted="x", wanted_value=1, confidence_level=0, folds=2, seed=0),
            "or \"none\"; got 'x'",
        ),
    ],
)
def test_each_message_says_what_was_given_and_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, 3))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random(400)[:, None] > shares.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    loud = np.exp(3 * logits)  # three times too sure
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_config(load_config()))
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
    return calibrate_run(run, **wish, confidence_level=0, folds=5, seed=0)


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
        calibrate_run(run, wanted="accuracy", wanted_value=0.99, confidence_level=0.99, folds=5, seed=0)
    assert load_calibration(run) is None


def test_a_broken_calibration_says_what_to_do(run):
    (run.path / "calibration.json").write_text("{")
    with pytest.raises(RunError, match=r"calibration.json: Expecting.*Make it again"):
        load_calibration(run)


def test_taxonomy_scores_come_from_the_stored_predictions(run, tmp_path):
    table = tmp_path / "taxonomy.csv"
    table.write_text("class,genus\na,X\nb,X\nc,Y\n")
    scores = taxonomy_scores(run, table)
    assert scores["genus"] > scores["class"]


def make_worse():
    """Nine sure and right answers: the fit is colder than 1 by cross-validation luck, and one fold pays for it."""
    logits = np.log(np.full((9, 3), 0.25) + 0.25 * np.eye(3)[np.arange(9) % 3])
    labels = np.arange(9) % 3
    labels[8] = 0
    return logits, labels


def test_a_temperature_that_raises_the_cross_fitted_log_loss_is_refused_and_said():
    logits, labels = make_worse()
    after = cross_fit(logits, labels, folds=5, seed=0)[np.arange(9), labels]
    plain = apply_temperature(logits, 1.0)
    before = plain[np.arange(9), labels]
    assert -np.log(after).mean() > -np.log(before).mean()
    found = calibrate(logits, labels, wanted="coverage", wanted_value=0.5, confidence_level=0, folds=5, seed=0)
    assert found.temperature == 1
    assert found.log_loss_after == found.log_loss_before == pytest.approx(-np.log(before).mean())
    assert found.refused_temperature == pytest.approx(fit_temperature(logits, labels))
    assert found.refused_log_loss == pytest.approx(-np.log(after).mean())
    assert found.threshold in plain.max(axis=1)  # the threshold is of the probabilities that answer
    text = describe_calibration(found)
    assert (
        f"the fitted {found.refused_temperature:.3f} would raise the log loss from {found.log_loss_before:.3f}" in text
    )
    logits, labels = make_logits(n=300)
    kept = calibrate(logits, labels, wanted="none", wanted_value=1, confidence_level=0, folds=5, seed=0)
    assert kept.refused_temperature is None
    assert "would raise" not in describe_calibration(kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("temperature", value) for value in (0, -1, float("nan"), float("inf"), "warm", None)),
        *(("threshold", value) for value in (-0.1, 1.1, float("nan"), None)),
        *(("coverage", value) for value in (2, "much")),
    ],
)
def test_a_stored_calibration_that_would_answer_nonsense_is_refused_by_its_key(run, key, value):
    values = asdict(calibrated(run, wanted="coverage", wanted_value=0.5))
    (run.path / "calibration.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(RunError, match=rf"calibration.json: has {key} = .*Make it again"):
        load_calibration(run)


def test_a_calibration_of_an_earlier_version_loads(run):
    values = asdict(calibrated(run))
    old = {name: value for name, value in values.items() if not name.startswith("refused")}
    (run.path / "calibration.json").write_text(json.dumps(old))
    assert load_calibration(run).temperature == values["temperature"]


def test_a_calibration_that_lacks_something_or_is_no_object_is_refused(run):
    (run.path / "calibration.json").write_text('{"temperature": 1}')
    with pytest.raises(RunError, match=r"calibration.json: lacks accuracy, .*Make it again"):
        load_calibration(run)
    (run.path / "calibration.json").write_text("[1]")
    with pytest.raises(RunError, match=r"calibration.json: has \[1\]: .*Make it again"):
        load_calibration(run)


def make_shifted(prior, shares, count=4000, seed=0):
    """Exact probabilities under `prior` of photos whose classes come in `shares`, and the true classes."""
    rng = np.random.default_rng(seed)
    prior, shares = np.asarray(prior), np.asarray(shares)
    labels = rng.choice(len(shares), count, p=shares)
    evidence = rng.normal(0, 1, (count, len(shares)))
    evidence[np.arange(count), labels] += 2  # likelihood of class k is proportional to exp(2 * evidence[k])
    weighted = prior * np.exp(2 * evidence)
    return weighted / weighted.sum(axis=1, keepdims=True), labels


def test_shares_that_changed_are_found_and_the_correction_earns_accuracy():
    prior, shares = np.array([0.4, 0.3, 0.3]), np.array([0.9, 0.08, 0.02])
    probabilities, labels = make_shifted(prior, shares)
    estimated = estimate_prior(probabilities, prior)
    np.testing.assert_allclose(estimated, shares, atol=0.02)
    corrected = apply_prior(probabilities, prior, estimated)
    np.testing.assert_allclose(corrected.sum(axis=1), 1)
    before, after = (np.mean(found.argmax(axis=1) == labels) for found in (probabilities, corrected))
    assert after > before + 0.02
    exact = apply_prior(probabilities, prior, shares)
    np.testing.assert_allclose(corrected, exact, atol=0.1)


def test_shares_that_did_not_change_change_nothing_much_and_a_few_photos_little():
    prior = np.array([0.7, 0.2, 0.1])
    probabilities, _ = make_shifted(prior, prior)
    np.testing.assert_allclose(estimate_prior(probabilities, prior), prior, atol=0.02)
    one = np.array([[0.05, 0.05, 0.9]])
    assert estimate_prior(one, prior)[2] < 0.4
    assert np.array_equal(apply_prior(one, prior, prior), one)


def test_a_class_without_training_photos_stays_impossible():
    prior = np.array([0.5, 0.5, 0.0])
    found = estimate_prior(np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), prior)
    assert found[2] == 0
    assert np.isfinite(found).all()
