"""From the bytes of photos to answers: decode on some threads, the model on one, within the limits.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel

from fieldmark.augment.reference import EvalSpec, Views, eval_picture
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.loader import limit_team
from fieldmark.data.shards import PhotoFile
from fieldmark.errors import FieldmarkError, PhotoError
from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.exported import FILE, ModelMetadata
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.inference.triage import AttentionMaps
from fieldmark.plots import thumbnail
from fieldmark.runs.folder import Run
from fieldmark.serve.limits import Limits, busy

# Of the many formats that Pillow reads, those that cameras, phones and browsers write: each decoder is a risk.
_FORMATS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|....ftyp(heic|heix|heif|hevc|mif1|msf1|avif|avis)|II\*\0|MM\0\*|GIF8|BM",
    re.DOTALL,
)
_WAIT_SECONDS = 0.002  # how long the first photo of a batch waits for others when the model is idle
_NUM_EXAMPLES = 5


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
    """Holds what the model says of one photo."""

    label: str | None  # the likeliest class; null if it is not sure enough, or the photo could not be read
    is_unknown: bool
    group: Group | None  # where the class is not sure: the finest group of the taxonomy that is
    top: list[Answer]  # the likeliest classes, best first; empty for a photo that could not be read
    problem: str | None  # why the photo could not be read
    attention: list[list[float]] | None  # rows of a map in 0 to 1: where the model looked for its first answer
    seen: list[float] | None  # x, y, width, height, as shares of the photo, of what the model sees and the map covers


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
    """Names of the classes, in order of class number."""

    classes: list[str]
    threshold: float


class Problem(BaseModel):
    """Why a request was refused."""

    detail: Any


class PhotoService:
    """Answers photos of many requests, and counts them."""

    def __init__(self, model: ServedModel, limits: Limits, *, decode_threads: int) -> None:
        self.model, self.limits, self.metrics = model, limits, ServerMetrics()
        self.num_waiting = 0  # photos that are being decoded, wait, or are being computed
        self._decode_threads, self._is_open = decode_threads, False

    @asynccontextmanager
    async def run(self, _: object) -> AsyncGenerator[None]:
        """Answer to the end of the block; then take no more, answer what was taken, and end."""
        self._decoders = ThreadPoolExecutor(self._decode_threads, "decode", limit_team)
        self._looker = ThreadPoolExecutor(1, "attention")  # one map at a time, with all of torch's threads
        self._batcher = Batcher(self._answer_batch, max_batch=self.limits.max_batch)
        self._is_open = True
        yield
        self._is_open = False
        while self.num_waiting:
            await asyncio.sleep(0.01)
        await self._batcher.stop()
        for pool in (self._decoders, self._looker):
            await asyncio.to_thread(pool.shutdown)

    async def answer(self, photos: Sequence[bytes], *, top: int, wants_attention: bool) -> list[PhotoAnswer]:
        """One answer for each photo, in order; refuse if too many are in hand, time is up, or the server is ending."""
        if not self._is_open:
            raise busy("the server is ending; send this request again later")
        if self.num_waiting + len(photos) > self.limits.max_queued:
            raise busy("too many photos wait; send this request again later")
        self.num_waiting += len(photos)
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await self._answer(photos, top, wants_attention=wants_attention)
        except TimeoutError:
            seconds = self.limits.answer_seconds
            raise busy(f"no answer within {seconds:g} seconds; send fewer photos, or come back later") from None
        finally:
            self.num_waiting -= len(photos)

    async def _answer(self, photos: Sequence[bytes], top: int, *, wants_attention: bool) -> list[PhotoAnswer]:
        loop = asyncio.get_running_loop()
        prepared = await asyncio.gather(*(loop.run_in_executor(self._decoders, self._prepare, one) for one in photos))
        rows = iter(await self._batcher.submit([item.picture for item in prepared if isinstance(item, Prepared)]))
        answers: list[PhotoAnswer] = []
        for item in prepared:
            row, problem = (np.empty(0, np.float32), item) if isinstance(item, str) else (next(rows), "")
            answer = self._describe(row, problem, top)
            if isinstance(item, Prepared):
                answer.seen = list(item.box)
            if isinstance(item, Prepared) and wants_attention and self.model.has_attention:
                best = int(row.argmax())
                found = await loop.run_in_executor(self._looker, self.model.attention, item.picture, best)
                answer.attention = np.round(found.astype(float), 3).tolist()
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

    def _answer_batch(self, pictures: list[Picture]) -> NDArray[np.float32]:
        self.metrics.batch_size.observe(len(pictures))
        return self.model.probabilities(np.stack(pictures))

    def _describe(self, row: NDArray[np.float32], problem: str, top: int) -> PhotoAnswer:
        model = self.model
        prediction = Prediction("", model.classes, row, problem, model.threshold, model.fallback)
        is_unknown, finest = prediction.is_unknown, prediction.answer
        has_group = is_unknown and finest.level
        return PhotoAnswer(
            label=None if is_unknown else prediction.label,
            is_unknown=is_unknown,
            group=Group(level=finest.level, name=finest.name, probability=finest.probability) if has_group else None,
            top=[Answer(label=label, probability=probability) for label, probability in prediction.top(top)],
            problem=problem or None,
            attention=None,
            seen=None,
        )


Picture = NDArray[np.float32]
Waiting = tuple[Picture, "asyncio.Future[NDArray[np.float32]]"]


class Batcher:
    """Collects pictures, (3, S, S), of many requests and answers them in batches, on one thread.

    While the model computes one batch, the photos that arrive wait; the next batch takes all of them, up to a limit. So
    an idle server answers at once and a busy one fills its batches.

    Source:
        Crankshaw et al., "Clipper", arXiv:1612.03079, section 4.3.
    """

    def __init__(self, answer: Callable[[list[Picture]], NDArray[np.float32]], *, max_batch: int) -> None:
        self._answer = answer  # B pictures -> (B, K)
        self._max_batch = max_batch
        self._waiting: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        # One thread: two batches at once would share the same cores and only wait for each other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End; nothing may wait any more."""
        self._task.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, pictures: Sequence[Picture]) -> list[NDArray[np.float32]]:
        """Answers, (K,) each, in order. Cancelling the call takes back what still waits."""
        loop = asyncio.get_running_loop()
        waiting: list[Waiting] = [(picture, loop.create_future()) for picture in pictures]
        self._waiting.extend(waiting)
        self._arrived.set()
        try:
            return await asyncio.gather(*(future for _, future in waiting))
        except asyncio.CancelledError:
            self._waiting = deque(item for item in self._waiting if not item[1].done())
            raise

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while await self._arrived.wait():
            if len(self._waiting) < self._max_batch:
                await asyncio.sleep(_WAIT_SECONDS)
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, [picture for picture, _ in batch])
            except Exception as error:  # the model failed: everybody in the batch learns it, the server lives on
                answers: Iterable[Any] = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=False):
                if future.done():
                    continue  # its request was cancelled
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


