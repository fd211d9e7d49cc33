"""From the bytes of photos to answers: decode on some threads, the model on one, within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import PhotoError
from fieldmark.serve.backend import PhotoModel, Prepared
from fieldmark.serve.batching import Batcher, QueueFullError
from fieldmark.serve.limits import Limits
from fieldmark.serve.metrics import ServerMetrics
from fieldmark.serve.schema import Answer, Group, PhotoAnswer


class BusyError(Exception):
    """Too much to do: the client should come back. The message is for the client."""


class PhotoService:
    """Answers photos of many requests; see `create_app` for the arguments."""

    def __init__(
        self, model: PhotoModel, *, limits: Limits, max_batch: int, wait_seconds: float, decode_threads: int
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
        try:
            return self.model.prepare(photo, max_pixels=self.limits.max_pixels)
        except PhotoError as error:
            return error.reason

    def _named(self, row: NDArray[np.float32], top: int, item: Prepared) -> tuple[PhotoAnswer, int]:
        best: list[int] = np.argsort(-row, kind="stable")[:top].tolist()
        answers = [Answer(label=self.model.classes[number], probability=float(row[number])) for number in best]
        is_unknown = answers[0].probability < self.model.threshold
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
        groups = self.model.back_off
        found = groups.answer(row) if groups else None
        if found is None or not found.level:
            return None
        return Group(level=found.level, name=found.name, probability=found.probability)
