"""What `fieldmark predict` does: a model, photos, a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldmark.data.index import Photo, PhotoIndex
from fieldmark.errors import PredictionError
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.inference.sources import PhotoSource, open_source, split_list
from fieldmark.inference.writers import (
    Form,
    check_sample,
    choose_form,
    in_sample_order,
    json_row,
    leaderboard_names,
    save_predictions,
)
from fieldmark.progress import Progress

MOST_FAILURES_TOLD = 20
PHOTOS_BETWEEN_LINES = 10_000


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
        if len(self.shown) == 1 and not self.shown[0].problem:
            [only] = self.shown
            lines = [f"{probability:7.2%}  {name}" for name, probability in only.top(3)]
            return "\n".join([*lines, *_doubt(only)])
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
    photos: str | Path,
    out: Path | None,
    *,
    form: Form | None,
    sample: Path | None,
    sample_order: bool,
    flips: bool,
    progress: Progress,
    ray: str | None = None,
) -> PredictedPhotos:
    """Ask a model about photos, in their order, and write a file.

    Names and sample are checked before the first photo is read (of tar files as they are read).

    Args:
        model: Run folder or exported model.
        photos: What `data.remote.open_source` takes: a folder, a photo, a list or shards, here or behind a URL.
        out: The file, or None to keep the predictions in memory. On Ray also a folder, for the parts as they are.
        form: See `prediction_files.save_predictions`.
        sample: Sample submission that the rows must match, for the leaderboard form.
        sample_order: Follow the sample's order instead of the files'.
        flips: Average over each photo and its mirror image.
        progress: Where to tell how far the work is.
        ray: Address of a Ray cluster that shares the work, "" for one on this machine, None for no Ray.

    Raises:
        PredictionError: Names or sample do not fit, or the file cannot be written.
        RunError: No such model.
        DataError: No photos.
        MissingExtraError: Ray, or the package for a kind of storage, is not installed.
    """
    if sample_order and sample is None:
        raise PredictionError("--sample-order follows a sample submission: give it with --sample FILE")
    source = open_source(str(photos))
    if out is not None and (out.suffix or ray is None) and not out.is_dir():
        form = choose_form(out, form, has_sample=sample is not None)
    has_ids = out is not None and form == "leaderboard"
    if ray is not None:
        if out is None or sample_order:
            raise PredictionError("--ray writes parts in the order of the photos: give --out, and no --sample-order")
        _check_names(source, sample, has_ids=has_ids)
        return _predict_on_ray(model, source, out, form=form, flips=flips, ray=ray, progress=progress)
    predictor = Predictor.load(model, flips=flips)
    if sample is not None and sample_order:
        source = _ordered(source, sample)
    _check_names(source, sample, has_ids=has_ids)
    predictions = _Told(_predictions(predictor, source), source, progress)
    if out is None:
        shown = list(predictions)
        failed = [prediction for prediction in shown if prediction.problem]
        return PredictedPhotos(None, len(shown), failed, shown)
    has_groups = predictor.fallback is not None
    failed = save_predictions(predictions, out, classes=predictor.classes, form=form, has_groups=has_groups)
    return PredictedPhotos(out, predictions.count, failed)


def _predict_on_ray(
    model: Path, source: PhotoSource, out: Path, *, form: Form | None, flips: bool, ray: str, progress: Progress
) -> PredictedPhotos:
    from fieldmark.inference.bulk import PIECE_PHOTOS, RayParts, predict_in_parts

    done = predict_in_parts(
        model,
        source,
        out,
        form=form,
        flips=flips,
        piece_photos=PIECE_PHOTOS,
        open_executor=lambda: RayParts(ray, cpus=1),
        progress=progress,
    )
    return PredictedPhotos(done.out, done.count, done.failed)


def _predictions(predictor: Predictor, source: PhotoSource) -> Iterator[Prediction]:
    if source.root is None:
        return predictor.predict_named(source.read(predictor.batch_size))
    # Files in a folder of this machine: other processes can read them.
    photos = tuple(Photo(name, None, "", "") for name in source.names())
    return predictor.predict_index(PhotoIndex(Path(source.root), photos, (), {}))


def _check_names(source: PhotoSource, sample: Path | None, *, has_ids: bool) -> None:
    """Of tar files only against a sample: to learn their names is to read them."""
    if sample is not None or (has_ids and source.count is not None):
        names = leaderboard_names(source.names())
        if sample is not None:
            check_sample(names, sample)


def _ordered(source: PhotoSource, sample: Path) -> PhotoSource:
    if source.root is None:
        raise PredictionError(
            f"--sample-order reorders a folder of this machine, which {source.name} is not. Give the photos as a list, "
            "a CSV file with a column `path`, in the wanted order"
        )
    root, paths = source.root, in_sample_order(list(source.names()), sample)
    return replace(source, cut=lambda size: split_list(root, iter(paths), size))


class _Told:
    """Predictions on their way, counted, and told as progress."""

    def __init__(self, predictions: Iterable[Prediction], source: PhotoSource, progress: Progress) -> None:
        self._predictions = predictions
        self._total = source.count
        self._progress = progress
        self.count = 0

    def __iter__(self) -> Iterator[Prediction]:
        if self._total is not None:
            self._progress.start(self._total, 0)
        for prediction in self._predictions:
            yield prediction
            self.count += 1
            if self._total is not None:
                self._progress.advance(1)
            elif self.count % PHOTOS_BETWEEN_LINES == 0:
                self._progress.message(f"{self.count} photos")


def _line(prediction: Prediction) -> str:
    if prediction.problem:
        return f"{prediction.path}\t(could not be read: {prediction.problem})"
    notes = [prediction.path, prediction.label, f"{prediction.probability:.4f}", *_doubt(prediction)]
    return "\t".join(notes)


def _doubt(prediction: Prediction) -> list[str]:
    """That the model is not sure enough of the class, and of what it is sure instead; nothing where it is."""
    if prediction.problem or not prediction.is_unknown:
        return []
    answer = prediction.answer
    return [f"unknown, but {answer.level} {answer.name} {answer.probability:.4f}" if answer.level else "unknown"]
