"""A training that ends on time: its rate by share of the plan done, replanned when the clock runs otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from torch.optim import Optimizer

from fieldmark.training.schedule import RateSchedule

WARMUP_SHARE, COOLDOWN_SHARE = 0.02, 0.4
"""Shares of all updates in which the rate rises, and in which it falls to zero."""

REPLAN_EVERY = 10
TOLERANCE = 0.04
"""Of the planned updates: a smaller difference is not worth another plan."""


@dataclass(frozen=True)
class Shape:
    """The learning rate of a training, as a factor of its peak.

    It rises, stays level, and falls linearly to zero: for an end that is not known exactly this loses nothing against a
    cosine (Hagele et al., arXiv:2405.18392), and it can be moved while the rate is level.

    Attributes:
        warmup: Updates of the rise.
        top: Factor from which it falls, in (0, 1].
        start: Update at which it begins to fall.
        end: Number of updates.
    """

    warmup: int
    top: float
    start: int
    end: int

    @classmethod
    def of(cls, updates: int) -> Shape:
        """The shape of a training of so many updates."""
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
    """Watches the time of updates and moves the end of a training.

    Attributes:
        shape: The plan in force.
        left: Seconds until the training must have ended.
        overhead: Seconds per update that are not spent in it (validation after each epoch).
        most: Updates after which more would earn nothing.
    """

    shape: Shape
    left: Callable[[], float]
    overhead: float = 0.0
    most: int = 10**9
    _seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=20))
    _before: float | None = None

    def observe(self, now: float) -> None:
        """Note that an update has just ended, or with a first call that the first begins."""
        if self._before is not None:
            self._seconds.append(now - self._before)
        self._before = now

    def forget(self) -> None:
        """Count what happens until the next call of `observe` to no update."""
        self._before = None

    def propose(self, step: int) -> int | None:
        """The update at which to end instead, where the plan in force would be late or leave time unused."""
        if len(self._seconds) < 3 or (step % REPLAN_EVERY and self.left() > 0):
            return None
        # The slower of two views: the latest updates notice a machine that slows, all of them one that stutters.
        latest = list(self._seconds)[-5:]
        seconds = max(median(latest), sum(self._seconds) / len(self._seconds)) + self.overhead
        end = step + max(int(self.left() / seconds), 0)
        is_late = end < self.shape.end
        end = min(end, self.most)
        is_early = step < self.shape.start and end > self.shape.end * (1 + 2 * TOLERANCE)
        if self.left() <= 0 or is_early or (is_late and self.shape.end - end > TOLERANCE * (self.shape.end - step)):
            return end
        return None


class PacedSchedule(RateSchedule):
    """Sets the rate of every parameter group from the number of updates done and the shape in force."""

    def __init__(self, optimizer: Optimizer, pace: Pace) -> None:
        self.optimizer = optimizer
        self.pace = pace
        self.step_number = 0
        self._set_rates()

    @property
    def factor(self) -> float:
        """Factor of the next update."""
        return self.pace.shape.factor(self.step_number)
