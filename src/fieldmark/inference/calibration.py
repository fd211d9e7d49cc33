"""Probabilities that mean what they say: a temperature, and the threshold for "unknown" with its evidence.

Fitted on the stored validation predictions of a run and kept in its folder. Letters: N photos, K classes, M thresholds.
Logits may be any real numbers up to a constant per row, so the logarithm of stored probabilities serves as well as the
model's own.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import FiniteFloat
from scipy.special import log_softmax, softmax

from fieldmark.data.folders import NONE
from fieldmark.errors import DataError, RunError
from fieldmark.files import Positive, Share, fill_template, read_values, write_whole
from fieldmark.inference.taxonomy import Fallback, Taxonomy, load_taxonomy, score_levels
from fieldmark.plots import figure_png, new_figure
from fieldmark.runs.folder import CALIBRATION, Run, write_json
from fieldmark.study.statistics import Interval, widen_to_wilson
from fieldmark.training.metrics import Floats, Ints, calibration_error, log_loss

# Beyond these a softmax is all but constant or one-hot: the likelihood is flat and a fit has no meaning.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0
_ROUNDING = 1e-6  # of summed float32 probabilities


@dataclass(frozen=True)
class NoneScore:
    """Says how well photos of none of the classes are told from others, with 95 % intervals by bootstrap."""

    photos: int
    answered: Share  # of them at the threshold
    auroc: Interval  # how often a photo of a class has a higher probability than one of none; 0.5 is chance
    fpr95: Interval  # share of them that pass where 95 % of the others do


@dataclass(frozen=True)
class Calibration:
    """Holds what predict, serve and export need to say "unknown", with the evidence for it. Losses are in nats."""

    temperature: Positive  # divides the logits; fitted on all N photos, or 1 where that made the log loss worse
    threshold: Share  # least confidence that is answered; 0 answers everything
    wanted: str  # of the threshold: "accuracy", "coverage" or "none"
    wanted_value: FiniteFloat
    coverage: Share  # of photos of classes answered at the threshold, which they chose; what follows is cross-fitted
    accuracy: Share  # of the answers
    num_photos: int
    log_loss_before: float  # at temperature 1
    log_loss_after: float
    calibration_error_before: float  # over 15 equally wide bins
    calibration_error_after: float
    refused_temperature: float | None = None  # the fitted one, where it made the cross-fitted log loss worse
    refused_log_loss: float | None = None
    none: NoneScore | None = None  # where there are photos that show none of the classes
    back_off: Fallback | None = None  # None without a taxonomy


def calibrate_run(
    run: Run,
    *,
    wanted: str,
    wanted_value: float,
    confidence_level: float,
    folds: int,
    seed: int,
    taxonomy: Path | None = None,
) -> Calibration:
    """Fit temperature and threshold on the validation photos of a run and keep them in its folder.

    predict, serve and export use them from then on. A temperature whose cross-fitted log loss is above that of
    temperature 1 is refused: then probabilities stay as they are, and the threshold is chosen on them.

    Args:
        run: With stored validation predictions.
        wanted: "accuracy" or "coverage" of the answers, or "none" to answer everything.
        wanted_value: How much of it, in (0, 1]; ignored for "none".
        confidence_level: That the true accuracy is that high, one-sided, in [0, 1); 0 takes it as observed.
        folds: Parts that the photos are divided into, each evaluated with a temperature that the others gave.
        seed: Of that division.
        taxonomy: Table of class, genus, family: photos whose class is not sure get the finest group that is. Groups
            are right as often as the answers of classes are wanted to be (for a wanted coverage: as they are).

    Raises:
        RunError: No validation predictions are stored.
        DataError: What is wanted cannot be had, or the taxonomy does not fit the run's classes.

    Examples:
        >>> run = fieldmark.Run("runs/plain")
        >>> wish = {"wanted": "coverage", "wanted_value": 0.9, "confidence_level": 0}
        >>> found = fieldmark.calibrate_run(run, **wish, folds=5, seed=0)
        >>> 0 <= found.threshold <= 1
        True
    """
    stored = run.predictions("val")
    logits, labels = log_probabilities(stored.probabilities), stored.labels
    tree = load_taxonomy(taxonomy, run.classes) if taxonomy is not None else None
    found = calibrate(
        logits, labels, wanted, wanted_value, confidence_level=confidence_level, folds=folds, seed=seed, taxonomy=tree,
        classes=run.classes,
    )  # fmt: skip
    write_json(run.path / CALIBRATION, asdict(found))
    return found


def load_calibration(run: Run) -> Calibration | None:
    """The calibration in a run's folder, or None if there is none."""
    path = run.path / CALIBRATION
    if not path.is_file():
        return None
    try:
        found = read_values(Calibration, json.loads(path.read_text(encoding="utf-8")))
        if found.back_off and len(found.back_off.rows) != len(run.classes):
            raise DataError("its taxonomy is not of the run's classes")
        return found
    except (ValueError, DataError) as error:
        raise RunError(f"{path}: {error}. Make it again with `fieldmark calibrate`, or remove the file") from None


