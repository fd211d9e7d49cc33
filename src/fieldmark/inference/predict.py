"""What `fieldmark predict` does: a model, photos, a file; with Ray in parts, so that what is done is never done again.

The photos are cut into pieces; each piece becomes one part file, whole or absent, whose name says of which photos and
of which model it is. A second call computes the parts that are missing. At the end the parts, in order, are the
prediction: as they are, in a folder, or merged into one file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fieldmark.errors import DataError, FieldmarkError, PredictionError, ResourceError, RunError, command, first_line
from fieldmark.files import digest_file, exclusive_lock, write_whole
from fieldmark.inference import sources, writers
from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.exported import FILE
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.inference.sources import FileList, PhotoSource, Piece
from fieldmark.inference.writers import Form, PredictedPhotos, save_predictions
from fieldmark.progress import Progress
from fieldmark.runs.cluster import open_cluster, require_slots, worker_needs
from fieldmark.runs.folder import Run, write_json
from fieldmark.training.metrics import Floats

PHOTOS_BETWEEN_LINES = 10_000
FORMAT = 3
PIECE_PHOTOS = 1024
BOOKS = ".predict"
MAX_ATTEMPTS = 4
_OF_MODELS = frozenset({".bin", ".json", ".onnx", ".pt2", ".safetensors", ".toml", ".xml"})


def predict_photos(
    model: Path,
    photos: str | Path,
    out: Path | None,
    *,
    form: Form | None = None,
    sample: Path | None = None,
    sample_order: bool = False,
    path_column: str = sources.PATH_COLUMN,
    flips: bool = False,
    prior: Literal["training", "estimate", "uniform"] = "training",
    progress: Progress,
    ray: str | None = None,
) -> PredictedPhotos:
    """Ask a model about photos, in their order, and write a file; the options are those of `fieldmark predict`.

    Without `out` the predictions stay in memory, and with Ray it may be a folder, for the parts as they are.
    A `prior` but that of training keeps all probabilities in memory. `ray` is a cluster's address, "" for a new one.
    """
    if sample_order and sample is None:
        raise PredictionError("--sample-order follows a sample submission: give it with --sample FILE")
    source = sources.open_source(str(photos), path_column=path_column)
    if source.skipped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in source.skipped.items())
        progress.message(f"skipped in {source.name}: {reasons}")
    is_folder = ray is not None and out is not None and (out.is_dir() or not out.suffix)
    if out is not None and not is_folder:
        form = writers.choose_form(out, form, has_sample=sample is not None)
    before = None if prior == "training" else _training_prior(model)
    if ray is not None and (out is None or sample_order or before is not None):
        raise PredictionError("--ray writes parts in order of the photos: give --out, no --sample-order, no --prior")
    if sample is not None and sample_order:
        source = _reorder(source, sample)
    _check_names(source, sample, has_ids=out is not None and form == "leaderboard")
    if ray is not None and out is not None:
        make = partial(make_parts_on_ray, address=ray)
        return predict_in_parts(model, source, out, form=form, flips=flips, make_parts=make, progress=progress)
    predictor = Predictor.load(model, flips=flips)
    predictions = report_predictions(predictor.predict_source(source), source.count, progress)
    shares: dict[str, dict[str, float]] = {}
    if before is not None:
        predictions, now = correct_prior(list(predictions), before, is_uniform=prior == "uniform")
        rows = zip(predictor.classes, before.tolist(), now.tolist(), strict=True)
        shares = {name: {"training": old, "assumed": new} for name, old, new in rows}
    if out is None:
        done = PredictedPhotos(None, prior=shares)
        done.shown = list(done.watch(predictions))
        return done
    has_groups = predictor.fallback is not None
    done = save_predictions(predictions, out, classes=predictor.classes, form=form, has_groups=has_groups)
    if shares:
        write_json(out.with_name(f"{out.name}.prior.json"), {"prior": prior, "shares": shares})
    return replace(done, prior=shares)


def correct_prior(
    predictions: list[Prediction], prior: NDArray[np.float64], *, is_uniform: bool
) -> tuple[list[Prediction], NDArray[np.float64]]:
    """Correct predictions for their class shares, or equal ones (arXiv:2007.07314); also returns these (K,)."""
    rows = np.asarray([one.probabilities for one in predictions if not one.problem], np.float64)
    if not len(rows):
        return predictions, prior
    shares = np.full(len(prior), 1 / len(prior)) if is_uniform else estimate_prior(rows, prior)
    corrected = iter(apply_prior(rows, prior, shares).astype(np.float32))
    return [one if one.problem else replace(one, probabilities=next(corrected)) for one in predictions], shares


def estimate_prior(probabilities: Floats, prior: Floats) -> NDArray[np.float64]:
    """The (K,) class shares among photos whose classes may come in other shares than the `prior` of training.

    As many photos as there are classes are counted with the shares of training: few photos change little, and no class
    is given up. Balance is not assumed.

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


