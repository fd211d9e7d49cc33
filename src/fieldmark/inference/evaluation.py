"""What `fieldmark evaluate` tells: figures with intervals, a table of the classes, the confusion matrix.

Shape letters: N photos, K classes.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError
from fieldmark.files import require_path, whole_or_absent
from fieldmark.plots import confusion_figure, figure_png
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import folder
from fieldmark.runs.folder import PhotoPredictions, Run
from fieldmark.study.statistics import Difference, paired_difference
from fieldmark.training import metrics
from fieldmark.training.metrics import confusion_matrix, summarize, wilson_interval

METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "macro_recall": "macro recall",
    "prior_top1": "top-1, weighted by training prior",
    "log_loss": "log loss (nats)",
    "calibration_error": "calibration error",
}


@dataclass(frozen=True)
class ClassScore:
    """How one class fares.

    Attributes:
        name: The class.
        photos: Photos of it.
        right: Of these, the ones found.
        recall: `right` over `photos`; NaN without photos.
        recall_low, recall_high: 95 % Wilson interval of `recall`.
        precision: Share of the photos given this name that deserve it; NaN if none was given it.
        taken_for: The class it is most often mistaken for; "" if never.
        taken_for_photos: How often.
    """

    name: str
    photos: int
    right: int
    recall: float
    recall_low: float
    recall_high: float
    precision: float
    taken_for: str
    taken_for_photos: int


@dataclass(frozen=True, eq=False)
class Scores:
    """All figures of one evaluation.

    Attributes:
        split: What was judged.
        photos: N.
        metrics: As `engine.metrics.summarize` gives them.
        top1_low, top1_high: 95 % Wilson interval of the top-1 accuracy.
        classes: One per class, in order of class number.
        confusion: (K, K) counts; row: the true class, column: the predicted one.
        flips: What averaging over mirror images adds to the top-1 accuracy, where that was asked for.
    """

    split: str
    photos: int
    metrics: dict[str, float]
    top1_low: float
    top1_high: float
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    flips: Difference | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; undefined figures are None."""
        return {
            "split": self.split,
            "photos": self.photos,
            "metrics": {name: _defined(value) for name, value in self.metrics.items()},
            "top1_interval": [self.top1_low, self.top1_high],
            "classes": [{key: _defined(value) for key, value in asdict(row).items()} for row in self.classes],
            "confusion": self.confusion.tolist(),
        } | ({} if self.flips is None else {"flips": asdict(self.flips)})


def evaluate_run(path: Path, *, split: str, data: Path | None, flips: bool, progress: Progress) -> Scores:
    """Judge one split of a run.

    Stored predictions of the kept weights are used where there are some, so this needs no photos then; else the photos
    are predicted, and the predictions stored.

    Args:
        path: The run folder.
        split: `val`, `test` or `train`.
        data: Where the photos are now; predicts them anew. None is where they were.
        flips: Judge the mean of each photo and its mirror image, and tell what that changes.
        progress: Where to tell how far the work is.

    Raises:
        RunError: No such run, or no labelled photos in `split`.
        PhotoError: A photo broke or vanished.
    """
    from fieldmark.runs.folder import Run

    run = Run(path)
    if data is None and (path / "predictions" / f"{split}.parquet").is_file():
        stored = run.predictions(split)
    else:
        stored = evaluate(run, split=split, data=data, progress=progress).predictions
    if not flips:
        return score(stored.probabilities, stored.labels, run.classes, run.prior, split=split)
    both = evaluate(run, split=split, data=data, flips=True, progress=progress).predictions
    place = {name: number for number, name in enumerate(stored.paths)}
    plain = stored.probabilities[[place[name] for name in both.paths]]
    scores = score(both.probabilities, both.labels, run.classes, run.prior, split=split)
    hits = [(found.argmax(axis=1) == both.labels).astype(np.float64)[None] for found in (plain, both.probabilities)]
    rng = np.random.default_rng(0)
    return replace(scores, flips=paired_difference(*hits, level=0.95, draws=10_000, rng=rng))


def score(
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    prior: NDArray[np.float64],
    *,
    split: str,
) -> Scores:
    """Judge predictions of labelled photos.

    Args:
        probabilities: (N, K) float32.
        labels: (N,) int64 class numbers.
        classes: K names.
        prior: (K,) share of each class in training.
        split: What the photos are, for the record.

    Raises:
        RunError: No photo, or one without a label.
    """
    if not len(labels) or (labels < 0).any():
        unlabelled = int((labels < 0).sum())
        raise RunError(
            f"{split!r} cannot be evaluated: {unlabelled} of its {len(labels)} photos have no label. "
            "Evaluate a labelled split, or use `fieldmark predict`"
        )
    confusion = confusion_matrix(probabilities.argmax(axis=1), labels, num_classes=len(classes))
    low, high = wilson_interval(int(np.trace(confusion)), len(labels))
    return Scores(
        split=split,
        photos=len(labels),
        metrics=summarize(probabilities, labels, prior),
        top1_low=low,
        top1_high=high,
        classes=tuple(_class_score(number, confusion, classes) for number in range(len(classes))),
        confusion=confusion,
    )


def _class_score(number: int, confusion: NDArray[np.int64], classes: Sequence[str]) -> ClassScore:
    row = confusion[number].copy()
    photos, right, named = int(row.sum()), int(row[number]), int(confusion[:, number].sum())
    row[number] = 0
    low, high = wilson_interval(right, photos)
    return ClassScore(
        name=classes[number],
        photos=photos,
        right=right,
        recall=right / photos if photos else math.nan,
        recall_low=low,
        recall_high=high,
        precision=right / named if named else math.nan,
        taken_for=classes[int(row.argmax())] if row.any() else "",
        taken_for_photos=int(row.max()),
    )


