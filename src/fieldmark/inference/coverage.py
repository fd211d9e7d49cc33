"""The share of photos that is answered, how accurate the answers are, and the threshold for "unknown".

Pure numpy. Letters: N photos, M thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import DataError

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
    """Coverage and accuracy at every threshold on the (N,) confidence that makes a difference.

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
        assurance: One-sided confidence level that the true accuracy is that high (Clopper and Pearson 1934), in
            [0, 1); 0 takes the observed accuracy as it is. Thresholds are tested from strict to lax and the search
            stops at the first failure (fixed-sequence testing; Angelopoulos et al., arXiv:2110.01052, section 5.1), so
            the confidence level holds for the threshold that is chosen.

    Raises:
        DataError: No threshold reaches it, or the photos are too few to show it.
    """
    from scipy.stats import beta  # a second that a prediction need not wait for

    _check_share("accuracy", accuracy)
    if not 0 <= assurance < 1:
        raise DataError(f"the confidence level (assurance) is a share from 0 to below 1; got {assurance}")
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
            f"{curve.answered[0]} photos cannot show an accuracy of {accuracy:.1%} at a confidence level of "
            f"{assurance:.0%}. Ask for a lower accuracy or level, or calibrate on more photos"
        )
    return float(curve.thresholds[len(passed) - num_passed])


def threshold_for_coverage(curve: CoverageCurve, coverage: float) -> float:
    """The highest threshold that still answers the wanted share of photos, in (0, 1]."""
    _check_share("coverage", coverage)
    return float(curve.thresholds[np.flatnonzero(curve.coverage >= coverage - 1e-12)[-1]])


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise DataError(f"the wanted {name} is a share above 0 and at most 1; got {value}")
