"""Batches of prepared photos: their order, each process's share of them, and who prepares them.

Which photos are in a batch, and what is done to each, depends on (seed, epoch, photo number) alone: neither workers
nor processes nor threads change what the model sees.

Shape letters: B batch, S side in pixels, N photos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fieldmark.data.workers import Batch, WorkerPool, join_batches

Plan = Sequence[Sequence[int]]


Prepare = Callable[[Sequence[int], int], Batch]


def epoch_order(num_photos: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Order of the photos in an epoch: a pure function of its arguments.

    Sorts the raw output of Philox, which NumPy promises never to change (NEP 19), unlike `Generator.permutation`.

    Args:
        num_photos: N, at least 0.
        seed: Of the run.
        epoch: 0-based.
        shuffle: False is the natural order.

    Returns:
        (N,) int64, each number from 0 to N - 1 once.
    """
    if not shuffle:
        return np.arange(num_photos, dtype=np.int64)
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER_STREAM])).random_raw(num_photos)
    return np.argsort(keys, kind="stable").astype(np.int64)


# Keeps the order's random numbers apart from those of anything else that is seeded by (seed, epoch).
_ORDER_STREAM = 0x6F726465


def cut_plan(numbers: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Batches of `batch_size` photos in their order; the last may be smaller."""
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def shard_plan(plan: Plan, *, rank: int, processes: int) -> list[list[int]]:
    """One process's share of a plan: a contiguous part of every batch, so that together they are the same batches.

    Photos are neither repeated nor dropped. Shares differ by at most one photo, and a batch with fewer photos than
    processes leaves some an empty share; every process gets as many batches.

    Args:
        plan: Photo numbers of each global batch.
        rank: Of this process, from 0.
        processes: How many there are.
    """
    shares: list[list[int]] = []
    for numbers in plan:
        start, end = (len(numbers) * place // processes for place in (rank, rank + 1))
        shares.append([int(number) for number in numbers[start:end]])
    return shares


class Loader:
    """Prepares batches in the training process or in others, epoch after epoch.

    Close it, or use it in a `with`: its processes live until then.

    Args:
        workers: Processes that prepare batches; 0 prepares them here, between two steps.
        threads: Threads that share the preparation of a batch when `workers` is 0. What releases the interpreter lock
            (decoding, warping) then uses the cores that the model is not using at that moment.
        start_method: "forkserver" or "spawn"; None is the first that the system has.
    """

    def __init__(self, *, workers: int, threads: int, start_method: str | None = None) -> None:
        self._workers = workers
        self._num_threads = threads
        self._start_method = start_method
        self._pool: WorkerPool | None = None
        self._threads: ThreadPoolExecutor | None = None

    def batches(self, prepare: Prepare, plan: Plan, *, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, in the order of the plan.

        Args:
            prepare: Called as `prepare(numbers, epoch)`; picklable if there are workers. What it does to a photo must
                not depend on the photos beside it.
            plan: Photo numbers of each batch.
            epoch: Handed to `prepare`.

        Raises:
            FieldmarkError: As raised by `prepare`, wherever it ran.
            ResourceError: A worker died.
            TrainingError: `prepare` cannot be sent to a worker.
        """
        if not self._workers:
            for numbers in plan:
                yield self._prepare_here(prepare, numbers, epoch)
            return
        if self._pool is None:
            owner = getattr(prepare, "__self__", prepare)
            preload = [prepare.__module__, *getattr(owner, "preload", ())]  # once, not in every worker
            self._pool = WorkerPool(self._workers, start_method=self._start_method, preload=preload)
        try:
            yield from self._pool.batches(prepare, plan, epoch=epoch)
        except Exception:
            self.close()
            raise

    def _prepare_here(self, prepare: Prepare, numbers: Sequence[int], epoch: int) -> Batch:
        num_parts = min(self._num_threads, len(numbers))
        if num_parts < 2:
            return prepare(numbers, epoch)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, "fieldmark-loader", _compute_alone)
        parts = [shard_plan([numbers], rank=part, processes=num_parts)[0] for part in range(num_parts)]
        return join_batches(list(self._threads.map(lambda part: prepare(part, epoch), parts)))

    def close(self) -> None:
        """Stop processes and threads. The loader may be used again; it then starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _compute_alone() -> None:
    """Keep torch from starting a team of threads for this one.

    With more threads in all than cores, GNU's OpenMP lets every team sleep rather than wait where its threads meet,
    which costs the training's own team a tenth of its time.
    """
    torch.get_num_threads()  # sets this thread's number, which the limit then lowers; no other thread's changes
    threadpool_limits(1, user_api="openmp")


def auto_workers(*, cores: int, is_cached: bool, has_gpu: bool) -> tuple[int, str]:
    """How many processes should prepare batches, and why.

    Args:
        cores: That this process may use.
        is_cached: Whether photos come from the cache, so that preparing one takes well under a millisecond.
        has_gpu: Whether the model computes elsewhere than on these cores.

    Returns:
        Number of workers, and the reason in one phrase.
    """
    if cores <= 1:
        return 0, "one core: it prepares and computes by turns"
    if has_gpu:
        workers = min(cores - 1, 4 if is_cached else 16)
        return workers, f"{cores} cores feed the GPU, one of them launches its work"
    if is_cached:
        return 0, "cached photos cost little beside the model, which then has every core"
    if cores <= 4:
        return 0, f"all {cores} cores prepare, then all compute: a core kept for loading would mostly idle"
    return cores // 8 + 1, f"the model computes on the other cores of {cores}"