def calibrate(
    logits: Floats,
    labels: Ints,
    wanted: str,
    wanted_value: float,
    *,
    confidence_level: float,
    folds: int,
    seed: int,
    taxonomy: Taxonomy | None = None,
    classes: Sequence[str] = (),  # K names; any answer to photos of `_none` counts as wrong
) -> Calibration:
    """Temperature from all photos, threshold from cross-fitted probabilities; arguments as in `calibrate_run`."""
    temperature = fit_temperature(logits, labels)
    before, after = apply_temperature(logits, 1.0), cross_fit(logits, labels, folds=folds, seed=seed)
    loss_before, loss_after = log_loss(before, labels), log_loss(after, labels)
    is_refused = loss_after > loss_before
    kept = before if is_refused else after
    is_none = labels == classes.index(NONE) if NONE in classes else np.zeros(len(labels), np.bool_)
    has_both, shown = 0 < is_none.mean() < 1, _silence(kept, classes)
    is_right, confidence = (shown.argmax(axis=1) == labels) & (shown.max(axis=1) > 0), shown.max(axis=1)
    curve, threshold = coverage_curve(confidence, is_right), 0.0
    if wanted == "accuracy":
        threshold = threshold_for_accuracy(curve, wanted_value, confidence_level=confidence_level)
    elif wanted == "coverage":
        threshold = threshold_for_coverage(coverage_curve(confidence[~is_none], is_right[~is_none]), wanted_value)
    elif wanted != "none":
        raise DataError(f'a threshold is wanted for "accuracy", "coverage" or "none"; got {wanted!r}')
    answered = (confidence >= threshold) & (confidence > 0)
    accuracy = float(is_right[answered].mean()) if answered.any() else 0.0  # all may be `_none`
    fallback = None
    if taxonomy is not None and threshold > 0:
        share = accuracy if wanted == "coverage" else wanted_value
        fallback = fit_fallback(
            shown, labels, taxonomy, threshold=threshold, accuracy=share, confidence_level=confidence_level
        )
    return Calibration(
        temperature=1.0 if is_refused else temperature,
        threshold=threshold,
        wanted=wanted,
        wanted_value=1.0 if wanted == "none" else wanted_value,
        coverage=float(answered[~is_none].mean()),
        accuracy=accuracy,
        num_photos=len(labels),
        log_loss_before=loss_before,
        log_loss_after=loss_before if is_refused else loss_after,
        calibration_error_before=calibration_error(before, labels),
        calibration_error_after=calibration_error(kept, labels),
        refused_temperature=temperature if is_refused else None,
        refused_log_loss=loss_after if is_refused else None,
        none=_score_none(without_none(kept, classes).max(axis=1), is_none, answered) if has_both else None,
        back_off=fallback,
    )


def without_none(probabilities: Floats, classes: Sequence[str]) -> Floats:
    """The (..., K) probabilities, but -1 for `_none`, so that it is never the likeliest."""
    return np.where(np.asarray(classes) == NONE, -1, probabilities) if NONE in classes else probabilities


def _silence(probabilities: Floats, classes: Sequence[str]) -> Floats:
    """The (N, K) probabilities without `_none`, and 0 for all of a photo where that is the likeliest."""
    shown = without_none(probabilities, classes)
    return np.where(shown.max(axis=1, keepdims=True) < probabilities.max(axis=1, keepdims=True), 0, shown)


