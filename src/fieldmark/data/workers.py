"""Processes that prepare batches: started without fork, single-threaded, deaf to Ctrl-C, and missed when they die.

Why not torch's DataLoader: it turns an exception of ours into a RuntimeError with a traceback inside, its SIGCHLD
handler raises in whatever line the training happens to be when a worker dies, and a new `prepare` (another resolution,
say) needs new workers. It also makes new shared memory for every batch, which costs more than preparing one from the
cache: 27 ms of processor time for 32 photos at 224 pixels. Here it is used again as soon as nobody holds the batch.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import pickle
import signal
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as _  # noqa: F401  # teaches pipes to send tensors by shared memory
from torch import Tensor
from torch.nn import functional

from fieldmark.errors import FieldmarkError, ResourceError, TrainingError


@dataclass(frozen=True)
class Batch:
    """Photos ready for the model (or for the executor on the GPU)."""

    images: Tensor
    """(B, 3, S, S) float32 normalised, or uint8 for the GPU executor."""

    numbers: Tensor
    """(B,) int64 photo numbers in the index."""

    labels: Tensor
    """(B,) int64 class numbers, -1 for unlabelled photos."""

    problems: tuple[tuple[int, str], ...]
    """(place in the batch, reason) of photos that failed to decode; prediction only."""

    sizes: Tensor | None = None
    """(B, 2) int64 width and height of each photo in the upper left corner of its slot, where `images` are photos
    still to be augmented on the device; None for pictures of the model's size."""

    def pin_memory(self) -> Batch:
        """The same batch with its images in page-locked memory, from which a GPU copies without waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    problems: list[tuple[int, str]] = []
    place = 0
    for part in parts:
        problems += [(place + at, reason) for at, reason in part.problems]
        place += len(part.numbers)
    numbers, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("numbers", "labels"))
    sizes = [part.sizes for part in parts if part.sizes is not None]
    return Batch(
        torch.cat(_in_equal_slots([part.images for part in parts])),
        numbers,
        labels,
        tuple(problems),
        torch.cat(sizes) if sizes else None,
    )


def _in_equal_slots(images: Sequence[Tensor]) -> list[Tensor]:
    """The same (B, 3, H, W) with H and W of the largest, padded with zeros below and to the right."""
    height, width = (max(part.shape[axis] for part in images) for axis in (2, 3))
    margins = [(width - part.shape[3], height - part.shape[2]) for part in images]
    # Padding by nothing would copy.
    return [
        functional.pad(part, (0, right, 0, below)) if right or below else part
        for part, (right, below) in zip(images, margins, strict=True)
    ]


Prepare = Callable[[Sequence[int], int], Batch]

# Batches that wait in each worker: one being taken, one ready, so that neither side waits for the other's turn.
_PREFETCH = 2
_JOIN_SECONDS = 5.0


class WorkerPool:
    """A fixed number of processes that outlive epochs.

    Forkserver on Linux (a fork of a process that has imported torch but has no threads), spawn elsewhere: a fork of
    the training process would inherit the locks of its OpenMP threads without the threads.

    Args:
        workers: Number of processes, at least 1.
        start_method: "forkserver" or "spawn"; None is the first that the system has.
        preload: Modules that the forkserver imports once for all workers.
    """

    def __init__(self, workers: int, *, start_method: str | None = None, preload: Sequence[str] = ()) -> None:
        methods = multiprocessing.get_all_start_methods()
        method = start_method or ("forkserver" if "forkserver" in methods and sys.platform == "linux" else "spawn")
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["torch.multiprocessing", __name__, *preload])
        self._workers = [_Worker(context, number) for number in range(workers)]
        self._pending: deque[_Worker] = deque()
        self._turn = 0

    def batches(self, prepare: Prepare, plan: Sequence[Sequence[int]], *, epoch: int) -> Iterator[Batch]:
        """Yield `prepare(numbers, epoch)` for each entry of the plan, in its order.

        Raises:
            FieldmarkError: As raised by `prepare` in a worker.
            ResourceError: A worker died.
            TrainingError: `prepare` cannot be sent to a worker, or another epoch was begun from the same pool.
        """
        self._turn += 1
        turn = self._turn
        while self._pending:  # what an epoch that was left early still owes
            self._pending.popleft().receive()
        for worker in self._workers[: len(plan)]:
            worker.send(prepare)
        ahead = 0
        for place in range(len(plan)):
            while ahead < min(place + _PREFETCH * len(self._workers), len(plan)):
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
        """Stop the processes; those that don't are killed. Safe to call twice."""
        self._pending.clear()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []


