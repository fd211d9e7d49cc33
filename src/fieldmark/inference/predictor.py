"""A run folder or an exported model becomes a thing to ask: photos in, class names and probabilities out.

The pipeline is the one that judged the run: same decoding, same evaluation transform, same weights. Nothing but the
folder is needed.

Shape letters: B batch, K classes, H and W pixels, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import auto_workers, batches
from fieldmark.data.workers import Batch
from fieldmark.errors import DataError, PhotoError, RunError
from fieldmark.inference.calibration import apply_temperature, log_probabilities
from fieldmark.inference.taxonomy import Answer
from fieldmark.progress import Progress
from fieldmark.runs.dataset import EvalPhotos, PhotoReader
from fieldmark.runs.environment import keep_freed_memory, quiet_fabric, usable_cores
from fieldmark.runs.folder import ENSEMBLE, MEMBERS, Run
from fieldmark.training.evaluate import predict_batches

if TYPE_CHECKING:
    from PIL.Image import Image

    from fieldmark.augment.reference import EvalSpec, Views
    from fieldmark.data.index import PhotoIndex
    from fieldmark.data.workers import Batch
    from fieldmark.inference.taxonomy import BackOff
    from fieldmark.runs.folder import Run
    from fieldmark.training.evaluate import Predictions


Source = Union[str, Path, bytes, NDArray[np.uint8], "Image"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of one photo.

    Attributes:
        path: The photo, as it was named; "" for pixels without a name.
        classes: K class names, in order of class number.
        probabilities: (K,) float32 summing to 1; NaN for a photo that could not be read.
        problem: Why the photo could not be read; "" if it could.
        threshold: Least probability that counts as an answer, in [0, 1].
        back_off: Groups to answer with where the class is not sure; None if there are none.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    problem: str
    threshold: float = 0.0
    back_off: BackOff | None = None

    @property
    def label(self) -> str:
        """The most probable class; "" for a photo that could not be read."""
        return "" if self.problem else self.classes[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """The probability of `label`, in [0, 1]; NaN for a photo that could not be read."""
        return float("nan") if self.problem else float(self.probabilities.max())

    @property
    def is_unknown(self) -> bool:
        """Whether the model is not sure enough of the class, or the photo could not be read."""
        return bool(self.problem) or self.probability < self.threshold

    @property
    def answer(self) -> Answer:
        """The finest name that is sure enough: the class, else a group of the taxonomy, else none (level "")."""
        if self.problem:
            return Answer("", "", float("nan"))
        return answer_of(self.probabilities, self.classes, threshold=self.threshold, back_off=self.back_off)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities; empty for a photo that could not be read."""
        if self.problem:
            return []
        # Stable on the negated row, so that equals keep class order, as the accuracy counts them.
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[number], float(self.probabilities[number])) for number in order]


def answer_of(
    probabilities: NDArray[np.float32], classes: Sequence[str], *, threshold: float, back_off: BackOff | None
) -> Answer:
    """The finest name that is sure enough; see `Prediction.answer`."""
    if back_off is not None:
        return back_off.answer(probabilities)
    best = int(probabilities.argmax())
    sure = float(probabilities[best])
    return Answer("", "", sure) if sure < threshold else Answer("class", classes[best], sure)


