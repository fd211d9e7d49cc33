"""The learning rate as a function of the update number, and warnings about schedules that end badly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

ScheduleName = Literal["cosine", "warm_restarts", "constant"]


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """The shape of a schedule.

    "cosine" rises linearly over `warmup_epochs`, then falls along half a cosine and would reach `min_factor` just
    after the last update. "constant" rises likewise and stays. Neither warms up from zero: the first update learns.
    "warm_restarts" is level within an epoch and has no warm-up: a half cosine over `restart_epochs` epochs, then one
    `restart_factor` times as long, and so on, as torch's CosineAnnealingWarmRestarts stepped once per epoch.

    Args:
        name: The shape.
        total_epochs: Length of the run.
        warmup_epochs: Length of the rise, for "cosine" and "constant".
        restart_epochs: T_0, for "warm_restarts"; None is `total_epochs`.
        restart_factor: T_mult, at least 1, for "warm_restarts".
        min_factor: Lowest value, in [0, 1]; eta_min of the papers over the peak.

    Source:
        Loshchilov & Hutter, "SGDR", arXiv:1608.03983, section 3, equation 5. Warm-up: Goyal et al.,
        arXiv:1706.02677, section 2.2.
    """

    name: ScheduleName
    total_epochs: int
    warmup_epochs: float
    restart_epochs: int | None
    restart_factor: int
    min_factor: float

    def factor(self, step: int, *, steps_per_epoch: int) -> float:
        """The learning rate of update `step` (0-based) over the peak rate, in [0, 1]."""
        if self.name == "warm_restarts":
            first = self.restart_epochs or max(self.total_epochs, 1)
            return self._cycle_factor(*_place_in_cycle(step // steps_per_epoch, first, self.restart_factor))
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        falling_steps = max(self.total_epochs * steps_per_epoch - warmup_steps, 1)
        return _half_cosine(min((step - warmup_steps) / falling_steps, 1.0), self.min_factor)

    def warnings(self) -> list[str]:
        """List what is likely to disappoint, one sentence each; empty for a schedule that ends well.

        A run of 0 epochs trains nothing, and `restart_epochs = None` is one cycle as asked for: neither is warned.
        """
        if self.total_epochs == 0:
            return []
        if self.name == "warm_restarts":
            return self._restart_warnings()
        if self.name == "cosine" and self.warmup_epochs > self.total_epochs / 2:
            return [f"the warm-up of {self.warmup_epochs:g} epochs is more than half of the {self.total_epochs} epochs"]
        return []

    def _restart_warnings(self) -> list[str]:
        first, total = self.restart_epochs, self.total_epochs
        if first is None:
            return []
        warnings: list[str] = []
        if total <= first:
            warnings.append(
                f"warm_restarts never restarts: {total} epochs are no more than the first cycle "
                f"(restart_epochs, T_0) of {first}"
            )
        ends = cycle_ends(restart_epochs=first, restart_factor=self.restart_factor, until=total)
        if total not in ends:
            position, length = _place_in_cycle(total - 1, first, self.restart_factor)
            near = " or ".join(str(end) for end in ends[-2:])
            warnings.append(
                f"warm_restarts ends within a cycle: the last of {total} epochs is epoch {position + 1} of a cycle "
                f"of {length}, at {self._cycle_factor(position, length):.0%} of the peak rate; cycles end at "
                f"train.epochs = {near}"
            )
        return warnings

    def _cycle_factor(self, position: int, length: int) -> float:
        return _half_cosine(position / length, self.min_factor)


class RateSchedule:
    """Sets the rate of every parameter group to its peak rate times `factor`, a function of the updates done."""

    optimizer: Optimizer
    step_number: int

    @property
    def factor(self) -> float:
        """Factor of the next update."""
        raise NotImplementedError

    def step(self) -> None:
        """Count an update that was done, and set the rates of the next one."""
        self.step_number += 1
        self._set_rates()

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates done."""
        return {"step": self.step_number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to that update and set its rates; call it after the optimizer's own state is restored."""
        self.step_number = int(state["step"])
        self._set_rates()

    def _set_rates(self) -> None:
        factor = self.factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class Schedule(RateSchedule):
    """Sets the rate of every parameter group, from the number of updates done and nothing else.

    Resuming needs that number alone: torch's schedulers, given `last_epoch`, land in the wrong cycle for T_mult > 1.

    Args:
        optimizer: Its groups carry `base_lr`, their peak rate (see `optim.parameter_groups`).
        spec: The shape.
        steps_per_epoch: Updates per epoch, at least 1.
    """

    def __init__(self, optimizer: Optimizer, spec: ScheduleSpec, *, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.spec = spec
        self.steps_per_epoch = steps_per_epoch
        self.step_number = 0
        self._set_rates()

    @property
    def factor(self) -> float:
        """Factor of the next update."""
        return self.spec.factor(self.step_number, steps_per_epoch=self.steps_per_epoch)


def cycle_ends(*, restart_epochs: int, restart_factor: int, until: int) -> list[int]:
    """Epoch counts at which a cycle of warm restarts is complete, up to and including the first not below `until`."""
    ends, length = [restart_epochs], restart_epochs
    while ends[-1] < until:
        length *= restart_factor
        ends.append(ends[-1] + length)
    return ends


def _place_in_cycle(epoch: int, first: int, factor: int) -> tuple[int, int]:
    """(epochs into its cycle, length of that cycle) of an epoch; whole numbers, so no rounding at a boundary."""
    if factor == 1:
        return epoch % first, first
    length = first
    while epoch >= length:
        epoch -= length
        length *= factor
    return epoch, length


def _half_cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