def _score_none(confidence: Floats, is_none: NDArray[np.bool_], answered: NDArray[np.bool_]) -> NoneScore:
    from sklearn.metrics import roc_auc_score

    rng, parts = np.random.default_rng(0), (confidence[~is_none], confidence[is_none])

    def tell_apart(known: Floats, others: Floats) -> tuple[float, float]:
        is_known = np.repeat([True, False], [len(known), len(others)])
        passed = others >= np.quantile(known, 0.05)
        return float(roc_auc_score(is_known, np.concatenate([known, others]))), float(passed.mean())

    drawn = [tell_apart(*(rng.choice(part, len(part)) for part in parts)) for _ in range(1000)]
    both = map(Interval, tell_apart(*parts), *np.quantile(drawn, (0.025, 0.975), axis=0).tolist())
    auroc, fpr95 = (widen_to_wilson(one, min(map(len, parts)), level=0.95) for one in both)
    return NoneScore(int(is_none.sum()), float(answered[is_none].mean()), auroc, fpr95)


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The temperature T in [0.05, 20] that makes (N,) labels most likely by softmax(logits / T), of (N, K) logits.

    The likelihood is convex in 1 / T, so this is the best.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.
    """
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise DataError(f"{broken} of {len(logits)} photos have predictions that are not finite: evaluate again")
    rows = np.arange(len(labels))

    def loss(inverse: float) -> float:
        return float(-log_softmax(logits * inverse, axis=1)[rows, labels].mean())

    found = scipy.optimize.minimize_scalar(loss, bounds=(1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE), method="bounded")
    return float(1 / found.x)


def apply_temperature(logits: Floats, temperature: float) -> Floats:
    """softmax(logits / temperature): (N, K) probabilities."""
    return np.asarray(softmax(np.asarray(logits, np.float64) / temperature, axis=1))


def log_probabilities(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K) logits up to a constant per row. Probabilities that float32 rounds to 0 count as its smallest number."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def cross_fit(logits: Floats, labels: Ints, *, folds: int, seed: int) -> Floats:
    """(N, K) calibrated probabilities in which no photo counts with a temperature that was fitted on it."""
    if folds < 2 or len(labels) < 2:
        raise DataError(f"cross-fitting takes at least 2 photos and 2 folds; got {len(labels)} photos, {folds} folds")
    part = np.random.default_rng(seed).permutation(len(labels)) % min(folds, len(labels))
    probabilities = np.empty(logits.shape)
    for fold in range(int(part.max()) + 1):
        inside = part == fold
        probabilities[inside] = apply_temperature(logits[inside], fit_temperature(logits[~inside], labels[~inside]))
    return probabilities


class CoverageCurve(NamedTuple):
    """Accuracy of the photos that are answered, as the threshold on the confidence rises."""

    thresholds: Floats  # (M,) distinct confidences, rising; a photo is answered if its confidence is at least this
    coverage: Floats  # (M,) share of the photos that are answered, in (0, 1], falling
    accuracy: Floats  # (M,) share of right answers among the answered
    answered: Ints  # (M,) number of photos that are answered


def coverage_curve(confidence: Floats, is_right: NDArray[np.bool_]) -> CoverageCurve:
    """Coverage and accuracy at every threshold on the (N,) confidence that makes a difference."""
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    right = np.cumsum(is_right[order])
    # Photos of equal confidence are answered together: only the last of them is a threshold.
    last = np.append(np.diff(confidence[order]) != 0, True)
    columns: list[NDArray[Any]] = [confidence[order], answered / len(order), right / answered, answered]
    return CoverageCurve(*(column[last][::-1] for column in columns))


def threshold_for_accuracy(curve: CoverageCurve, accuracy: float, *, confidence_level: float) -> float:
    """The lowest threshold whose answers are as accurate as wanted, in (0, 1].

    `confidence_level` is one-sided (Clopper and Pearson 1934): how sure it is that the true accuracy is that high, in
    [0, 1); 0 takes the observed accuracy as it is. Thresholds are tested from strict to lax and the search stops at
    the first failure (fixed-sequence testing; Angelopoulos et al., arXiv:2110.01052, section 5.1), so the confidence
    level holds for the threshold that is chosen.
    """
    _check_share("accuracy", accuracy)
    if not 0 <= confidence_level < 1:
        raise DataError(f"the confidence level is a share from 0 to below 1; got {confidence_level}")
    if confidence_level == 0:
        reached = np.flatnonzero(curve.accuracy >= accuracy)
        if not len(reached):
            raise DataError(
                f"no threshold answers with an accuracy of {accuracy:.1%}: the highest on these photos is "
                f"{curve.accuracy.max():.1%}. Ask for less, or train a better model"
            )
        return float(curve.thresholds[reached[0]])
    right = np.rint(curve.accuracy * curve.answered)
    lowest = scipy.stats.beta.ppf(1 - confidence_level, np.maximum(right, 1), curve.answered - right + 1)
    bound = np.where(right > 0, lowest, 0.0)
    # With fewer answers than this not even an unbroken row of right ones proves anything. The sequence starts at twice
    # as many, so that one mistake does not end it; where it starts depends on counts alone, never on the outcomes.
    least = np.log(1 - confidence_level) / np.log(accuracy) if accuracy < 1 else np.inf
    passed = bound[curve.answered >= 2 * least][::-1] >= accuracy
    num_passed = int(np.cumprod(passed).sum())
    if not num_passed:
        raise DataError(
            f"{curve.answered[0]} photos cannot show an accuracy of {accuracy:.1%} at a confidence level of "
            f"{confidence_level:.0%}. Ask for a lower accuracy or level, or calibrate on more photos"
        )
    return float(curve.thresholds[len(passed) - num_passed])


def threshold_for_coverage(curve: CoverageCurve, coverage: float) -> float:
    """The highest threshold that still answers the wanted share of photos, in (0, 1]."""
    _check_share("coverage", coverage)
    return float(curve.thresholds[np.flatnonzero(curve.coverage >= coverage - 1e-12)[-1]])


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise DataError(f"the wanted {name} is a share above 0 and at most 1; got {value}")


def fit_fallback(
    probabilities: Floats, labels: Ints, tree: Taxonomy, *, threshold: float, accuracy: float, confidence_level: float
) -> Fallback:
    """Thresholds from fine to coarse, each chosen on the photos that no finer level answers.

    So the answers of every level, and not only those of all levels together, have the wanted `accuracy`. `threshold`
    is that of the class itself; the (N, K) probabilities are cross-fitted.
    """
    thresholds: list[float | None] = [threshold]
    is_open = probabilities.max(axis=1) < threshold
    for level in range(1, len(tree.levels)):
        sums = tree.at_level(probabilities, level)
        confidence, is_right = sums.max(axis=1), sums.argmax(axis=1) == tree.members[level][labels]
        found = None
        if is_open.any():
            with suppress(DataError):  # never right often enough, or too few to show it: the next level may be
                curve = coverage_curve(confidence[is_open], is_right[is_open])
                found = max(0.0, threshold_for_accuracy(curve, accuracy, confidence_level=confidence_level) - _ROUNDING)
                is_open &= confidence < found
        thresholds.append(found)
    scores = score_levels(probabilities, labels, tree, thresholds)
    return Fallback(tree.levels, tree.rows, tuple(thresholds), scores)


def describe_calibration(found: Calibration) -> str:
    """A few lines for people."""
    return fill_template("calibration.md", {"found": found, "name_of_none": NONE})


def save_calibration_figure(run: Run, found: Calibration) -> Path:
    """Draw the reliability diagram and the coverage-accuracy curve as RUN/calibration.png."""
    from sklearn.calibration import calibration_curve

    stored = run.predictions("val")
    logits = log_probabilities(stored.probabilities)
    is_plain = found.refused_temperature is not None
    probabilities = apply_temperature(logits, 1.0) if is_plain else cross_fit(logits, stored.labels, folds=5, seed=0)
    shown = _silence(probabilities, run.classes)
    confidence, is_right = shown.max(axis=1), (shown.argmax(axis=1) == stored.labels) & (shown.max(axis=1) > 0)
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    share, sure = calibration_curve(is_right, confidence, n_bins=15)
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence))  # in the same bins
    left.scatter(sure, share, s=20 + 300 * counts[counts > 0] / len(confidence))
    left.set(xlabel="mean probability of the answer", ylabel="share of right answers")
    left.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), title="Reliability (area: number of photos)")
    curve = coverage_curve(confidence, is_right)
    right.step(curve.coverage, curve.accuracy, where="post")
    if found.threshold > 0:
        right.plot(found.coverage, found.accuracy, "o", label=f"threshold {found.threshold:.2f}")
        right.legend(frameon=False)
    right.set(xlabel="share of photos answered", ylabel="share of right answers", xlim=(0, 1.02))
    right.set_title("Coverage and accuracy")
    path = run.path / "calibration.png"
    write_whole(path, figure_png(figure))
    return path
