"""Models that answer: a run folder, an ensemble or an export becomes photos in, class names and probabilities out.

The pipeline is the one that evaluated the run: same decoding, same evaluation transform, same weights, same precision.
Nothing but the folder is needed.

Shape letters: B batch, N photos, K classes, H and W pixels, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.augment.reference import EvalSpec, Views, join_specs, split_views
from fieldmark.data.decode import DecodeSpec, Source
from fieldmark.data.folders import NONE
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Batch, Loader, auto_workers, cut_plan
from fieldmark.errors import PhotoError, RunError, command, needs_extra
from fieldmark.files import fill_template
from fieldmark.inference.calibration import apply_temperature, load_calibration, log_probabilities, without_none
from fieldmark.inference.exported import FILE, ExportedModel
from fieldmark.inference.sources import PhotoSource, open_source
from fieldmark.inference.taxonomy import Answer, Fallback
from fieldmark.plots import thumbnail_uri
from fieldmark.progress import Progress
from fieldmark.runs.dataset import EvalPhotos, PhotoReader
from fieldmark.runs.environment import limit_threads, usable_cores
from fieldmark.runs.folder import ENSEMBLE, WEIGHTS, Run
from fieldmark.training.evaluate import Device, predict_batches, softmax

if TYPE_CHECKING:
    import pandas as pd

    from fieldmark.models.classifier import Classifier

THUMBNAIL_PIXELS = 160
_THUMBNAIL = DecodeSpec((255, 255, 255), max_pixels=100_000_000)

Logits = Callable[[Tensor], NDArray[np.floating[Any]]]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Holds what the model says of one photo.

    Attributes:
        path: The photo, as it was named; "" for pixels without a name.
        classes: K class names, in order of class index.
        probabilities: (K,) float32 summing to 1; NaN for a photo that has no answer.
        problem: Why there is no answer; "" if there is one.
        threshold: Least probability that counts as an answer, in [0, 1].
        fallback: Groups to answer with where the class is not sure; None if there are none.
        root: The folder on this machine that `path` begins at; "" is the current one.

    Examples:
        >>> answer = fieldmark.Predictor.load("runs/mine")("photos/jay/0.png")
        >>> answer.label == answer.top(1)[0][0], answer.probabilities.shape
        (True, (3,))
    """

    path: str
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    problem: str
    threshold: float = 0.0
    fallback: Fallback | None = None
    root: str = ""

    def __repr__(self) -> str:
        said = self.problem or ", ".join(f"{name} {share:.1%}" for name, share in self.top(3))
        doubt = " (too unsure to count)" if self.is_unknown and not self.problem else ""
        return f"Prediction({self.path!r}: {said}{doubt})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the photo, and a bar for each of the likeliest classes."""
        photo = thumbnail_uri(Path(self.root, self.path), THUMBNAIL_PIXELS, _THUMBNAIL) if self.path else ""
        return fill_template("prediction.html", {"prediction": self, "photo": photo})

    @property
    def label(self) -> str:
        """The most probable class, `_none` aside; "" for a photo without an answer."""
        return "" if self.problem else self.classes[int(self._of_classes.argmax())]

    @property
    def probability(self) -> float:
        """The probability of `label`, in [0, 1]; NaN for a photo without an answer."""
        return float("nan") if self.problem else float(self._of_classes.max())

    @property
    def is_unknown(self) -> bool:
        """Whether the model is not sure enough of the class, or surer that it is none, or the photo has no answer."""
        return bool(self.problem) or not self.probability >= max(self.threshold, self.probabilities.max())  # or is NaN

    @property
    def _of_classes(self) -> NDArray[np.float32]:
        """The probabilities, but -1 for `_none`."""
        return without_none(self.probabilities, self.classes)

    @property
    def answer(self) -> Answer:
        """The finest name that is sure enough: the class, else a group of the taxonomy, else none (level "")."""
        if self.problem:
            return Answer("", "", float("nan"))
        if self.fallback is not None and self._of_classes.max() == self.probabilities.max():
            return self.fallback.answer(self._of_classes)
        return Answer("", "", self.probability) if self.is_unknown else Answer("class", self.label, self.probability)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities; empty for a photo without an answer."""
        if self.problem:
            return []
        # Stable on the negated row, so that equals keep class order, as the accuracy counts them.
        order = np.argsort(-self._of_classes, kind="stable")
        rows = [(self.classes[number], float(self.probabilities[number])) for number in order[: k + 1]]
        return [row for row in rows if row[0] != NONE][:k]


@dataclass(eq=False, repr=False, kw_only=True)
class Predictor:
    """Asks one model about any number of photos, in bounded memory. Calls from several threads are safe.

    Make one with `Predictor.load`.

    Examples:
        >>> predictor = fieldmark.Predictor.load("runs/mine")
        >>> [answer.problem for answer in predictor.predict(["photos/jay/0.png", "photos/wren/1.png"])]
        ['', '']
    """

    classes: tuple[str, ...]  # K names, in order of class index
    spec: EvalSpec | Views  # how a photo becomes the model's input; several ways where members of an ensemble differ
    logits: Logits  # (B, K) of a batch of such inputs
    decoding: DecodeSpec  # how files become pixels
    batch_size: int  # photos at once
    temperature: float  # divides the logits
    threshold: float  # least probability that counts as an answer, in [0, 1]
    fallback: Fallback | None  # as in `Prediction`

    @classmethod
    def load(cls, model: Run | str | Path, *, flips: bool = False) -> Predictor:
        """Open a run folder, an ensemble or an exported model.

        A run that was calibrated answers with calibrated probabilities.

        Args:
            model: A run, its folder, or the folder that `fieldmark combine` or `fieldmark export` wrote.
            flips: Test-time augmentation: average the logits of each photo and its mirror image. Twice the time.

        Raises:
            RunError: The folder is neither, or the run has no weights yet.
            ExportError: The export is damaged.
        """
        if not isinstance(model, Run) and (Path(model) / FILE).is_file():
            exported = ExportedModel.load(model, threads=min(torch.get_num_threads(), usable_cores()))
            about = exported.metadata
            return cls(
                classes=about.classes,
                spec=about.preprocessing,
                logits=lambda images: exported.logits(images.numpy(), flips=flips),
                decoding=DecodeSpec(about.background, about.max_pixels),
                batch_size=about.batch_size,
                temperature=about.temperature,
                threshold=about.threshold,
                fallback=about.back_off,
            )
        run = model if isinstance(model, Run) else Run(model)
        networks = Networks(run, flips=flips)
        calibration = load_calibration(run)
        return cls(
            classes=run.classes,
            spec=networks.spec,
            logits=networks.logits,
            decoding=run.decode_spec(),
            batch_size=run.config.eval.batch_size,
            temperature=calibration.temperature if calibration else 1.0,
            threshold=calibration.threshold if calibration else 0.0,
            fallback=calibration.back_off if calibration else None,
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
            photos: A folder (all photos in it and under it, in natural order), one file, a list or shards, as for
                `fieldmark predict`; or an iterable of what `__call__` takes, which is consumed as the predictions are.

        Raises:
            DataError: The folder holds no photo.
        """
        if isinstance(photos, str | Path):
            return self.predict_source(open_source(str(photos)))
        return self.predict_named((str(photo) if isinstance(photo, str | Path) else "", photo) for photo in photos)

    def predict_proba(self, photos: str | Path | Iterable[Source]) -> NDArray[np.float32]:
        """(N, K) probabilities of many `photos`, as `predict` takes them; a row of NaN for each that cannot be read."""
        rows = [prediction.probabilities for prediction in self.predict(photos)]
        return np.stack(rows) if rows else np.zeros((0, len(self.classes)), np.float32)

    def to_pandas(self, photos: str | Path | Iterable[Source]) -> pd.DataFrame:
        """The long form of the predictions of `photos` as a data frame, with all probabilities."""
        from fieldmark.inference.writers import long_table

        with needs_extra("pandas", "review"):
            import_module("pandas")  # for pyarrow, whose own error says less
        table = long_table(list(self.predict(photos)), self.classes, has_groups=self.fallback is not None)
        return table.to_pandas()

    def predict_named(
        self, photos: Iterable[tuple[str, Source | PhotoError]], *, threads: int | None = None
    ) -> Iterator[Prediction]:
        """Ask about photos that have names, or a reason why there is no photo, one prediction each, in their order.

        They are consumed a batch at a time, and decoded by as many `threads`; None is one for each usable core.
        """
        pairs = iter(photos)
        with Loader(workers=0, threads=threads or usable_cores()) as loader:
            while chunk := list(islice(pairs, self.batch_size)):
                prepare = _prepare_photos([source for _, source in chunk], self.decoding, self.spec, keeps_broken=True)
                for batch in loader.batches(prepare, [range(len(chunk))], epoch=0):
                    yield from self._answers(batch, [name for name, _ in chunk])

    def predict_source(self, source: PhotoSource) -> Iterator[Prediction]:
        """Ask about the photos of a source; files in a folder of this machine are read by other processes, too."""
        if source.root is None:
            yield from self.predict_named(source.read(self.batch_size))
            return
        names = list(source.names())
        files = [Path(source.root, name) for name in names]
        prepare = _prepare_photos(files, self.decoding, self.spec, keeps_broken=True)
        for batch in _load_batches(prepare, range(len(files)), self.batch_size):
            yield from self._answers(batch, [names[int(number)] for number in batch.numbers], root=str(source.root))

    def probabilities(self, images: NDArray[np.float32] | Tensor) -> NDArray[np.float32]:
        """(B, K) calibrated probabilities of pictures that `augment.reference.eval_picture` made by `spec`."""
        return softmax(self.logits(torch.as_tensor(images)), temperature=self.temperature)

    def _answers(self, batch: Batch, names: Sequence[str], *, root: str = "") -> list[Prediction]:
        probabilities = self.probabilities(batch.images)
        problems = dict(batch.problems)
        for row in np.flatnonzero(~np.isfinite(probabilities).all(axis=1)).tolist():
            problems.setdefault(row, "has no answer: the model's output is not finite, its weights may be damaged")
        probabilities[list(problems)] = np.nan
        return [
            Prediction(name, self.classes, row, problems.get(number, ""), self.threshold, self.fallback, root)
            for number, (name, row) in enumerate(zip(names, probabilities, strict=True))
        ]


