"""Numbers that score predictions: pure functions over numpy arrays.

Shape letters: N photos, K classes. `probabilities` is (N, K) with rows summing to 1, `labels` (N,) int64 in [0, K);
`prior` (K,) is each class's share in training. Without photos, each figure is NaN.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

LOWER_IS_BETTER = frozenset({"log_loss", "calibration_error"})


def summarize(probabilities: Floats, labels: Ints, prior: Floats) -> dict[str, float]:
    """Give all metrics of one evaluation."""
    return {
        "top1": top_k(probabilities, labels, k=1),
        "top5": top_k(probabilities, labels, k=5),
        "macro_recall": macro_recall(probabilities, labels),
        "prior_top1": prior_top1(probabilities, labels, prior),
        "log_loss": log_loss(probabilities, labels),
        "calibration_error": calibration_error(probabilities, labels),
    }


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`; equal values and NaN do not, anything finite beats None."""
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return value < best if metric in LOWER_IS_BETTER else value > best


def compare_with_probe(rows: Sequence[Mapping[str, Any]], *, metric: str, select: str) -> dict[str, Any] | None:
    """Find whether the probe beats every epoch of fine-tuning; None where it does not, or one of them is missing."""
    scored = [row for row in rows if (row.get("val") or {}).get(metric) is not None]
    best = min if metric in LOWER_IS_BETTER else max
    probe = best((row["val"][metric] for row in scored if row.get("is_probe")), default=None)
    tuned = best((row["val"][metric] for row in scored if not row.get("is_probe")), default=None)
    if probe is None or tuned is None or not is_better(metric, probe, tuned):
        return None
    return {"value": probe, "best_fine_tuned": tuned, "is_kept": select == "best"}


def top_k(probabilities: Floats, labels: Ints, *, k: int) -> float:
    """Share of photos whose class is among the `k` most probable; of equals, the first class counts.

    With K <= k every photo counts, so top-5 says nothing about five classes or fewer.
    """
    own = _own(probabilities, labels)[:, None]
    before = np.arange(probabilities.shape[1])[None, :] < np.asarray(labels)[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & before)).sum(axis=1)
    return _mean(rank < k)


def confusion_matrix(predicted: Ints, labels: Ints, *, num_classes: int) -> NDArray[np.int64]:
    """(K, K) counts; row: the true class, column: the predicted one."""
    flat = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(labels: Ints, predicted: Ints) -> list[tuple[int, int, NDArray[np.int64]]]:
    """(true class, predicted class, indices of the photos) for every pair that was confused, most photos first."""
    labels, predicted = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    wrong = np.flatnonzero(labels != predicted)
    pairs, group = np.unique(np.stack([labels[wrong], predicted[wrong]], axis=1), axis=0, return_inverse=True)
    found = [(int(true), int(other), wrong[group.ravel() == index]) for index, (true, other) in enumerate(pairs)]
    return sorted(found, key=lambda pair: -len(pair[2]))


def macro_recall(probabilities: Floats, labels: Ints) -> float:
    """Mean recall over the classes that have photos: every class counts alike (balanced accuracy)."""
    return float(np.nanmean(_class_recalls(probabilities, labels))) if len(labels) else math.nan


def prior_top1(probabilities: Floats, labels: Ints, prior: Floats) -> float:
    """Accuracy to expect where the classes come as often as `prior` says.

    Recall of each class weighted by its prior; classes without photos here are left out and the rest renormalized.
    """
    recalls = _class_recalls(probabilities, labels)
    weights = np.where(np.isnan(recalls), 0.0, prior)
    return float((weights * np.nan_to_num(recalls)).sum() / weights.sum()) if weights.sum() > 0 else math.nan


def log_loss(probabilities: Floats, labels: Ints) -> float:
    """Mean negative log probability of the true class, in nats; probabilities are clipped at 1e-12."""
    return _mean(-np.log(np.clip(_own(probabilities, labels).astype(np.float64), 1e-12, 1.0)))


def calibration_error(probabilities: Floats, labels: Ints, *, bins: int = 15) -> float:
    """Expected calibration error of the top class, in [0, 1], over equally wide bins; NaN if any value is.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 2.
    """
    if not len(labels):
        return math.nan
    confidence = probabilities.max(axis=1).astype(np.float64)
    is_right = probabilities.argmax(axis=1) == labels
    gap = np.bincount(confidence_bins(confidence, bins=bins), weights=is_right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def confidence_bins(confidence: Floats, *, bins: int) -> NDArray[np.int64]:
    """Assign each confidence to a bin: m holds (m / bins, (m + 1) / bins], as in Guo et al.; the first also 0, NaN."""
    edges = np.nan_to_num(np.ceil(np.asarray(confidence, np.float64) * bins), posinf=bins)
    return np.clip(edges.astype(np.int64) - 1, 0, bins - 1)


def wilson_interval(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a share, good also for small numbers and for shares near 0 and 1; (0, 1) for no trials.

    Source:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def _own(probabilities: Floats, labels: Ints) -> Floats:
    """(N,) probability of each photo's true class."""
    return probabilities[np.arange(len(labels)), labels]


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _class_recalls(probabilities: Floats, labels: Ints) -> NDArray[np.float64]:
    """(K,) share of each class's photos that were found; NaN where a class has no photo."""
    confusion = confusion_matrix(probabilities.argmax(axis=1), labels, num_classes=probabilities.shape[1])
    counts = confusion.sum(axis=1)
    return np.where(counts > 0, np.diag(confusion) / np.maximum(counts, 1), np.nan)