class Prepared(NamedTuple):
    """A photo, ready for the model."""

    picture: Picture  # normalized; several as `augment.reference.Views` lays them out
    box: tuple[float, float, float, float]  # x, y, width, height of what the model sees, as shares of the photo


def prepare_photo(source: PhotoFile | bytes, decoding: DecodeSpec, spec: EvalSpec | Views) -> Prepared:
    """Decode one photo, and say which part of it the model sees; raises PhotoError."""
    photo = decoding.read(source)
    height, width = photo.shape[:2]
    boxes = [_seen_box(width, height, one) for one in (spec.specs if isinstance(spec, Views) else (spec,))]
    return Prepared(eval_picture(photo, spec).numpy(), max(boxes, key=lambda box: box[2]))


def _seen_box(width: int, height: int, spec: EvalSpec) -> tuple[float, float, float, float]:
    if spec.transform == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    side = min(width, height) * spec.crop_fraction
    return ((width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height)


class ServedModel:
    """A run folder, with attention maps if it is convolutional, an ensemble or an export behind the server."""

    def __init__(self, path: Path) -> None:
        self._predictor = Predictor.load(path)
        self.classes = self._predictor.classes
        self.threshold = self._predictor.threshold
        self.fallback = self._predictor.fallback
        self.examples: list[bytes] = []  # photos that the page may offer to try, as JPEG
        self._maps: AttentionMaps | None = None
        self.has_attention = False  # whether `attention` can be asked
        self.probabilities = self._predictor.probabilities  # (B, 3, S, S) -> (B, K), calibrated where the model was
        self.name = path.resolve().name  # never a path
        if (path / FILE).is_file():
            metadata = ModelMetadata.load(path)
            self.accuracy = _accuracy(metadata.metrics)
            self.is_calibrated = metadata.temperature != 1 or metadata.threshold > 0
            return
        run = Run(path)
        self.accuracy = _accuracy(run.summary)
        self.is_calibrated = load_calibration(run) is not None
        self.examples = _examples(run)
        if not run.is_ensemble:
            self._maps = AttentionMaps(run.load_model(), size=run.eval_spec().size)
            self.has_attention = self._maps.is_available

    def prepare(self, data: bytes, *, max_pixels: int) -> Prepared:
        """Decode one photo; raises PhotoError."""
        return prepare_photo(data, DecodeSpec(self._predictor.decoding.background, max_pixels), self._predictor.spec)

    def attention(self, picture: NDArray[np.float32], class_number: int) -> NDArray[np.float32]:
        """(28, 28) in [0, 1]: where the model looked for a class."""
        assert self._maps is not None
        return self._maps(picture[None], [class_number])[0]


def _accuracy(summary: dict[str, Any]) -> Accuracy | None:
    """Validation accuracy of a run's summary with its interval."""
    val: dict[str, Any] = summary.get("val") or {}
    if "top1" not in val or not val.get("top1_interval"):
        return None
    low, high = val["top1_interval"]
    return Accuracy(value=val["top1"], low=low, high=high)


def _examples(run: Run) -> list[bytes]:
    """Some validation photos of different classes, if they are still there."""
    examples: list[bytes] = []
    with suppress(FieldmarkError):  # a run without its photos serves all the same
        files = run.split.of("val").files()
        for number in np.linspace(0, len(files) - 1, min(_NUM_EXAMPLES, len(files))).round().astype(int):
            examples.append(thumbnail(files[number], 640, run.decode_spec()))
    return examples


class ServerMetrics:
    """Counters of one server, in a registry of their own, so that two apps in a process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fieldmark_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram("fieldmark_request_seconds", "Time from body to answer.", ["path"], registry=registry)
        self.photos = Counter("fieldmark_photos", "Photos by outcome.", ["outcome"], registry=registry)
        self.batch_size = Histogram(
            "fieldmark_batch_photos",
            "Photos answered in one pass of the model.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.waiting = Gauge("fieldmark_waiting_photos", "Photos that wait for the model.", registry=registry)