def predict_split(
    run: Run,
    index: PhotoIndex,
    numbers: NDArray[np.int64],
    *,
    flips: bool = False,
    progress: Progress,
    model: nn.Module | None = None,
    is_raw: bool = False,
) -> NDArray[np.float32]:
    """(N, K) probabilities, at temperature 1, of these photos of an index, by a run, an ensemble, or a run's `model`.

    `is_raw` gives what one network puts out, as it is: features, if `model` has no head. A photo that cannot be read
    raises a PhotoError.
    """
    networks = Networks(run, flips=flips, model=model)
    prepare = _prepare_photos(index.files(), run.decode_spec(), networks.spec, keeps_broken=False)
    answer: Logits = networks.logits if is_raw else networks.probabilities
    rows: list[NDArray[Any]] = []
    progress.start(len(numbers), 0)
    for batch in _load_batches(prepare, numbers.tolist(), run.config.eval.batch_size):
        rows.append(answer(batch.images))
        progress.advance(len(batch.numbers))
    return np.concatenate(rows)


def predict_features(
    run: Run, index: PhotoIndex, numbers: NDArray[np.int64], *, network: Classifier, progress: Progress
) -> NDArray[np.float32]:
    """(N, F) what a run's network, which loses its head here, gives a head of each of these photos of an index."""
    network.head = nn.Identity()
    return predict_split(run, index, numbers, progress=progress, model=network, is_raw=True)


