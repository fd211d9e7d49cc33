"""How well a run does on labeled photos: metrics with intervals, a table of the classes, the confusion matrix.

Shape letters: N photos, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.index import PhotoIndex
from fieldmark.data.storage import is_url
from fieldmark.data.tables import write_csv
from fieldmark.errors import ResourceError, RunError
from fieldmark.files import fill_template, require_path, write_whole
from fieldmark.plots import confusion_figure, figure_png
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import folder
from fieldmark.runs.folder import PhotoPredictions, Run
from fieldmark.study.statistics import Difference, paired_difference
from fieldmark.training.metrics import confusion_matrix, summarize, wilson_interval

METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "macro_recall": "macro recall",
    "prior_top1": "top-1, weighted by training prior",
    "log_loss": "log loss (nats)",
    "calibration_error": "calibration error",
}
MOST_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class ClassScore:
    """Says how well one class is recognized."""

    name: str
    photos: int
    right: int  # of these, the ones found
    recall: float  # NaN without photos
    recall_low: float  # 95 % Wilson interval
    recall_high: float
    precision: float  # share of the photos given this name that deserve it; NaN if none was given it
    taken_for: str  # the class it is most often mistaken for; "" if never
    taken_for_photos: int


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Says how well a run does on one split.

    Attributes:
        split: Name of the split.
        classes: K class names.
        metrics: top1, top5, macro_recall, prior_top1, log_loss, calibration_error.
        top1_interval: 95 % Wilson interval of top1.
        predictions: Paths, labels and probabilities behind them.
        confusion: (K, K) counts; row: the true class, column: the predicted one.
        flips: What test-time augmentation adds to the top-1 accuracy, where that was asked for.

    Examples:
        >>> found = fieldmark.evaluate("runs/mine")
        >>> found.confusion.shape, found.predictions.probabilities.shape
        ((3, 3), (4, 3))
    """

    split: str
    classes: tuple[str, ...]
    metrics: dict[str, float]
    top1_interval: tuple[float, float]
    predictions: PhotoPredictions
    confusion: NDArray[np.int64]
    flips: Difference | None = None

    def __repr__(self) -> str:
        """A table for people: the metrics, then the classes with the lowest recall."""
        values = {"found": self, "titles": METRIC_NAMES, "rows": self.score_classes(), "most": MOST_CLASSES_SHOWN}
        return fill_template("evaluation.md", values)

    def score_classes(self) -> list[ClassScore]:
        """One row per class, in order of class index."""
        scores: list[ClassScore] = []
        for number, row in enumerate(self.confusion.copy()):
            photos, right, named = int(row.sum()), int(row[number]), int(self.confusion[:, number].sum())
            row[number] = 0
            low, high = wilson_interval(right, photos)
            score = ClassScore(
                name=self.classes[number],
                photos=photos,
                right=right,
                recall=right / photos if photos else math.nan,
                recall_low=low,
                recall_high=high,
                precision=right / named if named else math.nan,
                taken_for=self.classes[int(row.argmax())] if row.any() else "",
                taken_for_photos=int(row.max()),
            )
            scores.append(score)
        return scores

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; undefined metrics are None."""
        rows = [{key: _defined(value) for key, value in asdict(row).items()} for row in self.score_classes()]
        return {
            "split": self.split,
            "photos": len(self.predictions.labels),
            "metrics": {name: _defined(value) for name, value in self.metrics.items()},
            "top1_interval": list(self.top1_interval),
            "classes": rows,
            "confusion": self.confusion.tolist(),
        } | ({} if self.flips is None else {"flips": asdict(self.flips)})


def evaluate(
    run: Run | str | Path,
    *,
    split: str = "val",
    data: str | Path | None = None,
    flips: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict a labeled split of a run's photos anew, and store the predictions in the run folder.

    Args:
        run: The run.
        split: `train`, `val` or `test`.
        data: Where the photos are now; None is where they were.
        flips: Test-time augmentation: average the logits of each photo and its mirror image. Such predictions are not
            stored: those of the run are of the photos as they are.
        progress: Reports how far the work is.

    Raises:
        RunError: The run has no such labeled photos, or the folder that they were in is gone.
        DataError: `data` does not exist.
        PhotoError: A photo broke or vanished.

    Examples:
        >>> 0 <= fieldmark.evaluate("runs/mine", split="val").metrics["top1"] <= 1
        True
    """
    from fieldmark.inference.predictor import predict_split

    run = run if isinstance(run, Run) else Run(run)
    index = run.split
    if data is not None:
        index = replace(index, root=str(data) if is_url(str(data)) else require_path(Path(data)))
    if isinstance(index.root, Path) and not index.root.exists():
        raise RunError(f"the photos of {run.path} were in {index.root}, which is gone: say where they are with --data")
    numbers, progress = labeled_photos(run, index, split), progress or Quiet()
    known = run.data_info.get("fingerprint")
    if known is not None and index.fingerprint() != known:
        progress.message(
            f"warning: the photos under {index.root} are not all as they were when {run.path} was trained (their "
            "fingerprint differs): the result is of the photos as they are now"
        )
    labels, paths = index.label_numbers()[numbers], tuple(index.photos.paths[numbers])
    probabilities = predict_split(run, index, numbers, flips=flips, progress=progress)
    if not flips:
        path = run.path / "predictions" / f"{split}.parquet"
        folder.write_predictions(path, paths=paths, labels=labels, probabilities=probabilities, classes=run.classes)
    return score_predictions(run, PhotoPredictions(paths, labels, probabilities), split)


