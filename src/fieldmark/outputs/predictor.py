"""A run folder or an exported model becomes a thing to ask: photos in, class names and probabilities out.

The pipeline is the one that judged the run: same decoding, same evaluation transform, same weights. Nothing but the
folder is needed.

Shape letters: B batch, K classes, H and W pixels, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import DataError, PhotoError
from fieldmark.outputs.taxonomy import Answer

if TYPE_CHECKING:
    from PIL.Image import Image

    from fieldmark.data.index import PhotoIndex
    from fieldmark.data.loader import Batch
    from fieldmark.experiment.folder import Run
    from fieldmark.outputs.back_off import BackOff
    from fieldmark.vision.augment import EvalSpec
    from fieldmark.vision.views import Views

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
        from fieldmark.experiment.folder import Run
        from fieldmark.outputs.metadata import FILE

        if isinstance(model, str | Path) and (Path(model) / FILE).is_file():
            return cls._load_exported(Path(model), flips=flips)
        return cls._load_run(model if isinstance(model, Run) else Run(model), flips=flips)

    @classmethod
    def _load_run(cls, run: Run, *, flips: bool) -> Predictor:
        from fieldmark.outputs.calibration import load_back_off, load_calibration
        from fieldmark.outputs.networks import open_networks

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
        from fieldmark.outputs.exported import ExportedModel

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
        from fieldmark.experiment.environment import usable_cores

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
        from fieldmark.experiment.batches import EvalPhotos, PhotoReader
        from fieldmark.experiment.environment import usable_cores

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

        from fieldmark.data.loader import Batch
        from fieldmark.engine.evaluate import softmax

        unknown = torch.full((len(images),), -1, dtype=torch.int64)
        batch = Batch(torch.from_numpy(images), torch.arange(len(images)), unknown, ())
        return softmax(self._logits(batch), temperature=self.temperature)

    def _answers(self, batch: Batch, names: Sequence[str]) -> list[Prediction]:
        from fieldmark.engine.evaluate import softmax

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

        from fieldmark.data.loader import Batch
        from fieldmark.vision.views import eval_picture, picture_shape

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

        from fieldmark.data.decode import decode
        from fieldmark.data.formats import from_image

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
