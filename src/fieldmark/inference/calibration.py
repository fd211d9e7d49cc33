"""Probabilities that mean what they say: a temperature, and the threshold for "unknown" with its evidence.

Pure numpy and scipy. Letters: N photos, K classes. Logits may be any real numbers up to a constant per row, so the
logarithm of stored probabilities serves as well as the model's own logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import beta

from fieldmark.errors import DataError

# Beyond these a softmax is all but constant or one-hot: the likelihood is flat and a fit has no meaning.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """What predict, serve and export need to say "unknown", with the evidence for it.

    Attributes:
        temperature: Divides the logits, > 0; fitted on all N photos.
        threshold: Least confidence that is answered, in [0, 1]; 0 answers everything.
        wanted: What the threshold was asked for: "accuracy", "coverage" or "none".
        wanted_value: The accuracy or coverage asked for, in [0, 1].
        coverage: Share of photos answered at the threshold, cross-fitted.
        accuracy: Share of right answers among them, cross-fitted; NaN where none is answered.
        num_photos: N.
        log_loss_before: Mean negative log-likelihood at temperature 1, in nats.
        log_loss_after: The same, cross-fitted: no photo is judged by a temperature that was fitted on it.
        calibration_error_before: Expected calibration error at temperature 1 (15 equal-width bins), in [0, 1].
        calibration_error_after: The same, cross-fitted.
    """

    temperature: float
    threshold: float
    wanted: str
    wanted_value: float
    coverage: float
    accuracy: float
    num_photos: int
    log_loss_before: float
    log_loss_after: float
    calibration_error_before: float
    calibration_error_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Read back what `to_dict` wrote.

        Raises:
            DataError: A value is missing.
        """
        missing = sorted(set(cls.__dataclass_fields__) - set(values))
        if missing:
            raise DataError(f"the calibration lacks {', '.join(missing)}; make it again with fieldmark calibrate")
        known: dict[str, Any] = {key: values[key] for key in cls.__dataclass_fields__}
        if known["accuracy"] is None:  # JSON has no NaN
            known["accuracy"] = float("nan")
        return cls(**known)


def fit_temperature(logits: FloatArray, labels: IntArray) -> float:
    """The temperature that makes the labels most likely.

    Args:
        logits: (N, K), N at least 1.
        labels: (N,) class numbers.

    Returns:
        T in [0.05, 20]; probabilities are softmax(logits / T). The likelihood is convex in 1 / T, so this is the best.

    Raises:
        DataError: Shapes or labels do not fit, or a logit is not finite.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.
    """
    logits, labels = _checked(logits, labels)

    def loss(inverse: float) -> float:
        return _log_loss(logits, labels, 1 / inverse)

    found = minimize_scalar(loss, bounds=(1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE), method="bounded")
    return float(1 / found.x)


def apply_temperature(logits: FloatArray, temperature: float) -> FloatArray:
    """softmax(logits / temperature): (N, K) probabilities."""
    if not temperature > 0:
        raise DataError(f"a temperature must be above 0; got {temperature}")
    return np.asarray(softmax(np.asarray(logits, np.float64) / temperature, axis=1))


def log_probabilities(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K) logits up to a constant per row. Probabilities that float32 rounds to 0 count as its smallest number."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def cross_fitted(logits: FloatArray, labels: IntArray, *, folds: int, seed: int) -> FloatArray:
    """Calibrated probabilities in which no photo is judged by a temperature that was fitted on it.

    Args:
        logits: (N, K).
        labels: (N,) class numbers.
        folds: Number of parts, at least 2; each is calibrated by the others. At most N are used.
        seed: Seed of the division into parts.

    Returns:
        (N, K) probabilities.

    Raises:
        DataError: Fewer than 2 photos or folds.
    """
    logits, labels = _checked(logits, labels)
    if folds < 2 or len(labels) < 2:
        raise DataError(f"cross-fitting takes at least 2 photos and 2 folds; got {len(labels)} photos, {folds} folds")
    part = np.random.default_rng(seed).permutation(len(labels)) % min(folds, len(labels))
    probabilities = np.empty(logits.shape)
    for fold in range(int(part.max()) + 1):
        inside = part == fold
        temperature = fit_temperature(logits[~inside], labels[~inside])
        probabilities[inside] = apply_temperature(logits[inside], temperature)
    return probabilities