def format_scores(scores: Scores, *, most_classes: int = 20) -> str:
    """A table for people: the figures, then the classes with the lowest recall."""
    lines = [f"{scores.split}: {scores.photos} photos, {len(scores.classes)} classes", ""]
    for name, title in METRIC_NAMES.items():
        if name == "top5" and len(scores.classes) <= 5:
            continue
        interval = f"  ({scores.top1_low:.4f} to {scores.top1_high:.4f})" if name == "top1" else ""
        lines.append(f"{title:36}{scores.metrics[name]:.4f}{interval}")
    if scores.flips is not None:
        change = scores.flips.interval
        lines.append(
            f"{'by flips, points of top-1':36}{100 * change.estimate:+.1f}  "
            f"({100 * change.low:+.1f} to {100 * change.high:+.1f}; p = {scores.flips.p_value:.2g})"
        )
    worst = sorted((row for row in scores.classes if row.photos), key=lambda row: (row.recall, -row.photos))
    shown = worst[:most_classes]
    width = min(max(len(row.name) for row in shown), 40)
    head = "classes" if len(shown) == len(scores.classes) else f"{len(shown)} classes with the lowest recall"
    lines += ["", f"{head}:", f"{'class':{width}}  photos  recall  95 % interval    precision  taken for"]
    for row in shown:
        other = f"{row.taken_for} ({row.taken_for_photos})" if row.taken_for else ""
        interval = f"{row.recall_low:.3f} to {row.recall_high:.3f}"
        precision = "-" if math.isnan(row.precision) else f"{row.precision:.3f}"
        line = f"{row.name[:width]:{width}}  {row.photos:6d}  {row.recall:6.3f}  {interval}  {precision:>9}  {other}"
        lines.append(line.rstrip())
    absent = [row.name for row in scores.classes if not row.photos]
    if absent:
        lines.append(f"without a photo here: {', '.join(absent[:10])}{' ...' if len(absent) > 10 else ''}")
    return "\n".join(lines)


def save_scores(scores: Scores, folder: Path) -> list[Path]:
    """Write evaluation.json, classes.csv, confusion.csv and confusion.png; each file is whole or absent.

    Returns:
        The files, in this order.

    Raises:
        ResourceError: A file cannot be written.
    """
    names = [row.name for row in scores.classes]
    contents = {
        "evaluation.json": (json.dumps(scores.as_dict(), indent=2) + "\n").encode(),
        "classes.csv": _csv_bytes(
            [list(ClassScore.__dataclass_fields__), *(list(asdict(row).values()) for row in scores.classes)]
        ),
        "confusion.csv": _csv_bytes(
            [["true \\ predicted", *names], *([name, *row] for name, row in zip(names, scores.confusion, strict=True))]
        ),
        "confusion.png": figure_png(confusion_figure(scores.confusion, names)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        _write(folder / name, content)
    return [folder / name for name in contents]


def _write(path: Path, content: bytes) -> None:
    whole_or_absent(path, lambda part: part.write_bytes(content))


def _csv_bytes(rows: Sequence[Sequence[Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["" if value != value else value for value in row] for row in rows])
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Evaluation:
    """How well a run does on one split.

    Attributes:
        split: Name of the split.
        classes: K class names.
        figures: top1, top5, macro_recall, prior_top1, log_loss, calibration_error.
        top1_interval: 95 % Wilson interval of top1.
        predictions: Paths, labels and probabilities behind them.
    """

    split: str
    classes: tuple[str, ...]
    figures: dict[str, float]
    top1_interval: tuple[float, float]
    predictions: PhotoPredictions


def evaluate(
    run: Run | str | Path,
    *,
    split: str = "val",
    data: str | Path | None = None,
    flips: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict a labelled split of a run's photos anew, and store the predictions in the run folder.

    Args:
        run: The run.
        split: `train`, `val` or `test`.
        data: Where the photos are now; None is where they were.
        flips: Average the logits of each photo and its mirror image. Such predictions are not stored: those of the
            run are of the photos as they are.
        progress: Where to tell how far the work is.

    Raises:
        RunError: The run has no such labelled photos, or the folder that they were in is gone.
        DataError: `data` does not exist.
        PhotoError: A photo broke or vanished.
    """
    from fieldmark.inference.predictor import predict_photos

    run = run if isinstance(run, Run) else Run(run)
    index = run.split if data is None else replace(run.split, root=require_path(Path(data)))
    if not index.root.exists():
        raise RunError(f"the photos of {run.path} were in {index.root}, which is gone: say where they are with --data")
    labels = index.label_numbers()
    numbers = np.asarray(
        [place for place, photo in enumerate(index.photos) if photo.split == split and labels[place] >= 0], np.int64
    )
    if not len(numbers):
        there = sorted({photo.split for photo in index.photos})
        raise RunError(f"{run.path} has no labelled photos in {split!r}; it has {', '.join(there)}")
    probabilities = predict_photos(run, index, numbers, flips=flips, progress=progress or Quiet())
    paths = tuple(index.photos[number].path for number in numbers)
    if not flips:
        folder.write_predictions(
            run.path / "predictions" / f"{split}.parquet",
            paths=paths,
            labels=labels[numbers],
            probabilities=probabilities,
            classes=run.classes,
        )
    return judged(run, PhotoPredictions(paths, labels[numbers], probabilities), split=split)


def judged(run: Run, predictions: PhotoPredictions, *, split: str) -> Evaluation:
    """The figures of stored predictions."""
    figures = metrics.summarize(predictions.probabilities, predictions.labels, run.prior)
    total = len(predictions.labels)
    interval = metrics.wilson_interval(round(figures["top1"] * total), total)
    return Evaluation(split, run.classes, figures, interval, predictions)
