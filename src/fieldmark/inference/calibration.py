"""Probabilities that mean what they say: a temperature, and the threshold for "unknown" with its evidence.

Fitted on the stored validation predictions of a run and kept in its folder. Letters: N photos, K classes. Logits may be
any real numbers up to a constant per row, so the logarithm of stored probabilities serves as well as the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf
from scipy.special import log_softmax, softmax

from fieldmark.errors import DataError, RunError
from fieldmark.files import read_values, whole_or_absent
from fieldmark.inference.coverage import CoverageCurve, coverage_curve, threshold_for_accuracy, threshold_for_coverage
from fieldmark.inference.taxonomy import Fallback, Taxonomy, fit_fallback, load_taxonomy
from fieldmark.training.metrics import calibration_error, confidence_bins

if TYPE_CHECKING:
    from fieldmark.runs.folder import Run

FILE = "calibration.json"
FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

# Beyond these a softmax is all but constant or one-hot: the likelihood is flat and a fit has no meaning.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[Finite, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Calibration:
    """What predict, serve and export need to say "unknown", with the evidence for it.

    Attributes:
        temperature: Divides the logits, > 0; fitted on all N photos, or 1 where that made the log loss worse.
        threshold: Least confidence that is answered, in [0, 1]; 0 answers everything.
        wanted: What the threshold was asked for: "accuracy", "coverage" or "none".
        wanted_value: The accuracy or coverage asked for, in [0, 1].
        coverage: Share of photos answered at the threshold, cross-fitted.
        accuracy: Share of right answers among them, cross-fitted.
        num_photos: N.
        log_loss_before: Mean negative log-likelihood at temperature 1, in nats.
        log_loss_after: The same, cross-fitted: no photo counts with a temperature that was fitted on it.
        calibration_error_before: Expected calibration error at temperature 1 (15 equal-width bins), in [0, 1].
        calibration_error_after: The same, cross-fitted.
        refused_temperature: The fitted temperature, where it made the cross-fitted log loss worse; else None.
        refused_log_loss: That log loss, in nats.
        fallback: Groups to answer with where the class is not sure; None without a taxonomy.
    """

    temperature: Annotated[Finite, Field(gt=0)]
    threshold: Share
    wanted: str
    wanted_value: Finite
    coverage: Share
    accuracy: Share
    num_photos: int
    log_loss_before: float
    log_loss_after: float
    calibration_error_before: float
    calibration_error_after: float
    refused_temperature: float | None = None
    refused_log_loss: float | None = None
    fallback: InstanceOf[Fallback] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "fallback"}
        return values | ({"back_off": self.fallback.to_dict()} if self.fallback else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, num_classes: int) -> Calibration:
        """Read what `to_dict` wrote, for a model of `num_classes` classes.

        Raises:
            DataError: A value is missing or not what it should be; names its key.
        """
        known = {name: value for name, value in values.items() if name != "fallback"}
        if values.get("back_off"):
            known["fallback"] = Fallback.from_dict(values["back_off"], num_classes=num_classes)
        try:
            return read_values(cls, known)
        except ValueError as error:
            raise DataError(f"the calibration {error}; make it again with fieldmark calibrate") from None


def calibrate_run(
    run: Run,
    *,
    wanted: str,
    wanted_value: float,
    assurance: float,
    folds: int,
    seed: int,
    taxonomy: Path | None = None,
) -> Calibration:
    """Fit temperature and threshold on the validation photos of a run and keep them in its folder.

    predict, serve and export use them from then on. With `taxonomy`, a table of class, genus, family, photos whose
    class is not sure get the finest group that is: groups are right as often as the answers of classes are wanted to be
    (for a wanted coverage: as they are).

    See `calibrate` for the other arguments.

    Raises:
        RunError: No validation predictions are stored.
        DataError: What is wanted cannot be had, or the taxonomy does not fit the run's classes.
    """
    stored = run.predictions("val")
    tree = load_taxonomy(taxonomy, run.classes) if taxonomy is not None else None
    found = calibrate(
        log_probabilities(stored.probabilities),
        stored.labels,
        wanted=wanted,
        wanted_value=wanted_value,
        assurance=assurance,
        folds=folds,
        seed=seed,
        taxonomy=tree,
    )
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    whole_or_absent(run.path / FILE, lambda part: part.write_text(text, encoding="utf-8"))
    return found


def load_calibration(run: Run) -> Calibration | None:
    """The calibration in a run's folder, or None if there is none.

    Raises:
        RunError: It cannot be read.
    """
    path = run.path / FILE
    if not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise DataError(f"the calibration is a {type(values).__name__}, not an object")
        return Calibration.from_dict(values, num_classes=len(run.classes))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}; remove it and calibrate again") from None
    except DataError as error:
        raise RunError(f"{path}: {error}; or remove the file") from None


def calibrate(
    logits: FloatArray,
    labels: IntArray,
    *,
    wanted: str,
    wanted_value: float,
    assurance: float,
    folds: int,
    seed: int,
    taxonomy: Taxonomy | None = None,
) -> Calibration:
    """Temperature from all photos, threshold and evidence from cross-fitted ones.

    A temperature whose cross-fitted log loss is above that of temperature 1 is refused: then probabilities stay as
    they are, and the threshold is chosen on them.

    Args:
        logits: (N, K) of photos that the model was not trained on.
        labels: (N,) class indices.
        wanted: "accuracy" or "coverage" of the answers, or "none" to answer everything.
        wanted_value: How much of it, in (0, 1]; ignored for "none".
        assurance: See `threshold_for_accuracy`.
        folds: See `cross_fitted`.
        seed: See `cross_fitted`.
        taxonomy: Groups to fall back to where a threshold is wanted; see `fit_fallback`.

    Raises:
        DataError: What is wanted cannot be had, or the arrays do not fit.
    """
    logits, labels = _checked(logits, labels)
    before, after = apply_temperature(logits, 1.0), cross_fitted(logits, labels, folds=folds, seed=seed)
    loss_before, loss_after = _mean_loss(before, labels), _mean_loss(after, labels)
    temperature = fit_temperature(logits, labels)
    is_refused = loss_after > loss_before
    kept = before if is_refused else after
    is_right, confidence = kept.argmax(axis=1) == labels, kept.max(axis=1)
    threshold = _choose_threshold(coverage_curve(confidence, is_right), wanted, wanted_value, assurance)
    answered = confidence >= threshold
    accuracy = float(is_right[answered].mean())
    fallback = None
    if taxonomy is not None and threshold > 0:
        share = accuracy if wanted == "coverage" else wanted_value
        fallback = fit_fallback(kept, labels, taxonomy, threshold=threshold, accuracy=share, assurance=assurance)
    return Calibration(
        temperature=1.0 if is_refused else temperature,
        threshold=threshold,
        wanted=wanted,
        wanted_value=1.0 if wanted == "none" else wanted_value,
        coverage=float(answered.mean()),
        accuracy=accuracy,
        num_photos=len(labels),
        log_loss_before=loss_before,
        log_loss_after=loss_before if is_refused else loss_after,
        calibration_error_before=calibration_error(before, labels),
        calibration_error_after=calibration_error(kept, labels),
        refused_temperature=temperature if is_refused else None,
        refused_log_loss=loss_after if is_refused else None,
        fallback=fallback,
    )


def fit_temperature(logits: FloatArray, labels: IntArray) -> float:
    """The temperature T in [0.05, 20] that makes (N,) labels most likely by softmax(logits / T), of (N, K) logits.

    The likelihood is convex in 1 / T, so this is the best.

    Raises:
        DataError: Shapes or labels do not fit, or a logit is not finite.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    logits, labels = _checked(logits, labels)
    rows = np.arange(len(labels))

    def loss(inverse: float) -> float:
        return float(-log_softmax(logits * inverse, axis=1)[rows, labels].mean())

    found = minimize_scalar(loss, bounds=(1 / _MAX_TEMPERATURE, 1 / _MIN_TEMPERATURE), method="bounded")
    return float(1 / found.x)