class Predictor:
    """Asks one model about any number of photos, in bounded memory. Calls from several threads are safe.

    Make one with `Predictor.load`.

    Args:
        classes: K class names, in order of class number.
        spec: How a photo becomes the model's input; several ways where the members of an ensemble differ.
        logits: (B, K) logits of a batch.
        background: RGB under transparent pixels, 0 to 255.
        max_pixels: Photos with more pixels are refused.
        batch_size: Photos at once.
        temperature: Divides the logits, > 0.
        threshold: Least probability that counts as an answer, in [0, 1].
        back_off: See `Prediction`.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str],
        spec: EvalSpec | Views,
        logits: Callable[[Batch], NDArray[np.floating[Any]]],
        background: tuple[int, int, int],
        max_pixels: int,
        batch_size: int,
        temperature: float,
        threshold: float,
        back_off: BackOff | None,
    ) -> None:
        self.classes = tuple(classes)
        self.spec = spec
        self.batch_size = batch_size
        self.temperature = temperature
        self.threshold = threshold
        self.back_off = back_off
        self._logits = logits
        self.background = background
        self._max_pixels = max_pixels

    @classmethod
    def load(cls, model: Run | str | Path, *, flips: bool = False) -> Predictor:
        """Open a run folder, an ensemble or an exported model.

        A run that was calibrated answers with calibrated probabilities.

        Args:
            model: A run, its folder, or the folder that `fieldmark combine` or `fieldmark export` wrote.
            flips: Average the logits of each photo and its mirror image: twice the time, often half a point better.

        Raises:
            RunError: The folder is neither, or the run has no weights yet.
        """
        from fieldmark.inference.exported import FILE
        from fieldmark.runs.folder import Run

        if isinstance(model, str | Path) and (Path(model) / FILE).is_file():
            return cls._load_exported(Path(model), flips=flips)
        return cls._load_run(model if isinstance(model, Run) else Run(model), flips=flips)

    @classmethod
    def _load_run(cls, run: Run, *, flips: bool) -> Predictor:
        from fieldmark.inference.calibrate import load_back_off, load_calibration

        spec, logits = open_networks(run, flips=flips)
        calibration = load_calibration(run)
        return cls(
            classes=run.classes,
            spec=spec,
            logits=logits,
            background=run.config.data.background,
            max_pixels=run.config.data.max_pixels,
            batch_size=run.config.eval.batch_size,
            temperature=calibration.temperature if calibration else 1.0,
            threshold=calibration.threshold if calibration else 0.0,
            back_off=load_back_off(run),
        )

    @classmethod
    def _load_exported(cls, folder: Path, *, flips: bool) -> Predictor:
        from fieldmark.config import Config
        from fieldmark.inference.exported import ExportedModel

        exported = ExportedModel.load(folder, threads=0, precision="auto")
        defaults = Config()

        def logits(batch: Batch) -> NDArray[np.float32]:
            images = batch.images.numpy()
            output = exported.logits(images)
            mirrored = exported.logits(images[..., ::-1]) if flips else output
            return np.asarray((output + mirrored) / 2, np.float32)

        return cls(
            classes=exported.classes,
            spec=exported.eval_spec(),
            logits=logits,
            background=exported.metadata.background,
            max_pixels=defaults.data.max_pixels,
            batch_size=defaults.eval.batch_size,
            temperature=exported.temperature,
            threshold=exported.threshold,
            back_off=exported.metadata.groups(),
        )

    def __call__(self, photo: Source) -> Prediction:
        """Ask about one photo.

        Args:
            photo: A file, its content, a Pillow image, or an upright (H, W, 3) uint8 RGB array.

        Raises:
            PhotoError: The photo cannot be read.
        """
        prediction = next(self.predict([photo]))
        if prediction.problem:
            raise PhotoError(prediction.path or "the photo", prediction.problem)
        return prediction

    def predict(self, photos: str | Path | Iterable[Source]) -> Iterator[Prediction]:
        """Ask about many photos, one prediction each, in their order.

        A photo that cannot be read keeps its place, with the reason in `problem`.

        Args:
            photos: A folder (all photos in it and under it, in natural order), one file, or an iterable of what
                `__call__` takes, which is consumed as the predictions are.

        Raises:
            DataError: The folder holds no photo.
        """
        if isinstance(photos, str | Path):
            from fieldmark.data.index import list_photos

            yield from self.predict_index(list_photos(Path(photos)))
            return
        yield from self.predict_named((str(photo) if isinstance(photo, str | Path) else "", photo) for photo in photos)

    def predict_named(
        self, photos: Iterable[tuple[str, Source | PhotoError]], *, threads: int | None = None
    ) -> Iterator[Prediction]:
        """Ask about photos that have names, one prediction each, in their order.

        Args:
            photos: Names with what `__call__` takes, or with the reason why there is no photo. Consumed a batch at a
                time.
            threads: That decode; None is one for each usable core.
        """
        from fieldmark.data.loader import Loader
        from fieldmark.runs.environment import usable_cores

        pairs = iter(photos)
        with Loader(workers=0, threads=threads or usable_cores()) as loader:
            while chunk := list(islice(pairs, self.batch_size)):
                sources = [source for _, source in chunk]
                prepare = _SourcePhotos(sources, self.spec, self.background, self._max_pixels)
                for batch in loader.batches(prepare, [range(len(chunk))], epoch=0):
                    yield from self._answers(batch, [name for name, _ in chunk])

    def predict_index(self, index: PhotoIndex) -> Iterator[Prediction]:
        """Ask about the photos of an index, in its order, by the paths that it has for them."""
        from fieldmark.data.loader import Loader, auto_workers
        from fieldmark.runs.dataset import EvalPhotos, PhotoReader
        from fieldmark.runs.environment import usable_cores

        reader = PhotoReader(tuple(index.files()), index.label_numbers(), self.background, self._max_pixels)
        prepare = EvalPhotos(reader, self.spec, keeps_broken=True)
        numbers = range(len(index.photos))
        plan = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        # Processes take seconds to start: a few photos are read sooner without.
        workers = auto_workers(cores=usable_cores(), is_cached=False, has_gpu=False)[0] if len(plan) > 2 else 0
        with Loader(workers=workers, threads=usable_cores()) as loader:
            for batch in loader.batches(prepare, plan, epoch=0):
                yield from self._answers(batch, [index.photos[number].path for number in batch.numbers.tolist()])

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, K) calibrated probabilities of pictures that `vision.views.eval_picture` made by `spec`."""
        import torch

        from fieldmark.data.workers import Batch
        from fieldmark.training.evaluate import softmax

        unknown = torch.full((len(images),), -1, dtype=torch.int64)
        batch = Batch(torch.from_numpy(images), torch.arange(len(images)), unknown, ())
        return softmax(self._logits(batch), temperature=self.temperature)

    def _answers(self, batch: Batch, names: Sequence[str]) -> list[Prediction]:
        from fieldmark.training.evaluate import softmax

        probabilities = softmax(self._logits(batch), temperature=self.temperature)
        problems = dict(batch.problems)
        for place in problems:
            probabilities[place] = np.nan
        return [
            Prediction(name, self.classes, row, problems.get(place, ""), self.threshold, self.back_off)
            for place, (name, row) in enumerate(zip(names, probabilities, strict=True))
        ]


