"""The learning rate as a function of the update number, and warnings about schedules that end badly."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.optim import Optimizer

ScheduleName = Literal["cosine", "warm_restarts", "constant"]


def lr_factor(
    name: ScheduleName,
    *,
    step: int,
    steps_per_epoch: int,
    total_epochs: int,
    warmup_epochs: float,
    restart_epochs: int | None,
    restart_factor: int,
    min_factor: float,
) -> float:
    """The learning rate of one update over the peak rate.

    "cosine" rises linearly over `warmup_epochs`, then falls along half a cosine and would reach `min_factor` just
    after the last update. "constant" rises likewise and stays. Neither warms up from zero: the first update learns.
    "warm_restarts" is level within an epoch and has no warm-up: a half cosine over `restart_epochs` epochs, then one
    `restart_factor` times as long, and so on, as torch's CosineAnnealingWarmRestarts stepped once per epoch.

    Args:
        name: The shape.
        step: Number of the update, from 0.
        steps_per_epoch: Updates per epoch, at least 1.
        total_epochs: Length of the run.
        warmup_epochs: Length of the rise, for "cosine" and "constant".
        restart_epochs: T_0, for "warm_restarts"; None is `total_epochs`.
        restart_factor: T_mult, at least 1, for "warm_restarts".
        min_factor: Lowest value, in [0, 1]; eta_min of the papers over the peak.

    Returns:
        A number in [0, 1].

    Source:
        Loshchilov & Hutter, "SGDR", arXiv:1608.03983, section 3, equation 5. Warm-up: Goyal et al.,
        arXiv:1706.02677, section 2.2.
    """
    if name == "warm_restarts":
        first = restart_epochs or max(total_epochs, 1)
        position, length = _place_in_cycle(step // steps_per_epoch, first, restart_factor)
        return _half_cosine(position / length, min_factor)
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return 1.0
    falling_steps = max(total_epochs * steps_per_epoch - warmup_steps, 1)
    return _half_cosine(min((step - warmup_steps) / falling_steps, 1.0), min_factor)


class Schedule:
    """Sets the rate of every parameter group, from the number of updates done and nothing else.

    Resuming needs that number alone: torch's schedulers, given `last_epoch`, land in the wrong cycle for T_mult > 1.

    Args:
        optimizer: Its groups carry `base_lr`, their peak rate (see `groups.parameter_groups`).
        name: As for `lr_factor`, and so are the others.
        steps_per_epoch: Updates per epoch.
        total_epochs: Length of the run.
        warmup_epochs: Length of the rise.
        restart_epochs: T_0, or None.
        restart_factor: T_mult.
        min_factor: Lowest factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        name: ScheduleName,
        steps_per_epoch: int,
        total_epochs: int,
        warmup_epochs: float,
        restart_epochs: int | None,
        restart_factor: int,
        min_factor: float,
    ) -> None:
        self.optimizer = optimizer
        self._settings: dict[str, Any] = {
            "steps_per_epoch": steps_per_epoch,
            "total_epochs": total_epochs,
            "warmup_epochs": warmup_epochs,
            "restart_epochs": restart_epochs,
            "restart_factor": restart_factor,
            "min_factor": min_factor,
        }
        self._name: ScheduleName = name
        self.step_number = 0
        self._set_rates()

    @property
    def factor(self) -> float:
        """Factor of the next update."""
        return lr_factor(self._name, step=self.step_number, **self._settings)

    def step(self) -> None:
        """Count an update that was done, and set the rates of the next one."""
        self.step_number += 1
        self._set_rates()

    def state_dict(self) -> dict[str, int]:
        """The number of updates done."""
        return {"step": self.step_number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to that update and set its rates; call it after the optimiser's own state is restored."""
        self.step_number = int(state["step"])
        self._set_rates()

    def _set_rates(self) -> None:
        factor = self.factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def cycle_ends(*, restart_epochs: int, restart_factor: int, until: int) -> list[int]:
    """Epoch counts at which a cycle of warm restarts is complete, up to and including the first not below `until`."""
    ends, length = [restart_epochs], restart_epochs
    while ends[-1] < until:
        length *= restart_factor
        ends.append(ends[-1] + length)
    return ends


def schedule_warnings(
    name: ScheduleName,
    *,
    total_epochs: int,
    warmup_epochs: float,
    restart_epochs: int | None,
    restart_factor: int,
    min_factor: float,
) -> list[str]:
    """What is likely to disappoint about a schedule.

    Args:
        name: As for `lr_factor`, and so are the others.
        total_epochs: Length of the run; 0 trains nothing and gives no warning.
        warmup_epochs: Length of the rise.
        restart_epochs: T_0; None is one cycle as long as the run, which is what was asked for, so no warning.
        restart_factor: T_mult.
        min_factor: Lowest factor.

    Returns:
        One sentence per finding; empty for a schedule that ends well.
    """
    if total_epochs == 0:
        return []
    if name != "warm_restarts":
        if name == "cosine" and warmup_epochs > total_epochs / 2:
            return [f"the warm-up of {warmup_epochs:g} epochs is more than half of the {total_epochs} epochs"]
        return []
    if restart_epochs is None:
        return []
    warnings: list[str] = []
    if total_epochs <= restart_epochs:
        warnings.append(
            f"warm_restarts never restarts: {total_epochs} epochs are no more than the first cycle "
            f"(restart_epochs, T_0) of {restart_epochs}"
        )
    ends = cycle_ends(restart_epochs=restart_epochs, restart_factor=restart_factor, until=total_epochs)
    if total_epochs not in ends:
        position, length = _place_in_cycle(total_epochs - 1, restart_epochs, restart_factor)
        last = _half_cosine(position / length, min_factor)
        near = " or ".join(str(end) for end in ends[-2:])
        warnings.append(
            f"warm_restarts ends within a cycle: the last of {total_epochs} epochs is epoch {position + 1} of a cycle "
            f"of {length}, at {last:.0%} of the peak rate; cycles end at train.epochs = {near}"
        )
    return warnings


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