def apply_prior(probabilities: Floats, prior: Floats, shares: Floats) -> Floats:
    """(N, K) probabilities where the classes come in `shares` instead of `prior`, both (K,)."""
    ratio = np.divide(shares, prior, out=np.zeros(len(prior)), where=np.asarray(prior) > 0)
    weighted = np.asarray(probabilities, np.float64) * ratio
    total = weighted.sum(axis=1, keepdims=True)
    return np.where(total > 0, weighted / np.where(total > 0, total, 1), probabilities)


def _training_prior(model: Path) -> NDArray[np.float64]:
    """The (K,) class shares that a calibrated run's probabilities assume."""
    if (model / FILE).is_file():
        raise PredictionError(f"{model} is an export, which does not hold the class shares of training: give the run")
    run = Run(model)
    if load_calibration(run) is None:
        raise PredictionError(
            f"{model} is not calibrated, and only calibrated probabilities can be corrected for class shares: "
            f"first `{command('calibrate', model)}`"
        )
    for one in (run, *run.members):
        if one.config.train.class_weights != "none":
            raise PredictionError(
                f"{one.path} was trained with train.class_weights={one.config.train.class_weights}, so its "
                "probabilities do not assume the class shares of training, which --prior starts from"
            )
    return run.prior


def _check_names(source: PhotoSource, sample: Path | None, *, has_ids: bool) -> None:
    """Check the names that a file would have; of tar files only against a sample: to learn them is to read them."""
    if sample is not None or (has_ids and source.count is not None):
        names = list(writers.leaderboard_names(source.names()))
        if sample is not None:
            writers.check_sample(names, sample)


def _reorder(source: PhotoSource, sample: Path) -> PhotoSource:
    if source.root is None:
        raise PredictionError(
            f"--sample-order reorders a folder of this machine, which {source.name} is not. Give the photos as a list, "
            "a CSV file with a column `path`, in the wanted order"
        )
    root, paths = source.root, writers.in_sample_order(list(source.names()), sample)
    return replace(source, cut=partial(sources.cut_list, root, paths))


def report_predictions(answers: Iterable[Prediction], total: int | None, progress: Progress) -> Iterator[Prediction]:
    """The same predictions, with their number reported."""
    if total is not None:
        progress.start(total, 0)
    for count, answer in enumerate(answers, start=1):
        yield answer
        if total is not None:
            progress.advance(1)
        elif count % PHOTOS_BETWEEN_LINES == 0:
            progress.message(f"{count} photos")


