"""From the bytes of photos to answers: decode on some threads, the model on one, within the limits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fieldmark.errors import PhotoError
from fieldmark.serve.batching import Batcher, QueueFullError
from fieldmark.serve.limits import Limits

if TYPE_CHECKING:
    from fieldmark.augment.reference import EvalSpec, Views
    from fieldmark.inference.predictor import Predictor
    from fieldmark.inference.triage import AttentionMaps
    from fieldmark.runs.folder import Run


# Of the many formats that Pillow reads, those that cameras, phones and browsers write: each decoder is a risk.
_FORMATS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|....ftyp(heic|heix|heif|hevc|mif1|msf1|avif|avis)|II\*\0|MM\0\*|GIF8|BM",
    re.DOTALL,
)


class BusyError(Exception):
    """Too much to do: the client should come back. The message is for the client."""


class PhotoService:
    """Answers photos of many requests; see `create_app` for the arguments."""

    def __init__(
        self, model: ServedModel, *, limits: Limits, max_batch: int, wait_seconds: float, decode_threads: int
    ) -> None:
        self.model = model
        self.limits = limits
        self.metrics = ServerMetrics()
        self._decode_threads = decode_threads
        self._is_open = False
        self._in_hand = 0
        self._batcher = Batcher(
            model.probabilities,
            max_batch=max_batch,
            max_queued=limits.max_queued,
            wait_seconds=wait_seconds,
            on_batch=self.metrics.batch_size.observe,
        )

    @property
    def num_waiting(self) -> int:
        """Photos that are being decoded, wait, or are being computed."""
        return self._in_hand

    def start(self) -> None:
        """Begin to answer, also after a stop; call it inside the event loop."""
        self._decoders = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        self._batcher.start()
        self._is_open = True

    async def stop(self) -> None:
        """Take no more, answer what was taken, then end."""
        self._is_open = False
        while self._in_hand:
            await asyncio.sleep(0.01)
        await self._batcher.stop()
        await asyncio.to_thread(self._decoders.shutdown)

    async def answer(self, photos: Sequence[bytes], *, top: int, wants_attention: bool) -> list[PhotoAnswer]:
        """One answer for each photo, in order.

        Raises:
            BusyError: Too many photos are in hand, the time is up, or the server is ending.
        """
        if not self._is_open:
            raise BusyError("the server is ending; send this request again later")
        if self._in_hand + len(photos) > self.limits.max_queued:
            raise BusyError("too many photos wait; send this request again later")
        self._in_hand += len(photos)
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await self._answer(photos, top, wants_attention=wants_attention)
        except QueueFullError:
            raise BusyError("too many photos wait; send this request again later") from None
        except TimeoutError:
            seconds = self.limits.answer_seconds
            raise BusyError(f"no answer within {seconds:g} seconds; send fewer photos, or come back later") from None
        finally:
            self._in_hand -= len(photos)

    async def _answer(self, photos: Sequence[bytes], top: int, *, wants_attention: bool) -> list[PhotoAnswer]:
        loop = asyncio.get_running_loop()
        prepared = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, self._prepare, photo) for photo in photos)
        )
        readable = [item.picture for item in prepared if isinstance(item, Prepared)]
        rows = iter(await self._batcher.submit(readable))
        answers: list[PhotoAnswer] = []
        for item in prepared:
            if isinstance(item, Prepared):
                answer, best = self._named(next(rows), top, item)
                if wants_attention and self.model.has_attention:
                    found = await loop.run_in_executor(self._decoders, self.model.attention, item.picture, best)
                    answer.attention = np.round(found.astype(float), 3).tolist()
            else:
                answer = PhotoAnswer(
                    label=None, is_unknown=True, group=None, top=[], problem=item, attention=None, seen=None
                )
            outcome = "unreadable" if answer.problem else "unknown" if answer.is_unknown else "answered"
            self.metrics.photos.labels(outcome).inc()
            answers.append(answer)
        return answers

    def _prepare(self, photo: bytes) -> Prepared | str:
        """The prepared photo, or the reason why it cannot be used."""
        if photo and not _FORMATS.match(photo):
            return "is not an image that this server reads: JPEG, PNG, WebP, HEIC, AVIF, TIFF, GIF or BMP"
        try:
            return self.model.prepare(photo, max_pixels=self.limits.max_pixels)
        except PhotoError as error:
            return error.reason

    def _named(self, row: NDArray[np.float32], top: int, item: Prepared) -> tuple[PhotoAnswer, int]:
        best: list[int] = np.argsort(-row, kind="stable")[:top].tolist()
        answers = [Answer(label=self.model.classes[number], probability=float(row[number])) for number in best]
        is_unknown = not answers[0].probability >= self.model.threshold  # NaN is never sure
        answer = PhotoAnswer(
            label=None if is_unknown else answers[0].label,
            is_unknown=is_unknown,
            group=self._group(row) if is_unknown else None,
            top=answers,
            problem=None,
            attention=None,
            seen=list(item.box),
        )
        return answer, best[0]

    def _group(self, row: NDArray[np.float32]) -> Group | None:
        groups = self.model.fallback
        found = groups.answer(row) if groups else None
        if found is None or not found.level:
            return None
        return Group(level=found.level, name=found.name, probability=found.probability)


@dataclass(frozen=True)
class Prepared:
    """A photo, ready for the model.

    Attributes:
        picture: (3, S, S) float32, normalised; several as `vision.views` lays them out.
        box: x, y, width, height of what the model sees, as shares of the upright photo.
    """

    picture: NDArray[np.float32]
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class About:
    """What the page says of a model.

    Attributes:
        name: What people call it; never a path.
        accuracy: Top-1 on validation photos with its interval, (value, low, high); None where it is not known.
        is_calibrated: Whether its probabilities were calibrated, and so mean what they say.
    """

    name: str
    accuracy: tuple[float, float, float] | None
    is_calibrated: bool


class ServedModel:
    """A run folder or an exported model behind the server."""

    def __init__(
        self, predictor: Predictor, *, about: About, maps: AttentionMaps | None, examples: Sequence[bytes]
    ) -> None:
        self._predictor = predictor
        self._maps = maps
        self.about = about
        self.examples = list(examples)  # photos that the page may offer to try, as JPEG
        self.classes = predictor.classes
        self.threshold = predictor.threshold
        self.fallback = predictor.fallback

    @classmethod
    def load(cls, path: Path) -> ServedModel:
        """Load a run (with attention maps, for convolutional models), an ensemble or an export (without).

        Raises:
            FieldmarkError: Neither is there, or it cannot be loaded.
        """
        from fieldmark.inference.calibration import load_calibration
        from fieldmark.inference.exported import FILE, ModelMetadata
        from fieldmark.inference.predictor import Predictor
        from fieldmark.inference.triage import AttentionMaps
        from fieldmark.runs.folder import Run

        predictor = Predictor.load(path)
        name = path.resolve().name
        if (path / FILE).is_file():
            metadata = ModelMetadata.load(path)
            is_calibrated = metadata.temperature != 1 or metadata.threshold > 0
            about = About(name, _accuracy(metadata.metrics), is_calibrated)
            return cls(predictor, about=about, maps=None, examples=())
        run = Run(path)
        about = About(name, _accuracy(run.summary), load_calibration(run) is not None)
        maps = None if run.is_ensemble else AttentionMaps(run.load_model())
        return cls(predictor, about=about, maps=maps, examples=_examples(run, count=5))

    @property
    def has_attention(self) -> bool:
        """Whether `attention` can be asked."""
        return self._maps is not None and self._maps.is_available

    def prepare(self, data: bytes, *, max_pixels: int) -> Prepared:
        """Decode one photo; raises PhotoError."""
        from fieldmark.augment.reference import eval_picture
        from fieldmark.data.decode import decode

        photo = decode(data, background=self._predictor.decoding.background, max_pixels=max_pixels)
        spec = self._predictor.spec
        return Prepared(eval_picture(photo, spec).numpy(), seen_box(photo.shape[1], photo.shape[0], spec))

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 3, S, S) -> (B, K), calibrated where the model was."""
        return self._predictor.probabilities(images)

    def attention(self, picture: NDArray[np.float32], class_number: int) -> NDArray[np.float32]:
        """(28, 28) in [0, 1]: where the model looked for a class."""
        assert self._maps is not None
        maps: Any = self._maps(picture[None], [class_number])
        return maps[0]