def labeled_photos(run: Run, index: PhotoIndex, split: str) -> NDArray[np.int64]:
    """(N,) the labeled photos of a split, as numbers of the index; at least one."""
    numbers = index.numbers(split)
    if split == "val" and run.config.data.train_on == "train+val":
        raise RunError(
            f"{run.path} was trained on train+val: its validation photos are no test of it. Give another split"
        )
    if not len(numbers):
        there = [part for part in index.select(index.photos.is_labeled()).count_splits() if part]
        raise RunError(f"{run.path} has no labeled photos in {split!r}; it has {', '.join(there)}")
    return numbers


def evaluate_run(path: Path, *, split: str, data: str | None, flips: bool, progress: Progress) -> Evaluation:
    """Evaluate a split, by its stored predictions if `data` is None and there are some; with `flips` also by those."""
    run = Run(path)
    if data is None and (path / "predictions" / f"{split}.parquet").is_file():
        found = score_predictions(run, run.predictions(split), split)
    else:
        found = evaluate(run, split=split, data=data, progress=progress)
    if not flips:
        return found
    both = evaluate(run, split=split, data=data, flips=True, progress=progress)
    answers = (align_rows(found.predictions, both.predictions.paths), both.predictions)
    hits = [(one.probabilities.argmax(axis=1) == one.labels).astype(np.float64)[None] for one in answers]
    return replace(both, flips=paired_difference(*hits, level=0.95))


def align_rows(predictions: PhotoPredictions, paths: Sequence[str]) -> PhotoPredictions:
    """Predictions of the same photos in the order of `paths`."""
    row = {path: number for number, path in enumerate(predictions.paths)}
    order = [row[path] for path in paths]
    return PhotoPredictions(tuple(paths), predictions.labels[order], predictions.probabilities[order])


def score_predictions(run: Run, predictions: PhotoPredictions, split: str) -> Evaluation:
    """Compare predictions of labeled photos with their labels, by the classes and the prior of a run."""
    labels = predictions.labels
    broken = int((~np.isfinite(predictions.probabilities)).any(axis=1).sum())
    if broken:
        raise RunError(
            f"{split!r} cannot be evaluated: the predictions of {broken} of its {len(labels)} photos are not finite, "
            "so the weights that gave them are damaged. Train again, or restore the file"
        )
    confusion = confusion_matrix(predictions.probabilities.argmax(axis=1), labels, num_classes=len(run.classes))
    scores = summarize(predictions.probabilities, labels, run.prior)
    interval = wilson_interval(int(np.trace(confusion)), len(labels))
    return Evaluation(split, run.classes, scores, interval, predictions, confusion)


def save_evaluation(found: Evaluation, path: Path) -> list[Path]:
    """Write evaluation.json, classes.csv, confusion.csv and confusion.png into a folder; each is whole or absent."""
    names, content, rows = found.classes, found.as_dict(), found.confusion.tolist()
    files = [path / name for name in ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png")]
    make_output_folder(path)
    folder.write_json(files[0], content)
    write_csv(files[1], list(content["classes"][0]), [list(row.values()) for row in content["classes"]])
    write_csv(files[2], ["true \\ predicted", *names], [[name, *row] for name, row in zip(names, rows, strict=True)])
    write_whole(files[3], figure_png(confusion_figure(found.confusion, names)[0]))
    return files


def make_output_folder(path: Path) -> None:
    """Make the folder of `--out`, before any work that would be lost without it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path} cannot be made: {error.strerror}. Give another folder as --out") from None


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