def _prepare_photos(
    sources: Sequence[Source | PhotoError], decoding: DecodeSpec, spec: EvalSpec | Views, *, keeps_broken: bool
) -> EvalPhotos:
    return EvalPhotos(PhotoReader(sources, np.full(len(sources), -1, np.int64), decoding), spec, keeps_broken)


def _load_batches(prepare: EvalPhotos, numbers: Sequence[int], batch_size: int) -> Iterator[Batch]:
    plan = cut_plan(numbers, batch_size)
    # Processes take seconds to start: a few photos are read sooner without.
    has_gpu = torch.cuda.is_available()
    workers = auto_workers(cores=usable_cores(), is_cached=False, has_gpu=has_gpu)[0] if len(plan) > 2 else 0
    threads = torch.get_num_threads()
    limit_threads(0 if has_gpu else workers)
    try:
        with Loader(workers=workers, threads=usable_cores()) as loader:
            yield from loader.batches(prepare, plan, epoch=0)
    finally:  # this may be anybody's program
        torch.set_num_threads(threads)


class Networks:
    """The network of a run, or those of an ensemble's members, as one; `model` replaces a run's own."""

    def __init__(self, run: Run, *, flips: bool, model: nn.Module | None = None) -> None:
        members: list[dict[str, Any]] = run.ensemble_info["members"] if run.is_ensemble else []
        runs = run.members
        for one in runs:
            if set(one.classes) != set(run.classes):
                raise RunError(f"{run.path / ENSEMBLE} names {one.path}, whose classes are not the ensemble's")
        self._temperatures = [row["temperature"] for row in members]  # of members alone
        self._orders = [class_order(one.classes, run.classes) for one in runs]
        self._specs = [one.eval_spec() for one in runs]
        self._networks = [_open_network(one, model, flips=flips) for one in runs]
        self.spec = join_specs(self._specs)

    def logits(self, images: Tensor) -> NDArray[np.floating[Any]]:
        """(B, K); of an ensemble the logarithms of its mean probabilities."""
        return log_probabilities(self.probabilities(images)) if self._temperatures else self._networks[0](images)

    def probabilities(self, images: Tensor) -> NDArray[np.float32]:
        """(B, K) at temperature 1."""
        if not self._temperatures:
            return softmax(self._networks[0](images))
        views = split_views(images, self.spec)
        rows = [softmax(network(views[spec])) for network, spec in zip(self._networks, self._specs, strict=True)]
        return mean_probabilities(rows, self._temperatures, self._orders)