def _accuracy(summary: dict[str, Any]) -> tuple[float, float, float] | None:
    """Validation accuracy of a run's summary with its interval."""
    val: dict[str, Any] = summary.get("val") or {}
    if "top1" not in val or not val.get("top1_interval"):
        return None
    low, high = val["top1_interval"]
    return float(val["top1"]), float(low), float(high)


def _examples(run: Run, *, count: int) -> list[bytes]:
    """Some validation photos of different classes, if they are still there."""
    from fieldmark.errors import FieldmarkError

    examples: list[bytes] = []
    try:
        files = run.split.of("val").files()
        for place in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
            examples.append(thumbnail(files[place], 640))
    except FieldmarkError:
        pass  # a run without its photos serves all the same
    return examples


def seen_box(width: int, height: int, spec: EvalSpec | Views) -> tuple[float, float, float, float]:
    """The part of a photo that the evaluation transform (the widest of several) keeps: shares x, y, width, height."""
    from fieldmark.augment.reference import Views

    if isinstance(spec, Views):
        return max((seen_box(width, height, one) for one in spec.specs), key=lambda box: box[2])
    if spec.transform == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    side = min(width, height) * spec.crop_fraction
    return ((width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height)


class ServerMetrics:
    """Counters of one server, in a registry of their own, so that two apps in a process do not mix."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fieldmark_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "fieldmark_request_seconds", "Time from body to answer.", ["path"], registry=self.registry
        )
        self.photos = Counter("fieldmark_photos", "Photos by outcome.", ["outcome"], registry=self.registry)
        self.batch_size = Histogram(
            "fieldmark_batch_photos",
            "Photos answered in one pass of the model.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("fieldmark_waiting_photos", "Photos that wait for the model.", registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        from prometheus_client import generate_latest

        answer: Any = generate_latest(self.registry)
        return answer


class Answer(BaseModel):
    """One class and its probability."""

    label: str
    probability: float


class Group(BaseModel):
    """A name at some level of the taxonomy that the model was calibrated with."""

    level: str
    name: str
    probability: float


class PhotoAnswer(BaseModel):
    """What the model says of one photo."""

    label: str | None
    """The likeliest class; null if it is not sure enough, or the photo could not be read."""

    is_unknown: bool
    """Whether the probability is below the threshold."""

    group: Group | None
    """Where the class is not sure: the finest group of the taxonomy that is; null if there is none."""

    top: list[Answer]
    """The likeliest classes, best first; empty for a photo that could not be read."""

    problem: str | None
    """Why the photo could not be read; null if it could."""

    attention: list[list[float]] | None
    """Rows of a map in 0 to 1: where the model looked for its first answer. Only on request."""

    seen: list[float] | None
    """x, y, width, height, as shares of the photo, of what the model sees and `attention` covers."""


class PhotoAnswers(BaseModel):
    """Answers in the order of the photos."""

    model: str
    threshold: float
    photos: list[PhotoAnswer]


class Accuracy(BaseModel):
    """Share of validation photos that the model named right, with its 95 % interval."""

    value: float
    low: float
    high: float


class Health(BaseModel):
    """Whether the server answers, and with what."""

    status: str
    version: str
    model: str
    classes: int
    accuracy: Accuracy | None
    is_calibrated: bool
    waiting: int
    has_attention: bool
    examples: int
    max_photos: int


class Classes(BaseModel):
    """Names of the classes; a class's number is its place."""

    classes: list[str]
    threshold: float


class Problem(BaseModel):
    """Why a request was refused."""

    detail: Any


def thumbnail(file: Path, side: int) -> bytes:
    """JPEG of a photo, its long side at most `side` pixels; raises PhotoError."""
    from fieldmark.config import DataConfig
    from fieldmark.plots import thumbnail

    limits = DataConfig()
    return thumbnail(file, side, background=limits.background, max_pixels=limits.max_pixels)
