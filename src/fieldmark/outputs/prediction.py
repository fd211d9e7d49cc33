"""What `fieldmark predict` does: a model, photos, a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldmark.data.index import PhotoIndex, list_photos
from fieldmark.errors import PredictionError
from fieldmark.experiment.dataset import Progress
from fieldmark.outputs.prediction_files import (
    Form,
    check_sample,
    in_sample_order,
    json_row,
    leaderboard_names,
    save_predictions,
)
from fieldmark.outputs.predictor import Prediction, Predictor

MOST_FAILURES_TOLD = 20


@dataclass
class PredictedPhotos:
    """What came of it.

    Attributes:
        out: The file that was written, or None.
        count: Photos asked about.
        failed: Predictions of photos that could not be read.
        shown: All predictions where no file was asked for, else none.
    """

    out: Path | None
    count: int
    failed: list[Prediction]
    shown: list[Prediction] = field(default_factory=list[Prediction])

    def rows(self) -> list[dict[str, Any]]:
        """The shown predictions as plain data."""
        return [json_row(prediction) for prediction in self.shown]

    def as_dict(self) -> dict[str, Any]:
        """What was written, for machines."""
        failed = [{"path": prediction.path, "problem": prediction.problem} for prediction in self.failed]
        return {"out": str(self.out), "rows": self.count, "failed": failed}

    def table(self) -> str:
        """The shown predictions for people: one line each, up to three classes for a single photo."""
        if len(self.shown) == 1:
            return "\n".join(f"{probability:7.2%}  {name}" for name, probability in self.shown[0].top(3))
        return "\n".join(_line(prediction) for prediction in self.shown)

    def failure_message(self) -> str:
        """Which photos could not be read, and why."""
        lines = [f"  {prediction.path!r} {prediction.problem}" for prediction in self.failed[:MOST_FAILURES_TOLD]]
        left = len(self.failed) - len(lines)
        more = [f"  ... and {left} more"] if left else []
        head = f"error: {len(self.failed)} of {self.count} photos could not be read; their rows have no label:"
        return "\n".join([head, *lines, *more])


def predict_photos(
    model: Path,
    photos: Path,
    out: Path | None,
    *,
    form: Form,
    sample: Path | None,
    sample_order: bool,
    flips: bool,
    progress: Progress,
) -> PredictedPhotos:
    """Ask a model about a folder of photos, in natural file order, and write a file.

    Names and sample are checked before the first photo is read.

    Args:
        model: Run folder or exported model.
        photos: A folder, or one photo.
        out: The file, or None to keep the predictions in memory.
        form: See `prediction_files.save_predictions`.
        sample: Sample submission that the rows must match, for the leaderboard form.
        sample_order: Follow the sample's order instead of the files'.
        flips: Average over each photo and its mirror image.
        progress: Where to tell how far the work is.

    Raises:
        PredictionError: Names or sample do not fit, or the file cannot be written.
        RunError: No such model.
        DataError: No photos.
    """
    if sample_order and sample is None:
        raise PredictionError("--sample-order follows a sample submission: give it with --sample FILE")
    predictor = Predictor.load(model, flips=flips)
    index = list_photos(photos)
    if sample is not None and sample_order:
        index = _ordered(index, sample)
    if sample is not None or (out is not None and form == "leaderboard" and out.suffix.lower() in (".csv", ".zip")):
        names = leaderboard_names([photo.path for photo in index.photos])
        if sample is not None:
            check_sample(names, sample)
    progress.start(len(index.photos), 0)
    predictions = _counted(predictor.predict_index(index), progress)
    if out is None:
        shown = list(predictions)
        failed = [prediction for prediction in shown if prediction.problem]
        return PredictedPhotos(None, len(shown), failed, shown)
    failed = save_predictions(predictions, out, classes=predictor.classes, form=form)
    return PredictedPhotos(out, len(index.photos), failed)


def _ordered(index: PhotoIndex, sample: Path) -> PhotoIndex:
    by_path = {photo.path: photo for photo in index.photos}
    return replace(index, photos=tuple(by_path[path] for path in in_sample_order(list(by_path), sample)))


def _counted(predictions: Iterable[Prediction], progress: Progress) -> Iterator[Prediction]:
    for prediction in predictions:
        yield prediction
        progress.advance(1)


def _line(prediction: Prediction) -> str:
    if prediction.problem:
        return f"{prediction.path}\t(could not be read: {prediction.problem})"
    note = "\tunknown" if prediction.is_unknown else ""
    return f"{prediction.path}\t{prediction.label}\t{prediction.probability:.4f}{note}"
