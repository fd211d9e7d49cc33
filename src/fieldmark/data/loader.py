"""Batches of prepared photos: their order, each process's share of them, and who prepares them.

Which photos are in a batch, and what is done to each, depends on (seed, epoch, photo number) alone: neither workers
nor processes nor threads change what the model sees.

Workers are those of torch's DataLoader, started without fork and kept from epoch to epoch. They compute with one thread
and ignore Ctrl-C; their death is noticed.

Shape letters: B batch, S side in pixels, N photos.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from fieldmark.errors import FieldmarkError, ResourceError, TrainingError

# Keeps the order's random numbers apart from those of anything else that is seeded by (seed, epoch).
_ORDER_STREAM = 0x6F726465
_PREFETCH = 2  # batches that each worker is ahead: one being taken, one ready


@dataclass(frozen=True)
class Batch:
    """Photos ready for the model (or for the executor on the GPU)."""

    images: Tensor  # (B, 3, S, S) float32 normalized, or uint8 for the GPU executor
    numbers: Tensor  # (B,) int64 photo numbers in the index
    labels: Tensor  # (B,) int64 class numbers, -1 for unlabeled photos
    problems: tuple[tuple[int, str], ...]  # (index in the batch, reason) of photos that failed; prediction only
    sizes: Tensor | None = None
    """(B, 2) int64 width and height of each photo in the upper left corner of its slot, where `images` are photos
    still to be augmented on the device; None for pictures of the model's size."""

    def pin_memory(self) -> Batch:
        """The same batch with its images in page-locked memory, from which a GPU copies without waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


Plan = Sequence[Sequence[int]]
Prepare = Callable[[Sequence[int], int], Batch]


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of several, in their order; smaller images are padded with zeros below and to the right."""
    starts = np.cumsum([0, *(len(part.numbers) for part in parts)]).tolist()
    height, width = (max(part.images.shape[axis] for part in parts) for axis in (2, 3))
    images: list[Tensor] = []
    for part in parts:
        below, right = height - part.images.shape[2], width - part.images.shape[3]
        # Padding by nothing would copy.
        images.append(functional.pad(part.images, (0, right, 0, below)) if right or below else part.images)
    sizes = [part.sizes for part in parts if part.sizes is not None]
    return Batch(
        torch.cat(images),
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.labels for part in parts]),
        tuple((start + at, reason) for start, part in zip(starts, parts, strict=False) for at, reason in part.problems),
        torch.cat(sizes) if sizes else None,
    )


