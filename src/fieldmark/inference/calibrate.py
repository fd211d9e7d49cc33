"""The calibration of a run: fitted on its stored validation predictions, kept in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.errors import RunError
from fieldmark.files import whole_or_absent
from fieldmark.inference.calibration import (
    Calibration,
    calibrate,
    coverage_curve,
    cross_fitted,
    log_probabilities,
    reliability_bins,
)
from fieldmark.inference.taxonomy import BackOff, fit_back_off, load_taxonomy

if TYPE_CHECKING:
    from fieldmark.runs.folder import Run


FILE = "calibration.json"
BACK_OFF = "back_off"


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

    predict, serve and export use them from then on. See `engine.calibrate.calibrate` for the other arguments. With
    `taxonomy`, a table of class, genus, family, photos whose class is not sure get the finest group that is: groups are
    right as often as the answers of classes are wanted to be (for a wanted coverage: as they are).

    Raises:
        RunError: No validation predictions are stored.
        DataError: What is wanted cannot be had, or the taxonomy does not fit the run's classes.
    """
    from fieldmark.runs.folder import write_json

    stored = run.predictions("val")
    tree = load_taxonomy(taxonomy, run.classes) if taxonomy is not None else None
    logits = log_probabilities(stored.probabilities)
    found = calibrate(
        logits,
        stored.labels,
        wanted=wanted,
        wanted_value=wanted_value,
        assurance=assurance,
        folds=folds,
        seed=seed,
    )
    values = found.to_dict()
    if tree is not None and found.threshold > 0:
        groups = fit_back_off(
            cross_fitted(logits, stored.labels, folds=folds, seed=seed),
            stored.labels,
            tree,
            threshold=found.threshold,
            accuracy=found.accuracy if wanted == "coverage" else wanted_value,
            assurance=assurance,
        )
        values[BACK_OFF] = groups.to_dict()
    write_json(run.path / FILE, values)
    return found


def load_back_off(run: Run) -> BackOff | None:
    """The taxonomy of a run's calibration, or None if it was calibrated without one.

    Raises:
        RunError: The file cannot be read.
    """
    values = _stored(run)
    return BackOff.from_dict(values[BACK_OFF]) if values and BACK_OFF in values else None


def describe_calibration(found: Calibration) -> str:
    """A few lines for people."""
    lines = [
        f"temperature       {found.temperature:.3f}, from {found.num_photos} validation photos",
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
    return "\n".join(
        [*lines, "Figures after calibration are cross-fitted: no photo is judged by what was fitted on it."]
    )


def save_calibration_figure(run: Run, found: Calibration) -> Path:
    """Draw the reliability diagram and the coverage-accuracy curve as RUN/calibration.png."""
    from matplotlib.figure import Figure

    stored = run.predictions("val")
    probabilities = cross_fitted(log_probabilities(stored.probabilities), stored.labels, folds=5, seed=0)
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


def load_calibration(run: Run) -> Calibration | None:
    """The calibration in a run's folder, or None if there is none.

    Raises:
        RunError: It cannot be read.
    """
    values = _stored(run)
    return Calibration.from_dict(values) if values else None


def _stored(run: Run) -> dict[str, Any] | None:
    path = run.path / FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON: {error}; remove it and calibrate again") from None