def predict_in_parts(
    model: Path,
    source: PhotoSource,
    out: Path,
    *,
    form: Form | None,
    flips: bool,
    piece_photos: int | None = None,
    make_parts: MakeParts,
    progress: Progress,
) -> PredictedPhotos:
    """Predict photos part by part; called again, only those that are missing.

    `out` is a file, by its ending, or a folder, which then holds the parts. A list is cut into parts of `piece_photos`,
    rounded up to whole batches. `make_parts` makes those of some pieces, in any order, if any is missing.
    """
    is_file = bool(out.suffix) and not out.is_dir()
    predictor = Predictor.load(model, flips=flips)
    folder = (out.with_name(out.name + ".parts") if is_file else out).absolute()
    if folder.is_dir() and not (folder / BOOKS).is_dir() and any(folder.iterdir()):
        raise PredictionError(f"{folder} exists and holds something else. Give another --out")
    busy = f"another predict is at work in {folder}: wait for it, or give another --out"
    with exclusive_lock(folder / BOOKS / "lock", busy=busy):
        size = -(-(piece_photos or PIECE_PHOTOS) // predictor.batch_size) * predictor.batch_size
        fingerprint = model_fingerprint(model, flips=flips)
        parts = [part_path(folder, *numbered, fingerprint) for numbered in enumerate(source.cut(size))]
        if not set(folder.glob("part-*.parquet")) <= set(parts):
            raise PredictionError(
                f"{folder} was begun with other photos (files may have changed), another model, other --flips, or by "
                f"another version. Give another --out than {out}, or remove {folder}"
            )
        missing = {number for number, part in enumerate(parts) if not part.is_file()}
        progress.start(len(parts), len(parts) - len(missing))
        if missing:
            task = PartTask(str(model.absolute()), fingerprint, flips, str(folder))
            pieces = ((number, piece) for number, piece in enumerate(source.cut(size)) if number in missing)
            with closing(make_parts(task, pieces)) as made:
                for number, problem in made:
                    if problem:
                        raise DataError(f"part {number} cannot be made: {problem}. What is done is kept; call again")
                    progress.advance(1)
        predictions = chain.from_iterable(writers.load_part(part, predictor) for part in parts)
        if not is_file:
            written = PredictedPhotos(out)
            deque(written.watch(predictions), maxlen=0)
            return written
        has_groups = predictor.fallback is not None
        written = save_predictions(predictions, out, classes=predictor.classes, form=form, has_groups=has_groups)
    shutil.rmtree(folder)
    return written


@dataclass(frozen=True)
class PartTask:
    """Holds what a worker must know; plain, so that it can be sent."""

    model: str  # run folder or export, by a path that is the same on every machine
    fingerprint: str  # of the model; a worker that sees another refuses
    flips: bool
    folder: str  # of the parts, the same on every machine
    threads: int = 0  # of one worker; 0 leaves it to the libraries


PartDone = tuple[int, str]  # number of a part, and why it could not be made, or ""
MakeParts = Callable[[PartTask, Iterator[tuple[int, Piece]]], Generator[PartDone]]


def make_part(task: PartTask, number: int, piece: Piece) -> PartDone:
    """Make one part; a worker that dies in the middle of it leaves nothing."""
    folder = Path(task.folder)
    try:
        if not (folder / BOOKS).is_dir():
            raise ResourceError(f"{folder} is not there on this worker: let all machines share the folder of --out")
        predictor = _load_predictor(task)
        photos = sources.read_ahead(piece.read(), predictor.batch_size)
        predictions = list(predictor.predict_named(photos, threads=task.threads or None))
        writers.save_part(part_path(folder, number, piece, task.fingerprint), predictions, classes=predictor.classes)
    except FieldmarkError as error:
        return number, str(error)
    return number, ""


@lru_cache(maxsize=1)
def _load_predictor(task: PartTask) -> Predictor:
    """The model of a worker, once for all its parts."""
    if task.threads:
        torch.set_num_threads(task.threads)
    if model_fingerprint(Path(task.model), flips=task.flips) != task.fingerprint:
        raise RunError(f"{task.model} is another model on this worker: let all machines see the same folder")
    return Predictor.load(task.model, flips=task.flips)


def model_fingerprint(model: Path, *, flips: bool) -> str:
    """64 hex digits over the files that a model's answers depend on."""
    folders = [model, *model.glob("members/*")]  # of an ensemble
    files = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in _OF_MODELS)
    total = hashlib.sha256(f"flips={flips}".encode())
    try:
        for path in files:
            total.update(f"\0{path.relative_to(model).as_posix()}\0{digest_file(path)}".encode())
    except OSError as error:
        raise RunError(f"{model} cannot be read: {error.strerror}") from None
    return total.hexdigest()


def part_path(folder: Path, number: int, piece: Piece, fingerprint: str) -> Path:
    """The file of a part by a model; sorted by name, parts are in order up to a hundred million."""
    key = hashlib.sha256(f"{FORMAT} {sources.digest(piece)} {fingerprint}".encode("ascii")).hexdigest()
    return folder / f"part-{number:08d}-{key[:16]}.parquet"


def make_parts_on_ray(
    task: PartTask, pieces: Iterator[tuple[int, Piece]], *, address: str, cpus: int = 1
) -> Generator[PartDone]:
    """Makes parts on as many workers at a time as the cluster has room for, each with a predictor of its own.

    A part whose worker died is made again, up to `MAX_ATTEMPTS` times: Ray itself would try for ever where memory runs
    out. A worker has `cpus` cores where the cluster has no GPU; with GPUs each has one, and its share of the cores.
    """
    running: dict[Any, tuple[int, Piece, int]] = {}  # number, piece and attempt of what Ray works on
    with open_cluster(address) as ray, ExitStack() as stack:
        stack.callback(lambda: [ray.cancel(reference, force=True) for reference in running])
        needs = worker_needs(ray, cpus=cpus)
        num_slots = require_slots(ray, needs, "a worker")
        # Without a limit of calls a process, and with it its model, serves one part after another.
        options = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "max_retries": 0, "max_calls": 0}
        work: Any = ray.remote(**options)(make_part)
        task = replace(task, threads=int(needs["CPU"]))
        waiting = ((number, piece, 1) for number, piece in pieces)
        while True:
            for number, piece, attempt in islice(waiting, num_slots - len(running)):
                running[work.remote(task, number, piece)] = number, piece, attempt
            if not running:
                return
            [ready], _ = ray.wait(list(running))
            number, piece, attempt = running.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                if attempt < MAX_ATTEMPTS:
                    waiting = chain([(number, piece, attempt + 1)], waiting)
                    continue
                listed = Path(task.folder) / BOOKS / "crashed.txt"
                write_whole(listed, "\n".join(piece.paths if isinstance(piece, FileList) else [piece.location]) + "\n")
                problem = (
                    f"{MAX_ATTEMPTS} workers crashed on this part ({first_line(error)}), with the photos that {listed} "
                    "names. Did they run out of memory? Take out the photo that is too large"
                )
                yield number, problem
