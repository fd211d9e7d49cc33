"""Predict in parts, so that many workers share the work and what is done is never done again.

The photos are cut into pieces; each piece becomes one part file, whole or absent, whose key says of which photos and
of which model it is. A second call computes the parts that are missing. At the end the parts, in order, are the
prediction: as they lie, in a folder, or merged into one file.

    OUT/ or OUT.csv.parts/
        part-00000000.parquet ...   one a piece
        .predict/plan.json          what is predicted with what; another call must agree
        .predict/pieces/N.json      pieces whose part is missing; N.attempts has a byte for each attempt
        .predict/lock
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fieldmark.data.remote import PhotoSource, Piece, digest, to_json
from fieldmark.errors import DataError, PredictionError
from fieldmark.experiment.alone import alone
from fieldmark.experiment.dataset import Progress
from fieldmark.outputs.part_worker import (
    BOOKS,
    PartDone,
    PartTask,
    combined,
    model_fingerprint,
    piece_path,
)
from fieldmark.outputs.prediction_files import Form, check_ending, distinct, is_leaderboard, save_predictions
from fieldmark.outputs.prediction_parts import load_part, part_path, part_rows
from fieldmark.outputs.predictor import Prediction, Predictor

FORMAT = 1
PIECE_PHOTOS = 1024


class Executor(Protocol):
    """Has parts made, somewhere."""

    @property
    def threads(self) -> int:
        """`PartTask.threads`."""
        ...

    def run(self, task: PartTask, numbers: Sequence[int]) -> Iterator[PartDone]:
        """Make these parts, in any order; each is told once."""
        ...

    def stop(self) -> None:
        """No more is wanted."""
        ...


@dataclass(frozen=True)
class PartedPhotos:
    """Parts that are all there.

    Attributes:
        out: The file or folder.
        count: Photos.
        failed: Predictions of photos that could not be read.
    """

    out: Path
    count: int
    failed: list[Prediction]


def predict_in_parts(
    model: Path,
    source: PhotoSource,
    out: Path,
    *,
    form: Form,
    flips: bool,
    piece_photos: int,
    open_executor: Callable[[], Executor],
    progress: Progress,
) -> PartedPhotos:
    """Predict photos part by part; called again, only those that are missing.

    Args:
        model: Run folder or exported model.
        source: The photos.
        out: A file, by its ending; or a folder, which then holds the parts.
        form: Of a file; see `prediction_files.save_predictions`. Parts are long.
        flips: Average over each photo and its mirror image.
        piece_photos: Photos of a part, where a list can be cut; rounded up to whole batches.
        open_executor: Gives who computes; not called if nothing is missing.
        progress: Where to tell how far the work is.

    Raises:
        PredictionError: `out` was begun with other photos or another model, or cannot be written.
        DataError: The photos cannot be reached.
        RunError: No such model, or another call is at work.
    """
    is_file = bool(out.suffix) and not out.is_dir()
    if is_file:
        check_ending(out)
    predictor = Predictor.load(model, flips=flips)
    folder = (out.with_name(out.name + ".parts") if is_file else out).absolute()
    with _locked(folder):
        size = -(-piece_photos // predictor.batch_size) * predictor.batch_size
        fingerprint = model_fingerprint(model, flips=flips)
        keys = [combined([digest(piece), fingerprint]) for piece in source.cut(size)]
        _agree(folder, {"format": FORMAT, "model": fingerprint, "photos": combined(keys), "parts": len(keys)}, out)
        rows = [part_rows(part_path(folder, number), key=key) for number, key in enumerate(keys)]
        missing = {number for number, count in enumerate(rows) if count is None}
        done = sum(count for count in rows if count is not None) if source.count else len(keys) - len(missing)
        progress.start(source.count or len(keys), done)
        if missing:
            _save_pieces(folder, source.cut(size), missing)
            executor = open_executor()
            task = PartTask(str(model.absolute()), fingerprint, flips, str(folder), executor.threads)
            try:
                _run(executor, task, sorted(missing), progress, by_photos=bool(source.count))
            finally:
                executor.stop()
            shutil.rmtree(folder / BOOKS / "pieces", ignore_errors=True)
        count = _complete(folder, keys)
        predictions = _merged(folder, len(keys), predictor)
        if not is_file:
            return PartedPhotos(out, count, [prediction for prediction in predictions if prediction.problem])
        if is_leaderboard(out, form):
            predictions = distinct(predictions)
        has_groups = predictor.back_off is not None
        failed = save_predictions(predictions, out, classes=predictor.classes, form=form, has_groups=has_groups)
    shutil.rmtree(folder)
    return PartedPhotos(out, count, failed)


def _save_pieces(folder: Path, pieces: Iterable[Piece], missing: set[int]) -> None:
    waiting = piece_path(folder, 0).parent
    shutil.rmtree(waiting, ignore_errors=True)
    waiting.mkdir()
    for number, piece in enumerate(pieces):
        if number in missing:
            piece_path(folder, number).write_text(to_json(piece), encoding="ascii")


def _run(executor: Executor, task: PartTask, numbers: Sequence[int], progress: Progress, *, by_photos: bool) -> None:
    for done in executor.run(task, numbers):
        if done.problem:
            raise DataError(f"part {done.number} cannot be made: {done.problem}. What is done is kept; call again")
        progress.advance(done.rows if by_photos else 1)


def _agree(folder: Path, plan: dict[str, Any], out: Path) -> None:
    """Write the plan, or hold it against the one that is there."""
    path = folder / BOOKS / "plan.json"
    if not path.is_file():
        path.write_text(json.dumps(plan, indent=2), encoding="ascii")
        return
    before: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    # Parts' keys hold the model too, so the digest of the photos means something only beside the same model.
    reasons = {"format": "by another version", "model": "with another model (or other --flips)"}
    changed = next((reason for name, reason in reasons.items() if before.get(name) != plan[name]), "")
    if not changed and before != plan:
        changed = f"of other photos ({before['parts']} parts then, {plan['parts']} now; files may have changed)"
    if changed:
        raise PredictionError(f"{folder} was begun {changed}. Give another --out than {out}, or remove {folder}")


def _complete(folder: Path, keys: Sequence[str]) -> int:
    """Number of rows of all parts."""
    total = 0
    for number, key in enumerate(keys):
        rows = part_rows(part_path(folder, number), key=key)
        if rows is None:
            raise PredictionError(
                f"{part_path(folder, number)} is not there though it was made: let all machines share the folder of "
                "--out, and call again"
            )
        total += rows
    return total


def _merged(folder: Path, num_parts: int, predictor: Predictor) -> Iterator[Prediction]:
    for number in range(num_parts):
        part = part_path(folder, number)
        yield from load_part(
            part, classes=predictor.classes, threshold=predictor.threshold, back_off=predictor.back_off
        )


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """The folder with its books, for one call at a time."""
    try:
        if folder.exists() and not (folder / BOOKS).is_dir() and any(folder.iterdir()):
            raise PredictionError(f"{folder} exists and holds something else. Give another --out")
        (folder / BOOKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictionError(f"{folder} cannot be written: {error.strerror}") from None
    with alone(
        folder / BOOKS / "lock", busy=f"another predict is at work in {folder}: wait for it, or give another --out"
    ):
        yield