def calibrate(
    logits: FloatArray,
    labels: IntArray,
    *,
    wanted: str,
    wanted_value: float,
    assurance: float,
    folds: int,
    seed: int,
) -> Calibration:
    """Temperature from all photos, threshold and evidence from cross-fitted ones.

    Args:
        logits: (N, K) of photos that the model was not trained on.
        labels: (N,) class numbers.
        wanted: "accuracy" or "coverage" of the answers, or "none" to answer everything.
        wanted_value: How much of it, in (0, 1]; ignored for "none".
        assurance: See `threshold_for_accuracy`.
        folds: See `cross_fitted`.
        seed: See `cross_fitted`.

    Raises:
        DataError: What is wanted cannot be had, or the arrays do not fit.
    """
    logits, labels = _checked(logits, labels)
    before, after = apply_temperature(logits, 1.0), cross_fitted(logits, labels, folds=folds, seed=seed)
    is_right = after.argmax(axis=1) == labels
    confidence = after.max(axis=1)
    curve = coverage_curve(confidence, is_right)
    if wanted == "accuracy":
        threshold = threshold_for_accuracy(curve, wanted_value, assurance=assurance)
    elif wanted == "coverage":
        threshold = threshold_for_coverage(curve, wanted_value)
    elif wanted == "none":
        threshold, wanted_value = 0.0, 1.0
    else:
        raise DataError(f'a threshold is wanted for "accuracy", "coverage" or "none"; got {wanted!r}')
    answered = confidence >= threshold
    rows = np.arange(len(labels))
    return Calibration(
        temperature=fit_temperature(logits, labels),
        threshold=threshold,
        wanted=wanted,
        wanted_value=wanted_value,
        coverage=float(answered.mean()),
        accuracy=float(is_right[answered].mean()) if answered.any() else float("nan"),
        num_photos=len(labels),
        log_loss_before=_log_loss(logits, labels, 1.0),
        log_loss_after=float(-np.log(np.maximum(after[rows, labels], np.finfo(np.float64).tiny)).mean()),
        calibration_error_before=expected_calibration_error(before.max(axis=1), is_right, bins=15),
        calibration_error_after=expected_calibration_error(confidence, is_right, bins=15),
    )


def _log_loss(logits: FloatArray, labels: IntArray, temperature: float) -> float:
    likelihood = log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels]
    return float(-likelihood.mean())


def _checked(logits: FloatArray, labels: IntArray) -> tuple[FloatArray, IntArray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"calibration takes logits (N, K) and labels (N,), N at least 1; got {logits.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels must be class numbers from 0 to {logits.shape[1] - 1}; got {labels.min()} to {labels.max()}. "
            "Leave unlabelled photos out"
        )
    if not np.isfinite(logits).all():
        raise DataError(
            f"{int((~np.isfinite(logits)).any(axis=1).sum())} of {len(logits)} photos have logits that are not finite; "
            "take the logarithm of probabilities with a floor above 0"
        )
    return logits, labels


FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class CoverageCurve:
    """Accuracy of the photos that are answered, as the threshold on the confidence rises.

    Attributes:
        thresholds: (M,) distinct confidences, rising; a photo is answered if its confidence is at least this.
        coverage: (M,) share of the photos that are answered, in (0, 1], falling.
        accuracy: (M,) share of right answers among the answered, in [0, 1].
        answered: (M,) number of photos that are answered.
    """

    thresholds: FloatArray
    coverage: FloatArray
    accuracy: FloatArray
    answered: IntArray

    def area(self) -> float:
        """Mean risk over all coverages (AURC; Geifman and El-Yaniv, arXiv:1705.08500), in [0, 1], lower is better."""
        order = np.argsort(self.coverage)
        coverage, risk = self.coverage[order], 1 - self.accuracy[order]
        return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def coverage_curve(confidence: FloatArray, is_right: NDArray[np.bool_]) -> CoverageCurve:
    """Coverage and accuracy at every threshold that makes a difference.

    Args:
        confidence: (N,) largest probability of each photo.
        is_right: (N,) whether the answer is right.

    Raises:
        DataError: No photos, or shapes that differ.
    """
    confidence, is_right = np.asarray(confidence, np.float64), np.asarray(is_right, bool)
    if confidence.shape != is_right.shape or confidence.ndim != 1 or not len(confidence):
        raise DataError(
            f"a coverage curve takes one confidence and one verdict per photo; got shapes {confidence.shape} and "
            f"{is_right.shape}"
        )
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    right = np.cumsum(is_right[order])
    # Photos of equal confidence are answered together: only the last of them is a threshold.
    last = np.append(np.diff(confidence[order]) != 0, True)
    return CoverageCurve(
        thresholds=confidence[order][last][::-1],
        coverage=(answered / len(order))[last][::-1],
        accuracy=(right / answered)[last][::-1],
        answered=answered[last][::-1],
    )