@dataclass(frozen=True)
class _SourcePhotos:
    """Prepares photos that are held in hand, as `experiment.batches.EvalPhotos` does those of an index."""

    sources: Sequence[Source | PhotoError]
    spec: EvalSpec | Views
    background: tuple[int, int, int]
    max_pixels: int

    def __call__(self, numbers: Sequence[int], epoch: int) -> Batch:
        import torch

        from fieldmark.augment.reference import eval_picture, picture_shape
        from fieldmark.data.workers import Batch

        images = torch.zeros((len(numbers), *picture_shape(self.spec)))
        problems: list[tuple[int, str]] = []
        for place, number in enumerate(numbers):
            try:
                images[place] = eval_picture(self._read(self.sources[number]), self.spec)
            except PhotoError as error:
                problems.append((place, error.reason))
        order = torch.as_tensor(list(numbers), dtype=torch.int64)
        return Batch(images, order, torch.full_like(order, -1), tuple(problems))

    def _read(self, source: Any) -> NDArray[np.uint8]:
        from PIL import Image

        from fieldmark.data.decode import decode, from_image

        if isinstance(source, PhotoError):
            raise source
        if isinstance(source, np.ndarray):
            return source
        if isinstance(source, str | Path):
            return decode(Path(source), background=self.background, max_pixels=self.max_pixels)
        if isinstance(source, bytes | bytearray | memoryview):
            return decode(bytes(source), background=self.background, max_pixels=self.max_pixels)
        if not isinstance(source, Image.Image):
            kind = type(source).__name__
            raise DataError(f"a photo is a path, bytes, a Pillow image or an (H, W, 3) uint8 array; got {kind}")
        # A copy: loading and turning must not change the caller's image, and Pillow's images are not thread-safe.
        return from_image("the photo", source.copy(), self.background, self.max_pixels)


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an ensemble.

    Attributes:
        run: What it needs to predict, as a run.
        temperature: Divides its logits, > 0.
        order: (K,) for each class of the ensemble, its number among the member's classes.
    """

    run: Run
    temperature: float
    order: NDArray[np.int64]


def load_members(run: Run) -> tuple[Member, ...]:
    """The members of an ensemble, in the order in which they were given.

    Raises:
        RunError: A member is missing or knows other classes.
    """
    try:
        rows = [(str(row["folder"]), float(row["temperature"])) for row in run.ensemble_info["members"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.path / ENSEMBLE} is not the list of an ensemble's members: {error!r}") from None
    members: list[Member] = []
    for name, temperature in rows:
        member = Run(run.path / MEMBERS / name)
        order = class_order(member.classes, run.classes)
        if order is None:
            raise RunError(f"{run.path / ENSEMBLE} names {member.path}, whose classes are not the ensemble's")
        members.append(Member(member, temperature, order))
    return tuple(members)


def class_order(own: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64] | None:
    """(K,) the place in `own` of each name of `wanted`; None unless both hold the same names."""
    if sorted(own) != sorted(wanted):
        return None
    place = {name: number for number, name in enumerate(own)}
    return np.asarray([place[name] for name in wanted], np.int64)


def mean_probabilities(
    probabilities: Sequence[NDArray[np.float32]], temperatures: Sequence[float], orders: Sequence[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """What an ensemble says: the mean of its members' calibrated probabilities.

    Every use of an ensemble comes through here with its members' float32 probabilities, so that stored predictions and
    new ones of the same photos are the same to the bit.

    Args:
        probabilities: (N, K) of each member at temperature 1, in its own order of classes.
        temperatures: Of each member, > 0.
        orders: As `Member.order`.

    Returns:
        (N, K) in the ensemble's order of classes; NaN for a photo that could not be read.

    Source:
        Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles",
        arXiv:1612.01474, section 2.4.
    """
    calibrated = [
        apply_temperature(log_probabilities(rows[:, order]), temperature)
        for rows, temperature, order in zip(probabilities, temperatures, orders, strict=True)
    ]
    return np.mean(calibrated, axis=0).astype(np.float32)


def predict_photos(
    run: Run, index: PhotoIndex, numbers: NDArray[np.int64], *, flips: bool, progress: Progress
) -> NDArray[np.float32]:
    """Probabilities of some photos of an index, or with `flips` of each photo and its mirror image in the mean.

    Returns:
        (N, K) float32 in the order of `numbers`, which must rise.

    Raises:
        PhotoError: A photo cannot be read.
    """
    if run.is_ensemble:
        members = load_members(run)
        return mean_probabilities(
            [predict_photos(member.run, index, numbers, flips=flips, progress=progress) for member in members],
            [member.temperature for member in members],
            [member.order for member in members],
        )
    return predict_with(run.load_model(), run, index, numbers, flips=flips, progress=progress)


def predict_with(
    model: nn.Module, run: Run, index: PhotoIndex, numbers: NDArray[np.int64], *, flips: bool, progress: Progress
) -> NDArray[np.float32]:
    """The same, by a model that stands in for the run's own; it is moved to the device."""
    data, info = run.config.data, run.model_info
    fabric = open_fabric(info)
    reader = PhotoReader(tuple(index.files()), index.label_numbers(), data.background, data.max_pixels)
    size = run.config.eval.batch_size
    plan = [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]
    prepare = EvalPhotos(reader, run.eval_spec(), keeps_broken=False)
    workers, _ = auto_workers(cores=usable_cores(), is_cached=False, has_gpu=fabric.device.type != "cpu")
    if info["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress.start(len(numbers), 0)
    predictions = predict_batches(
        fabric,
        fabric.to_device(model),
        _counted(batches(prepare, plan, epoch=0, workers=workers), progress),
        flips=flips,
        channels_last=info["channels_last"],
    )
    return predictions.probabilities()


def open_fabric(info: dict[str, Any]) -> Fabric:
    """One process with the precision that the run was trained in, where this machine has it."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        keep_freed_memory()
    precision = info["precision"] if has_gpu or info["precision"] != "16-mixed" else "32-true"
    quiet_fabric()
    return Fabric(accelerator="cuda" if has_gpu else "cpu", devices=1, precision=precision)


def _counted(loaded: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    for batch in loaded:
        yield batch
        progress.advance(len(batch.numbers))


Logits = Callable[["Batch"], NDArray[np.floating[Any]]]


def open_networks(run: Run, *, flips: bool) -> tuple[EvalSpec | Views, Logits]:
    """How a photo becomes pictures, and what turns a batch of them into (B, K) logits.

    The logits of an ensemble are the logarithms of its mean probabilities.

    Args:
        run: A run or an ensemble.
        flips: Average the logits of each photo and its mirror image, in each network.

    Raises:
        RunError: There are no weights yet.
    """
    if not run.is_ensemble:
        predict = _open(run, flips=flips)
        return run.eval_spec(), lambda batch: predict(batch).logits

    from fieldmark.augment.reference import join_specs, split_views
    from fieldmark.inference.calibration import log_probabilities

    members = load_members(run)
    specs = [member.run.eval_spec() for member in members]
    networks = [_open(member.run, flips=flips) for member in members]
    joined = join_specs(specs)

    def logits(batch: Batch) -> NDArray[np.floating[Any]]:
        views = split_views(batch.images, joined)
        answers = [
            predict(replace(batch, images=views[spec])).probabilities()
            for predict, spec in zip(networks, specs, strict=True)
        ]
        mean = mean_probabilities(
            answers, [member.temperature for member in members], [member.order for member in members]
        )
        return log_probabilities(mean)

    return joined, logits


def _open(run: Run, *, flips: bool) -> Callable[[Batch], Predictions]:
    import torch

    from fieldmark.runs.folder import WEIGHTS
    from fieldmark.training.evaluate import predict_batches

    if not (run.path / WEIGHTS).is_file():
        raise RunError(
            f"{run.path} has no weights yet (its status is {run.summary['status']!r}): "
            f"let it train for an epoch, or continue it with `fieldmark train --resume {run.path}`"
        )
    channels_last = bool(run.model_info["channels_last"])
    fabric = open_fabric(run.model_info)
    model = run.load_model()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = fabric.to_device(model)
    return lambda batch: predict_batches(fabric, model, [batch], flips=flips, channels_last=channels_last)