def _open_network(run: Run, model: nn.Module | None, *, flips: bool) -> Callable[[Tensor], NDArray[np.float32]]:
    if model is None and not (run.path / WEIGHTS).is_file():
        raise RunError(
            f"{run.path} has no weights yet (its status is {run.summary['status']!r}): "
            f"let it train for an epoch, or continue it with `{command('train', '--resume', run.path)}`"
        )
    channels_last = bool(run.model_info["channels_last"])
    where = Device.choose(str(run.model_info["precision"]))
    limit_threads()
    network = (run.load_model() if model is None else model).to(where.device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def logits(images: Tensor) -> NDArray[np.float32]:
        batch = Batch(images, torch.arange(len(images)), torch.full((len(images),), -1), ())
        return predict_batches(where, network, [batch], flips=flips, channels_last=channels_last).logits

    return logits


def class_order(own: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """(K,) the index in `own` of each name of `wanted`, which are the same names."""
    index = {name: number for number, name in enumerate(own)}
    return np.asarray([index[name] for name in wanted], np.int64)


def mean_probabilities(
    probabilities: Sequence[NDArray[np.float32]], temperatures: Sequence[float], orders: Sequence[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """(N, K) answer of an ensemble: the mean of its members' calibrated probabilities.

    Every use of an ensemble comes through here with its members' float32 probabilities at temperature 1, each in its
    own `order` of classes, so that stored predictions and new ones of the same photos are the same to the bit. NaN
    stays: a photo that could not be read.

    Source:
        Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles",
        arXiv:1612.01474, section 2.4.
    """
    parts = zip(probabilities, temperatures, orders, strict=True)
    calibrated = [apply_temperature(log_probabilities(rows[:, order]), one) for rows, one, order in parts]
    return np.mean(calibrated, axis=0).astype(np.float32)
