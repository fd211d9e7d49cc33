"""What a worker does of a prediction in parts: one piece of the photos becomes one part file, whole or absent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fieldmark.data.remote import Piece, digest, from_json, read_ahead
from fieldmark.errors import FieldmarkError, ResourceError, RunError
from fieldmark.outputs.prediction_parts import part_path, save_part
from fieldmark.outputs.predictor import Predictor

BOOKS = ".predict"
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class PartTask:
    """What a worker must know; plain, so that it can be sent.

    Attributes:
        model: Run folder or export, by a path that is the same on every machine.
        fingerprint: Of the model; a worker that sees another refuses.
        flips: Average over each photo and its mirror image.
        folder: Of the parts, the same on every machine.
        threads: Of one worker; 0 leaves it to the libraries.
    """

    model: str
    fingerprint: str
    flips: bool
    folder: str
    threads: int


class PartDone(NamedTuple):
    """What came of one part."""

    number: int
    rows: int
    problem: str
    """Why there is no part, for the user; "" if there is."""


class PartWorker:
    """Makes parts, one after another, with one model."""

    def __init__(self, task: PartTask) -> None:
        self._task = task
        self._predictor: Predictor | None = None

    def __call__(self, number: int) -> PartDone:
        """Make one part; whoever died in the middle of it left nothing."""
        try:
            return PartDone(number, self._make(number), "")
        except FieldmarkError as error:
            return PartDone(number, 0, str(error))

    def _make(self, number: int) -> int:
        folder = Path(self._task.folder)
        _count_attempt(folder, number)
        predictor = self._predictor = self._predictor or self._load()
        piece = load_piece(folder, number)
        photos = read_ahead(piece.read(), predictor.batch_size)
        predictions = list(predictor.predict_named(photos, threads=self._task.threads or None))
        key = combined([digest(piece), self._task.fingerprint])
        save_part(part_path(folder, number), predictions, classes=predictor.classes, key=key)
        return len(predictions)

    def _load(self) -> Predictor:
        task = self._task
        if self._task.threads:
            import torch

            torch.set_num_threads(task.threads)
        if model_fingerprint(Path(task.model), flips=task.flips) != task.fingerprint:
            raise RunError(f"{task.model} is another model on this worker: let all machines see the same folder")
        return Predictor.load(task.model, flips=task.flips)


def model_fingerprint(model: Path, *, flips: bool) -> str:
    """64 hex digits over the files that a model's answers depend on.

    Raises:
        RunError: One of them cannot be read.
    """
    from fieldmark.experiment.folder import CLASSES, ENSEMBLE, MODEL, RECIPE, WEIGHTS
    from fieldmark.outputs import calibration
    from fieldmark.outputs.metadata import FILE

    if (model / FILE).is_file():
        files = sorted(path for path in model.iterdir() if path.is_file())
    else:
        names = (RECIPE, CLASSES, MODEL, WEIGHTS, calibration.FILE, ENSEMBLE)
        folders = [model, *sorted(model.glob("members/*"))]  # of an ensemble
        files = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    total = hashlib.sha256(f"flips={flips}".encode())
    try:
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"\0{path.relative_to(model).as_posix()}\0{content}".encode())
    except OSError as error:
        raise RunError(f"{model} cannot be read: {error.strerror}") from None
    return total.hexdigest()


def load_piece(folder: Path, number: int) -> Piece:
    """A piece whose part is missing.

    Raises:
        ResourceError: This machine does not see the folder.
    """
    try:
        return from_json(piece_path(folder, number).read_text(encoding="ascii"))
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be read here ({error.strerror}): let all machines share the folder of --out"
        ) from None


def _count_attempt(folder: Path, number: int) -> None:
    """Refuse a part that workers die of, which whoever restarts them cannot tell from bad luck."""
    path = piece_path(folder, number).with_suffix(".attempts")
    try:
        with path.open("ab") as file:
            file.write(b".")
            attempts = file.tell()
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written here ({error.strerror}): let all machines share the folder of --out"
        ) from None
    if attempts > MAX_ATTEMPTS:
        raise ResourceError(
            f"{MAX_ATTEMPTS} workers died of this part, with the photos that {piece_path(folder, number)} names. "
            "Did they run out of memory? Take out the photo that is too large"
        )


def piece_path(folder: Path, number: int) -> Path:
    """Where a piece waits for its part."""
    return folder / BOOKS / "pieces" / f"{number}.json"


def combined(texts: Iterable[str]) -> str:
    """64 hex digits over some that are such digests themselves, in their order."""
    return hashlib.sha256("\n".join(texts).encode("ascii")).hexdigest()