@dataclass(frozen=True)
class _Task:
    numbers: list[int]
    epoch: int
    slot: int | None  # where the images may be put


@dataclass(frozen=True)
class _Reply:
    """A batch whose images lie in a slot."""

    batch: Batch
    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype


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


class _Worker:
    """The training process's end of one worker."""

    def __init__(self, context: Any, number: int) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True, name=f"fieldmark-loader-{number}")
        with _without_main():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._slots: dict[int, Tensor] = {}  # shared memory, (bytes,) uint8
        self._num_slots = 0
        self._free: deque[int] = deque()
        self._lent: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id: what lives on a slot, and the slot
        self._returned: deque[weakref.ref[Any]] = deque()
        self._asked: deque[int | None] = deque()
        self._slot_bytes = 0

    def ask(self, numbers: list[int], epoch: int) -> None:
        """Ask for a batch, to be put in shared memory that nobody uses."""
        self._take_back()
        slot = self._free.popleft() if self._free else None
        if slot is None and self._slot_bytes:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
            self._slots[slot] = torch.empty(self._slot_bytes, dtype=torch.uint8).share_memory_()
            self.send(self._slots[slot])
        self._asked.append(slot)
        self.send(_Task(numbers, epoch, slot))

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
        if isinstance(reply, _Reply):
            return replace(reply.batch, images=self._images(reply))
        if isinstance(reply, Batch) and reply.images.nbytes > self._slot_bytes:
            # The first batch, or a larger one than before: those to come get memory of this size.
            self._slot_bytes = reply.images.nbytes
            self._take_back()
            while self._free:
                del self._slots[self._free.popleft()]
        if slot is not None:
            self._release(slot)
        return reply

    def _images(self, reply: _Reply) -> Tensor:
        """A view of the slot, which is free again when the last tensor on it is gone."""
        size = reply.dtype.itemsize * math.prod(reply.shape)
        pixels = self._slots[reply.slot][:size].numpy()
        # torch holds this very array as long as any tensor shares its memory. What happens at its end is no Python
        # code: a Ctrl-C that arrived there would be told on stderr and lost.
        loan = weakref.ref(pixels, self._returned.append)
        self._lent[id(loan)] = loan, reply.slot
        return torch.from_numpy(pixels).view(reply.dtype).view(reply.shape)

    def _take_back(self) -> None:
        """Free the slots that no tensor lives on any more."""
        while self._returned:
            loan = self._lent.pop(id(self._returned.popleft()))
            self._release(loan[1])

    def _release(self, slot: int) -> None:
        if self._slots[slot].nbytes >= self._slot_bytes:
            self._free.append(slot)
        else:  # too small for the batches of now; the worker lets go of it when it ends
            del self._slots[slot]

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
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return ResourceError(
            f"a loader worker (process {self._process.pid}) died: {how}. When memory runs out, the system kills a "
            "process: set loader.workers=0 or a smaller train.batch_size, and resume"
        )


def _work(pipe: Connection) -> None:
    """The life of a worker: (numbers, epoch) in, a batch or an exception out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the training process decides
    _use_one_thread()
    prepare: Prepare | Exception = TrainingError("a worker was asked for a batch before it was told how")
    slots: list[Tensor] = []
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return  # the training process has closed, or died
        except Exception as error:  # `prepare` could not be unpickled here
            prepare = _portable(error)
            continue
        if isinstance(task, Tensor):
            slots.append(task)
        elif isinstance(task, _Task):
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(_answer(prepare, task, slots)))
        else:
            prepare = task


def _answer(prepare: Prepare | Exception, task: _Task, slots: list[Tensor]) -> Batch | _Reply | Exception:
    if isinstance(prepare, Exception):
        return prepare
    try:
        batch = prepare(task.numbers, task.epoch)
    except Exception as error:
        return _portable(error)
    images = batch.images
    if task.slot is None or images.nbytes > slots[task.slot].nbytes:
        return batch
    target = slots[task.slot][: images.nbytes].view(images.dtype).view(images.shape)
    target.copy_(images)
    return _Reply(replace(batch, images=torch.empty(0)), task.slot, tuple(images.shape), images.dtype)


def _use_one_thread() -> None:
    """One thread for each library: the cores belong to the model and the other workers."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(1)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way to the training process; else one that tells as much."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is not type(error):
            raise TypeError
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    if not isinstance(error, FieldmarkError):
        error.add_note("In a loader worker:\n" + "".join(traceback.format_tb(error.__traceback__)))
    return error