def threshold_for_accuracy(curve: CoverageCurve, accuracy: float, *, assurance: float) -> float:
    """The lowest threshold whose answers are as accurate as wanted.

    Args:
        curve: From `coverage_curve`, of photos that nothing was fitted on.
        accuracy: Wanted accuracy of the answers, in (0, 1].
        assurance: One-sided confidence that the true accuracy is that high (Clopper and Pearson 1934), in [0, 1);
            0 takes the observed accuracy as it is. Thresholds are tested from strict to lax and the search stops at
            the first failure (fixed-sequence testing; Angelopoulos et al., arXiv:2110.01052, section 5.1), so the
            assurance holds for the threshold that is chosen.

    Raises:
        DataError: No threshold reaches it, or the photos are too few to show it.
    """
    _check_share("accuracy", accuracy)
    if not 0 <= assurance < 1:
        raise DataError(f"the assurance is a share from 0 to below 1; got {assurance}")
    if assurance == 0:
        reached = np.flatnonzero(curve.accuracy >= accuracy)
        if not len(reached):
            raise DataError(
                f"no threshold answers with an accuracy of {accuracy:.1%}: the highest on these photos is "
                f"{curve.accuracy.max():.1%}. Ask for less, or train a better model"
            )
        return float(curve.thresholds[reached[0]])
    right = np.rint(curve.accuracy * curve.answered)
    bound = np.where(right > 0, beta.ppf(1 - assurance, np.maximum(right, 1), curve.answered - right + 1), 0.0)
    # With fewer answers than this not even an unbroken row of right ones proves anything. The sequence starts at twice
    # as many, so that one mistake does not end it; where it starts depends on counts alone, never on the outcomes.
    least = np.log(1 - assurance) / np.log(accuracy) if accuracy < 1 else np.inf
    passed = bound[curve.answered >= 2 * least][::-1] >= accuracy
    num_passed = int(np.cumprod(passed).sum())
    if not num_passed:
        raise DataError(
            f"{curve.answered[0]} photos cannot show an accuracy of {accuracy:.1%} with {assurance:.0%} assurance. Ask "
            "for a lower accuracy or assurance, or calibrate on more photos"
        )
    return float(curve.thresholds[len(passed) - num_passed])


def threshold_for_coverage(curve: CoverageCurve, coverage: float) -> float:
    """The highest threshold that still answers the wanted share of photos, in (0, 1]."""
    _check_share("coverage", coverage)
    return float(curve.thresholds[np.flatnonzero(curve.coverage >= coverage - 1e-12)[-1]])


def reliability_bins(confidence: FloatArray, is_right: NDArray[np.bool_], *, bins: int) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count of each equal-width bin of confidence that holds a photo.

    Source:
        Guo et al., arXiv:1706.04599, section 2 (reliability diagrams).
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(is_right, np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    table: list[dict[str, float]] = []
    for number in np.unique(place):
        inside = place == number
        table.append(
            {
                "low": float(number / bins),
                "high": float((number + 1) / bins),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    return table


def expected_calibration_error(confidence: FloatArray, is_right: NDArray[np.bool_], *, bins: int) -> float:
    """Mean gap of confidence and accuracy over the bins, weighted by their photos, in [0, 1]."""
    table = reliability_bins(confidence, is_right, bins=bins)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(confidence)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise DataError(f"the wanted {name} is a share above 0 and at most 1; got {value}")
