"""A deadline, the decisions that the clock made as data that a later run repeats, and a training that ends on time."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

from fieldmark.errors import ResourceError, RunError
from fieldmark.files import write_whole

PLAN = "plan.jsonl"

CPU_MINUTES_OF_TWO_CORES = 10.0
GPU_MINUTES = 60.0

EPOCHS = "epochs of fine-tuning that half of the time allows"
LEAST_EPOCHS = 5.0  # of fine-tuning, below which it earns nothing

WARMUP_SHARE, COOLDOWN_SHARE = 0.05, 0.4  # of all updates, in which the rate rises, and in which it falls to zero
REPLAN_EVERY = 10
TOLERANCE = 0.04  # of the planned updates: a smaller difference is not worth another plan

Value = TypeVar("Value")
Clock = Callable[[], float]


def default_minutes(*, cores: int, has_gpu: bool) -> float:
    """Minutes that suit a machine where the user names none: about ten on two cores, an hour on a GPU."""
    if has_gpu:
        return GPU_MINUTES
    return max(min(CPU_MINUTES_OF_TWO_CORES * 2 / max(cores, 1), 20.0), 5.0)


@dataclass
class Plan:
    """Holds what is left of a budget, and the record of what was decided by it, one JSON object a line.

    A decision that is on record is taken from there, so that a resumed run goes the same way up to where it was left;
    later ones are made by the clock and added. Everything else in a run depends on its settings alone.
    """

    path: Path
    seconds: float
    clock: Clock = time.monotonic  # an argument so that tests need not wait
    spent_before: float = 0.0  # seconds of earlier processes of this run
    started: float = field(init=False)
    _recorded: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _position: int = 0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @classmethod
    def resume(
        cls, path: Path, *, minutes: float | None, spent: float = 0.0, is_over: bool = False, clock: Clock
    ) -> Plan:
        """Take up a record: with what was left of its budget, or with new minutes from now.

        Of a run that is over all is computed again within the new minutes, and decided anew from the first thing on
        that there was no time for. `spent` seconds are known from elsewhere: between two decisions minutes may pass.
        """
        records = _read(path)
        if not records or records[0]["what"] != "budget":
            raise RunError(f"{path} does not begin with a budget: begin a new run with --minutes")
        spent = 0.0 if is_over else max(spent, *(float(record["at"]) for record in records))
        seconds = float(records[0]["value"]) if minutes is None else spent + 60 * minutes
        if is_over:
            records = [record | {"at": 0.0} for record in takewhile(_had_time, records)]
        if minutes is not None:  # which count for whoever goes on from here
            records[0]["value"] = seconds
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
        return cls(path, seconds, clock, spent, records, 1)

    @property
    def elapsed(self) -> float:
        """Seconds spent, those of earlier processes of this run included."""
        return self.spent_before + self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - self.elapsed

    @property
    def is_repeating(self) -> bool:
        """Whether the next decision is on record."""
        return self._position < len(self._recorded)

    def decide(self, what: str, choose: Callable[[], Value]) -> Value:
        """The recorded decision of this name, or a new one, a plain JSON value, which is recorded.

        The order of names must be the same in every run of the same settings: else this is a RunError.
        """
        if self.is_repeating:
            record = self._recorded[self._position]
            if record["what"] != what:
                raise RunError(
                    f"{self.path} decides {record['what']!r} where this version decides {what!r}: it was made by "
                    "another version, or with other weights at hand. Begin a new run"
                )
            self._position += 1
            return cast(Value, record["value"])
        value = choose()
        self._append({"at": round(self.elapsed, 3), "what": what, "value": value})
        return value

    def take(self, what: str) -> list[Any]:
        """The values of the recorded decisions of this name that come next, in order."""
        found: list[Any] = []
        while self.is_repeating and self._recorded[self._position]["what"] == what:
            found.append(self._recorded[self._position]["value"])
            self._position += 1
        return found

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ResourceError(f"{self.path} could not be written: {error.strerror}. Free some space") from None
        self._recorded.append(record)
        self._position = len(self._recorded)


def _had_time(record: dict[str, Any]) -> bool:
    what, value = record["what"], record["value"]
    # Epochs and the seconds at which rounds end are those of the old budget.
    return value is not False and value != [] and what != EPOCHS and not what.startswith("round of ")


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of a record; a torn last line, as a kill leaves it, is cut off the file too."""
    try:
        with path.open("r+b") as file:
            whole = file.read().rpartition(b"\n")[0]
            file.truncate(len(whole) + 1 if whole else 0)
        return [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; there is no plan to go on with") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON lines: {error}. Begin a new run") from None


@dataclass(frozen=True)
class Shape:
    """The learning rate of a training, as a factor of its peak.

    It rises, stays level, and falls linearly to zero: for an end that is not known exactly this loses nothing against a
    cosine (Hagele et al., arXiv:2405.18392), and it can be moved while the rate is level.
    """

    warmup: int  # updates of the rise
    top: float  # factor from which it falls, in (0, 1]
    start: int  # update at which it begins to fall
    end: int  # number of updates

    @classmethod
    def of(cls, updates: int) -> Shape:
        """Return the shape of a training of so many updates."""
        return cls(max(round(WARMUP_SHARE * updates), 1), 1.0, updates - round(COOLDOWN_SHARE * updates), updates)

    def factor(self, step: int) -> float:
        """Factor of update `step` (0-based), in (0, 1]; the one after the last would be 0."""
        if step >= self.start:
            return self.top * max(self.end - step, 0) / (self.end - self.start + 1)
        return min((step + 1) / (self.warmup + 1), 1.0)

    def moved(self, step: int, end: int) -> Shape:
        """The shape that goes on from `step` and ends at `end`: it falls as soon as the cooldown's share asks for."""
        end = max(end, step)
        wanted = end - round(COOLDOWN_SHARE * end)
        if step <= min(wanted, self.start):
            return Shape(self.warmup, 1.0, wanted, end)
        return Shape(self.warmup, max(self.factor(step), 1e-6), step, end)


@dataclass
class Pace:
    """Watches the time of updates and moves the end of a training."""

    shape: Shape
    left: Callable[[], float]  # seconds until the training must have ended
    overhead: float = 0.0  # seconds per update that are not spent in it (validation after each epoch)
    most: int = 10**9  # updates after which more would earn nothing
    _seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=20))
    _before: float | None = None

    def observe(self, now: float | None) -> None:
        """Note that an update has just ended, or with a first call, or one after None, that the first begins."""
        if self._before is not None and now is not None:
            self._seconds.append(now - self._before)
        self._before = now

    def propose(self, step: int) -> int | None:
        """The update at which to end instead, where the plan in force would be late or leave time unused."""
        if self.left() <= 0:
            return step
        if len(self._seconds) < 3 or step % REPLAN_EVERY:
            return None
        # The slower of two views: the latest updates notice a machine that slows, all of them one that stutters.
        latest = list(self._seconds)[-5:]
        seconds = max(median(latest), sum(self._seconds) / len(self._seconds)) + self.overhead
        end = step + max(int(self.left() / seconds), 0)
        is_late = end < self.shape.end
        end = min(end, self.most)
        is_early = step < self.shape.start and end > self.shape.end * (1 + 2 * TOLERANCE)
        if is_early or (is_late and self.shape.end - end > TOLERANCE * (self.shape.end - step)):
            return end
        return None
