"""Batches of prepared photos: their order, each process's share of them, and who prepares them.

Which photos are in a batch, and what is done to each, depends on (seed, epoch, photo number) alone: neither workers
nor processes nor threads change what the model sees.

Workers are started without fork, compute with one thread and ignore Ctrl-C; their death is noticed. Why not torch's
DataLoader: it turns an exception of ours into a RuntimeError with a traceback inside, its SIGCHLD handler raises in
whatever line the training happens to be when a worker dies, and a new `prepare` (another resolution, say) needs new
workers. It also makes new shared memory for every batch, which costs more than preparing one from the cache: 27 ms of
processor time for 32 photos at 224 pixels. Here it is used again as soon as nobody holds the batch.

Shape letters: B batch, S side in pixels, N photos.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as _  # noqa: F401  # teaches pipes to send tensors by shared memory
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from fieldmark.errors import FieldmarkError, ResourceError, TrainingError

# Keeps the order's random numbers apart from those of anything else that is seeded by (seed, epoch).
_ORDER_STREAM = 0x6F726465
# Batches that wait in each worker: one being taken, one ready, so that neither side waits for the other's turn.
_PREFETCH = 2
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Batch:
    """Photos ready for the model."""

    images: Tensor  # (B, 3, S, S) float32, normalized
    numbers: Tensor  # (B,) int64 photo numbers in the index
    labels: Tensor  # (B,) int64 class numbers, -1 for unlabeled photos
    problems: tuple[tuple[int, str], ...]  # (index in the batch, reason) of photos that failed; prediction only


Plan = Sequence[Sequence[int]]
Prepare = Callable[[Sequence[int], int], Batch]


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    starts = np.cumsum([0, *(len(part.numbers) for part in parts)]).tolist()
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.labels for part in parts]),
        tuple((start + at, reason) for start, part in zip(starts, parts, strict=False) for at, reason in part.problems),
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


def shard_plan(plan: Plan, *, rank: int, processes: int) -> list[Sequence[int]]:
    """One process's share of a plan: a contiguous part of every batch, so that together they are the same batches.

    Photos are neither repeated nor dropped. Shares differ by at most one photo, and a batch with fewer photos than
    processes leaves some an empty share; every process gets as many batches.
    """
    cuts = ((numbers, [len(numbers) * part // processes for part in (rank, rank + 1)]) for numbers in plan)
    return [numbers[start:end] for numbers, (start, end) in cuts]


class Loader(AbstractContextManager["Loader"]):
    """Prepares batches in the training process or in others, epoch after epoch.

    Close it, or use it in a `with`: its processes live until then. They are started by forkserver on Linux (a fork of a
    process that has imported torch but has no threads), by spawn elsewhere, or as asked: a fork of the training process
    would inherit the locks of its OpenMP threads without the threads. Without workers, batches are prepared here,
    between two steps, by some threads: what releases the interpreter lock (decoding, warping) then uses the cores that
    the model is not using at that moment.
    """

    def __init__(self, *, workers: int, threads: int, start_method: str | None = None) -> None:
        self._num_workers, self._num_threads, self._start_method = workers, threads, start_method
        self._workers: list[_Worker] = []
        self._pending: deque[_Worker] = deque()  # a worker for each batch that was asked for, in order
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
        if not self._workers:
            self._start_workers(prepare)
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
            self._threads = ThreadPoolExecutor(self._num_threads, "fieldmark-loader", limit_team)
        parts = [shard_plan([numbers], rank=part, processes=num_parts)[0] for part in range(num_parts)]
        return join_batches(list(self._threads.map(lambda part: prepare(part, epoch), parts)))

    def _start_workers(self, prepare: Prepare) -> None:
        methods = multiprocessing.get_all_start_methods()
        fitting = "forkserver" if "forkserver" in methods and sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(self._start_method or fitting)
        if context.get_start_method() == "forkserver":
            preload = [prepare.__module__, *getattr(prepare, "preload", ())]  # imported once, not in every worker
            context.set_forkserver_preload(["torch.multiprocessing", __name__, *preload])
        self._workers = [_Worker(context, number) for number in range(self._num_workers)]

    def _prepare_elsewhere(self, prepare: Prepare, plan: Plan, epoch: int) -> Iterator[Batch]:
        self._turn = turn = self._turn + 1
        while self._pending:  # what an epoch that was left early still owes
            self._pending.popleft().receive()
        for worker in self._workers[: len(plan)]:
            worker.send(prepare)
        ahead = 0
        for index in range(len(plan)):
            while ahead < min(index + _PREFETCH * len(self._workers), len(plan)):
                worker = self._workers[ahead % len(self._workers)]
                worker.ask([int(number) for number in plan[ahead]], epoch)
                self._pending.append(worker)
                ahead += 1
            result = self._pending.popleft().receive()
            if isinstance(result, Exception):
                raise result
            yield result
            if turn != self._turn:
                raise TrainingError("a second epoch was begun while the first was still read; close the first")

    def close(self) -> None:
        """Stop processes and threads. The loader may be used again; it then starts new ones."""
        self._pending.clear()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def __exit__(self, *error: object) -> None:
        self.close()


def limit_team(threads: int = 1) -> None:
    """Keep torch from starting more threads than these for the thread that calls.

    With more threads in all than cores, GNU's OpenMP lets every team sleep rather than wait where its threads meet,
    which costs the training's own team a tenth of its time.
    """
    torch.get_num_threads()  # sets this thread's number, which the limit then lowers; no other thread's changes
    threadpool_limits(threads, user_api="openmp")


def auto_workers(*, cores: int, is_cached: bool, has_gpu: bool) -> tuple[int, str]:
    """How many processes should prepare batches, and the reason in one phrase; from the cache, a photo costs little."""
    if cores <= 1:
        return 0, "one core: it takes turns preparing and computing"
    if has_gpu:
        # On Windows each imports CUDA anew, a gigabyte or more. Six kept an H200 at 3,000 photos a second.
        workers = min(cores - 1, 4 if sys.platform == "win32" else 6 if is_cached else 16)
        return workers, f"{cores} cores feed the GPU, one of them launches its work"
    if is_cached:
        return 0, "cached photos cost little beside the model, which then has every core"
    if cores <= 4:
        return 0, f"all {cores} cores prepare, then all compute: a core kept for loading would mostly idle"
    return cores // 8 + 1, f"the model computes on the other cores of {cores}"


class _Task(NamedTuple):
    numbers: list[int]
    epoch: int
    slot: int | None  # where the images may be put


@contextmanager
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


class _Worker:
    """The training process's end of one worker."""

    def __init__(self, context: Any, number: int) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True, name=f"fieldmark-loader-{number}")
        with _without_main():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._slots: list[Tensor] = []  # memory for the images of one batch, shared with the worker: (bytes,) uint8
        self._slot_bytes = 0  # of the largest batch so far; smaller slots are left alone
        self._loans: dict[int, weakref.ref[Any]] = {}  # by slot: alive as long as anybody holds the batch on it
        self._asked: deque[int | None] = deque()

    def ask(self, numbers: list[int], epoch: int) -> None:
        """Ask for a batch, to be put in shared memory that nobody uses."""
        slot = self._find_free_slot()
        if slot is None and self._slot_bytes:
            with suppress(RuntimeError):  # no room, as in containers: the batch comes through the pipe
                self._slots.append(torch.empty(self._slot_bytes, dtype=torch.uint8).share_memory_())
                slot = len(self._slots) - 1
                self.send(self._slots[slot])
        self._asked.append(slot)
        self.send(_Task(numbers, epoch, slot))

    def _find_free_slot(self) -> int | None:
        for slot, memory in enumerate(self._slots):
            loan = self._loans.get(slot)
            is_used = slot in self._asked or (loan is not None and loan() is not None)
            if memory.nbytes >= self._slot_bytes and not is_used:
                return slot
        return None

    def send(self, task: object) -> None:
        try:
            self._pipe.send(task)
        except OSError:
            raise self._death() from None
        except Exception as error:
            raise TrainingError(
                f"what prepares batches cannot be sent to a worker process ({error}). "
                "Make it a picklable object of a module, or set loader.workers=0"
            ) from error

    def receive(self) -> Batch | Exception:
        try:
            reply = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._death() from None
        slot = self._asked.popleft()
        if isinstance(reply, Batch) and slot is not None and reply.images.is_meta:
            pixels = self._slots[slot][: reply.images.nbytes].numpy()
            # torch holds this very array as long as any tensor shares its memory. No Python code runs at its end: a
            # Ctrl-C that arrived there would be reported on stderr and lost.
            self._loans[slot] = weakref.ref(pixels)
            images = torch.from_numpy(pixels).view(reply.images.dtype).view(reply.images.shape)
            return replace(reply, images=images)
        if isinstance(reply, Batch):  # the first, or a larger one than before
            self._slot_bytes = max(self._slot_bytes, reply.images.nbytes)
        return reply

    def stop(self) -> None:
        with suppress(OSError):
            self._pipe.close()
        if self._process.is_alive():
            self._process.terminate()

    def join(self) -> None:
        self._process.join(_JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> ResourceError:
        self._process.join(_JOIN_SECONDS)
        code = self._process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return ResourceError(
            f"a loader worker (process {self._process.pid}) died: {how}. When memory runs out, the system kills a "
            "process: set loader.workers=0 or a smaller train.batch_size, and resume"
        )


def _work(pipe: Connection) -> None:
    """The life of a worker: (numbers, epoch) in, a batch or an exception out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the training process decides
    _use_one_thread()
    prepare: Prepare | Exception = TrainingError("a worker was asked for a batch before it was set up")
    slots: list[Tensor] = []
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return  # the training process has closed, or died
        except Exception as error:  # `prepare` could not be unpickled here
            prepare = _make_portable(error)
            continue
        if isinstance(task, Tensor):
            slots.append(task)
        elif isinstance(task, _Task):
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(_answer(prepare, task, slots)))
        else:
            prepare = task


def _answer(prepare: Prepare | Exception, task: _Task, slots: list[Tensor]) -> Batch | Exception:
    """A batch or an error; images that fit into the slot are put there, and travel without their content."""
    if isinstance(prepare, Exception):
        return prepare
    try:
        batch = prepare(task.numbers, task.epoch)
    except Exception as error:
        return _make_portable(error)
    images = batch.images
    if task.slot is None or images.nbytes > slots[task.slot].nbytes:
        return batch
    target = slots[task.slot][: images.nbytes].view(images.dtype).view(images.shape)
    target.copy_(images)
    return replace(batch, images=images.to("meta"))


def _use_one_thread() -> None:
    import cv2

    torch.set_num_threads(1)  # the cores belong to the model and the other workers
    cv2.setNumThreads(0)
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(1)


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