def epoch_order(num_photos: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """(N,) numbers of the photos in the order of an epoch: a pure function of its arguments.

    Sorts the raw output of Philox, which NumPy promises never to change (NEP 19), unlike `Generator.permutation`.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER_STREAM])).random_raw(num_photos)
    return np.argsort(keys, kind="stable").astype(np.int64)


def cut_plan(numbers: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Batches of `batch_size` photos in their order; the last may be smaller."""
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def shard_plan(plan: Plan, *, rank: int, processes: int) -> list[list[int]]:
    """One process's share of a plan: a contiguous part of every batch, so that together they are the same batches.

    Photos are neither repeated nor dropped. Shares differ by at most one photo, and a batch with fewer photos than
    processes leaves some an empty share; every process gets as many batches.
    """
    shares: list[list[int]] = []
    for numbers in plan:
        start, end = (len(numbers) * part // processes for part in (rank, rank + 1))
        shares.append([int(number) for number in numbers[start:end]])
    return shares


class Loader:
    """Prepares batches in the training process or in others, epoch after epoch.

    Close it, or use it in a `with`: its processes live until then. They are started by forkserver on Linux (a fork of a
    process that has imported torch but has no threads), by spawn elsewhere, or as asked: a fork of the training process
    would inherit the locks of its OpenMP threads without the threads. Without workers, batches are prepared here,
    between two steps, by some threads: what releases the interpreter lock (decoding, warping) then uses the cores that
    the model is not using at that moment.
    """

    def __init__(self, *, workers: int, threads: int, start_method: str | None = None) -> None:
        self._num_workers = workers
        self._num_threads = threads
        self._start_method = start_method
        self._tasks: list[_Task] = []  # of the epoch under way
        self._workers: DataLoader[Batch | Exception] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._turn = 0
        self._threads: ThreadPoolExecutor | None = None

    def batches(self, prepare: Prepare, plan: Plan, *, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, in the order of the plan.

        `prepare(numbers, epoch)` must be picklable if there are workers, and what it does to a photo must not depend on
        the photos beside it. A FieldmarkError arrives as it was raised, wherever that was; a worker that died is a
        ResourceError, a `prepare` that cannot be sent or an epoch begun before this one has ended a TrainingError.
        """
        if not self._num_workers:
            for numbers in plan:
                yield self._prepare_here(prepare, numbers, epoch)
            return
        try:
            yield from self._prepare_elsewhere(prepare, plan, epoch)
        except Exception:
            self.close()
            raise

    def _prepare_here(self, prepare: Prepare, numbers: Sequence[int], epoch: int) -> Batch:
        num_parts = min(self._num_threads, len(numbers))
        if num_parts < 2:
            return prepare(numbers, epoch)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, "fieldmark-loader", compute_alone)
        parts = [shard_plan([numbers], rank=part, processes=num_parts)[0] for part in range(num_parts)]
        return join_batches(list(self._threads.map(lambda part: prepare(part, epoch), parts)))

    def _start_workers(self, prepare: Prepare) -> DataLoader[Batch | Exception]:
        methods = multiprocessing.get_all_start_methods()
        fitting = "forkserver" if "forkserver" in methods and sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(self._start_method or fitting)
        if context.get_start_method() == "forkserver":
            owner = getattr(prepare, "__self__", prepare)
            preload = [prepare.__module__, *getattr(owner, "preload", ())]  # imported once, not in every worker
            context.set_forkserver_preload([__name__, *preload])
        # Else torch would raise in whatever line the training is when a worker dies; it is noticed at the next batch.
        signal_handling._SIGCHLD_handler_set = True  # pyright: ignore[reportPrivateUsage]
        return DataLoader(
            _Answers(),
            batch_size=None,
            sampler=self._tasks,
            num_workers=self._num_workers,
            multiprocessing_context=context,
            worker_init_fn=_begin_work,
            generator=torch.Generator(),  # else it draws from the one that dropout draws from
            prefetch_factor=_PREFETCH,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
        )

    def _prepare_elsewhere(self, prepare: Prepare, plan: Plan, epoch: int) -> Iterator[Batch]:
        self._turn = turn = self._turn + 1
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fieldmark-")
        path = Path(self._folder.name, f"{turn}.pickle")
        try:
            path.write_bytes(pickle.dumps(prepare))
        except Exception as error:
            raise TrainingError(
                f"what prepares batches cannot be sent to a worker process ({error}). "
                "Make it a picklable object of a module, or set loader.workers=0"
            ) from error
        self._tasks[:] = [(str(path), [int(number) for number in numbers], epoch) for numbers in plan]
        with _without_main(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are more workers than cores: as was asked for
            self._workers = self._workers or self._start_workers(prepare)
            answers = iter(self._workers)
        for before in path.parent.iterdir():
            if before != path:
                before.unlink()
        while True:
            try:
                answer = next(answers, None)
            except RuntimeError as error:
                raise self._explain_death(error) from None
            if answer is None:
                return
            if isinstance(answer, Exception):
                raise answer
            yield answer
            if turn != self._turn:
                raise TrainingError("a second epoch was begun while the first was still read; close the first")

    def _explain_death(self, error: RuntimeError) -> Exception:
        processes: list[Any] = getattr(getattr(self._workers, "_iterator", None), "_workers", [])
        dead = next((process for process in processes if not process.is_alive()), None)
        if dead is None:
            return error
        how = f"signal {signal.Signals(-dead.exitcode).name}" if dead.exitcode < 0 else f"exit code {dead.exitcode}"
        return ResourceError(
            f"a loader worker (process {dead.pid}) died: {how}. When memory runs out, the system kills a process: set "
            "loader.workers=0 or a smaller train.batch_size, and resume"
        )

    def close(self) -> None:
        """Stop processes and threads. The loader may be used again; it then starts new ones."""
        answers: Any = getattr(self._workers, "_iterator", None)
        if answers is not None:
            answers._shutdown_workers()
        self._workers = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def compute_alone() -> None:
    """Keep torch from starting a team of threads for this one.

    With more threads in all than cores, GNU's OpenMP lets every team sleep rather than wait where its threads meet,
    which costs the training's own team a tenth of its time.
    """
    torch.get_num_threads()  # sets this thread's number, which the limit then lowers; no other thread's changes
    threadpool_limits(1, user_api="openmp")


def auto_workers(*, cores: int, is_cached: bool, has_gpu: bool) -> tuple[int, str]:
    """How many processes should prepare batches, and the reason in one phrase; from the cache, a photo costs little."""
    if cores <= 1:
        return 0, "one core: it takes turns preparing and computing"
    if has_gpu:
        workers = min(cores - 1, 4 if is_cached else 16)
        return workers, f"{cores} cores feed the GPU, one of them launches its work"
    if is_cached:
        return 0, "cached photos cost little beside the model, which then has every core"
    if cores <= 4:
        return 0, f"all {cores} cores prepare, then all compute: a core kept for loading would mostly idle"
    return cores // 8 + 1, f"the model computes on the other cores of {cores}"


_Task = tuple[str, list[int], int]  # file of what prepares, photo numbers, epoch


class _Answers(Dataset["Batch | Exception"]):
    """What a worker answers to a task: a batch, or why there is none."""

    def __getitem__(self, index: Any) -> Batch | Exception:
        path, numbers, epoch = index
        try:
            return _read_prepare(path)(numbers, epoch)
        except Exception as error:
            return _make_portable(error)


@lru_cache(maxsize=1)
def _read_prepare(path: str) -> Prepare:
    return pickle.loads(Path(path).read_bytes())


@contextlib.contextmanager
def _without_main() -> Generator[None]:
    """Start processes that do not run the user's script again, which may have no `__main__` guard.

    Nothing that is sent to a worker is defined in a script. As loky does.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _begin_work(number: int) -> None:
    """Set a worker up: deaf to Ctrl-C, which is the training's, gone with it, and with one thread for each library."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()
    cv2.setNumThreads(0)
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(1)


def _end_with_training() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_portable(error: Exception) -> Exception:
    """The error itself where it survives the way to the training process; else one that says as much."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is not type(error):
            raise TypeError
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    if not isinstance(error, FieldmarkError):
        error.add_note("In a loader worker:\n" + "".join(traceback.format_tb(error.__traceback__)))
    return error
