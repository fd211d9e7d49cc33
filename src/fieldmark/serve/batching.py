"""Photos of different requests answered in one pass of the model.

While the model computes one batch, the photos that arrive wait; the next batch takes all of them, up to a limit. So an
idle server answers at once and a busy one fills its batches (Crankshaw et al., "Clipper", arXiv:1612.03079, section
4.3). Letters: B batch, K classes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
Answers = NDArray[np.float32]


class QueueFullError(Exception):
    """More photos wait than the queue may hold; nothing of the request was queued."""


class Batcher:
    """Collects pictures from many coroutines and answers them in batches, on one thread.

    Args:
        answer: (B, 3, S, S) -> (B, K); called from one thread at a time, never from the event loop's.
        max_batch: Most pictures in a batch.
        max_queued: Most pictures that wait; those being computed do not count.
        wait_seconds: How long the first picture of a batch may wait for company when the model is idle.
        on_batch: Told the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[NDArray[np.float32]], Answers],
        *,
        max_batch: int,
        max_queued: int,
        wait_seconds: float,
        on_batch: Callable[[int], None],
    ) -> None:
        self._answer = answer
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._wait_seconds = wait_seconds
        self._on_batch = on_batch
        self._waiting: deque[tuple[Picture, asyncio.Future[Any]]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def num_waiting(self) -> int:
        """Pictures that wait to be computed."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to answer, also after a stop; call it inside the event loop."""
        self._is_stopping = False
        self._arrived = asyncio.Event()
        # One thread: two batches at once would share the same cores and only wait for each other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, then end."""
        if self._task is None:
            return
        self._is_stopping = True
        self._arrived.set()
        await self._task
        self._task = None
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, pictures: Sequence[Picture]) -> list[Answers]:
        """Answers, (K,) each, to pictures, (3, S, S) each, in order.

        Cancelling the call takes back what still waits.

        Raises:
            QueueFullError: There is no room for all of them.
        """
        if len(self._waiting) + len(pictures) > self._max_queued:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in pictures]
        self._waiting.extend(zip(pictures, futures, strict=True))
        self._arrived.set()
        return await asyncio.gather(*futures)

    async def _run(self) -> None:
        while self._waiting or not self._is_stopping:
            await self._arrived.wait()
            if self._wait_seconds and len(self._waiting) < self._max_batch:
                await asyncio.sleep(self._wait_seconds)
            if batch := self._take():
                await self._answer_batch(batch)

    async def _answer_batch(self, batch: list[tuple[Picture, asyncio.Future[Any]]]) -> None:
        pictures = [picture for picture, _ in batch]
        answers: list[Any]
        try:
            answers = list(await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, pictures))
        except Exception as error:  # the model failed: everybody in the batch learns it, the server lives on
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue  # its request was cancelled
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _take(self) -> list[tuple[Picture, asyncio.Future[Any]]]:
        batch: list[tuple[Picture, asyncio.Future[Any]]] = []
        while self._waiting and len(batch) < self._max_batch:
            picture, future = self._waiting.popleft()
            if not future.done():  # its request was cancelled
                batch.append((picture, future))
        if not self._waiting and not self._is_stopping:
            self._arrived.clear()
        return batch

    def _compute(self, pictures: list[Picture]) -> Answers:
        self._on_batch(len(pictures))
        return self._answer(np.stack(pictures))