def apply_temperature(logits: FloatArray, temperature: float) -> FloatArray:
    """softmax(logits / temperature): (N, K) probabilities."""
    if not 0 < temperature < np.inf:
        raise DataError(f"a temperature must be above 0; got {temperature}")
    return np.asarray(softmax(np.asarray(logits, np.float64) / temperature, axis=1))


def log_probabilities(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K) logits up to a constant per row. Probabilities that float32 rounds to 0 count as its smallest number."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def cross_fitted(logits: FloatArray, labels: IntArray, *, folds: int, seed: int) -> FloatArray:
    """(N, K) calibrated probabilities in which no photo counts with a temperature that was fitted on it.

    The photos are divided by `seed` into `folds` parts, at least 2 and at most N; each is calibrated by the others.

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
        probabilities[inside] = apply_temperature(logits[inside], fit_temperature(logits[~inside], labels[~inside]))
    return probabilities


def _mean_loss(probabilities: FloatArray, labels: IntArray) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean())


def _choose_threshold(curve: CoverageCurve, wanted: str, value: float, assurance: float) -> float:
    if wanted == "accuracy":
        return threshold_for_accuracy(curve, value, assurance=assurance)
    if wanted == "coverage":
        return threshold_for_coverage(curve, value)
    if wanted != "none":
        raise DataError(f'a threshold is wanted for "accuracy", "coverage" or "none"; got {wanted!r}')
    return 0.0


def _checked(logits: FloatArray, labels: IntArray) -> tuple[FloatArray, IntArray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"calibration takes logits (N, K) and labels (N,), N at least 1; got {logits.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels must be class indices from 0 to {logits.shape[1] - 1}; got {labels.min()} to {labels.max()}. "
            "Leave unlabeled photos out"
        )
    if not np.isfinite(logits).all():
        raise DataError(
            f"{int((~np.isfinite(logits)).any(axis=1).sum())} of {len(logits)} photos have logits that are not finite; "
            "take the logarithm of probabilities with a floor above 0"
        )
    return logits, labels


def estimate_prior(probabilities: FloatArray, prior: FloatArray) -> NDArray[np.float64]:
    """The (K,) class shares among photos whose classes may come in other shares than in training.

    Args:
        probabilities: (N, K) calibrated.
        prior: (K,) share of each class in training. As many photos as there are classes are counted with these, in
            the shares of training: few photos change little, and no class is given up. Balance is not assumed.

    Source:
        Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural
        Computation 14 (2002), section 2.2 (expectation-maximization), here with a Dirichlet prior.
    """
    shares = np.asarray(prior, np.float64)
    for _ in range(1000):
        found = apply_prior(probabilities, prior, shares).sum(axis=0) + len(prior) * prior
        before, shares = shares, found / found.sum()
        if np.abs(shares - before).max() < 1e-7:
            break
    return shares


def apply_prior(probabilities: FloatArray, prior: FloatArray, shares: FloatArray) -> FloatArray:
    """(N, K) probabilities where the classes come in `shares` instead of `prior`, both (K,)."""
    ratio = np.divide(shares, prior, out=np.zeros(len(prior)), where=np.asarray(prior) > 0)
    weighted = np.asarray(probabilities, np.float64) * ratio
    total = weighted.sum(axis=1, keepdims=True)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1), probabilities)


def reliability_bins(confidence: FloatArray, is_right: NDArray[np.bool_], *, bins: int) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count of each equal-width bin of confidence that holds a photo.

    Source:
        Guo et al., arXiv:1706.04599, section 2 (reliability diagrams).
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(is_right, np.float64)
    index = confidence_bins(confidence, bins=bins)
    rows = [(number, index == number) for number in np.unique(index)]
    return [
        {
            "low": float(number / bins),
            "high": float((number + 1) / bins),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "count": int(inside.sum()),
        }
        for number, inside in rows
    ]


def describe_calibration(found: Calibration) -> str:
    """A few lines for people."""
    lines = [f"temperature       {found.temperature:.3f}, from {found.num_photos} validation photos"]
    if found.refused_temperature is not None:
        lines.append(
            f"                  (the fitted {found.refused_temperature:.3f} would raise the log loss from "
            f"{found.log_loss_before:.3f} to {found.refused_log_loss:.3f}: probabilities stay as they are. "
            "More validation photos may show a better one)"
        )
    lines += [
        f"log loss          {found.log_loss_before:.3f} before, {found.log_loss_after:.3f} after",
        f"calibration error {found.calibration_error_before:.3f} before, {found.calibration_error_after:.3f} after",
    ]
    if found.wanted == "none":
        lines.append('every photo is answered; ask for --accuracy or --coverage to allow "unknown"')
    else:
        lines.append(
            f"unknown           below {found.threshold:.3f}: {found.coverage:.1%} of the photos are answered, "
            f"{found.accuracy:.1%} of the answers are right (wanted: {found.wanted} {found.wanted_value:.1%})"
        )
    return "\n".join([*lines, "Numbers after calibration are cross-fitted: no photo counts with a fit to it."])


def save_calibration_figure(run: Run, found: Calibration) -> Path:
    """Draw the reliability diagram and the coverage-accuracy curve as RUN/calibration.png."""
    from matplotlib.figure import Figure

    stored = run.predictions("val")
    logits = log_probabilities(stored.probabilities)
    is_plain = found.refused_temperature is not None
    probabilities = apply_temperature(logits, 1.0) if is_plain else cross_fitted(logits, stored.labels, folds=5, seed=0)
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == stored.labels
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = reliability_bins(confidence, is_right, bins=15)
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    left.scatter(
        [row["confidence"] for row in bins],
        [row["accuracy"] for row in bins],
        s=[20 + 300 * row["count"] / len(confidence) for row in bins],
    )
    left.set(
        xlabel="mean probability of the answer", ylabel="share of right answers", xlim=(-0.02, 1.02), ylim=(-0.03, 1.03)
    )
    left.set_title("Reliability (area: number of photos)")
    curve = coverage_curve(confidence, is_right)
    right.step(curve.coverage, curve.accuracy, where="post")
    if found.threshold > 0:
        right.scatter([found.coverage], [found.accuracy], zorder=3)
        right.annotate(f"threshold {found.threshold:.2f}", (found.coverage, found.accuracy), textcoords="offset points",
                       xytext=(-8, -14), ha="right")  # fmt: skip
    right.set(xlabel="share of photos answered", ylabel="share of right answers", xlim=(0, 1.02))
    right.set_title("Coverage and accuracy")
    path = run.path / "calibration.png"
    whole_or_absent(path, lambda part: figure.savefig(part, format="png", dpi=120))
    return path
