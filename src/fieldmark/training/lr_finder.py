"""A learning rate from a short sweep: rates rise until the loss explodes, and the model is put back as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fieldmark.errors import TrainingError

UPDATES = 100
SMOOTHING = 0.9  # weight of the past in the smoothed loss
EXPLOSION = 4.0  # the smoothed loss over its minimum at which to stop
_MIN_POINTS = 8  # fewer rates than this say nothing about a slope


@dataclass(frozen=True, slots=True)
class LrSweep:
    """The outcome of a sweep: one rate and two losses for each update, plain numbers ready to plot."""

    lrs: tuple[float, ...]  # of the group with the highest rate
    losses: tuple[float, ...]  # before that update
    smoothed: tuple[float, ...]  # exponentially
    suggestion: float  # the rate to train with, half way down the longest fall of the smoothed loss
    steepest: float  # rate at which the smoothed loss falls fastest over log rate
    stopped_early: bool  # the loss exploded before the highest rate


def find_lr(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    backward: Callable[[Tensor], Any],
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
    num_steps: int = UPDATES,
) -> LrSweep:
    """Train for a moment with rates that rise from `min_lr` to `max_lr`, note the losses, and undo it all.

    Args:
        model: Trained in training mode.
        optimizer: Its groups' `base_lr` (or `lr`) keep their ratios; the highest of them goes through the sweep.
        batches: (inputs, targets); at most `num_steps` are read. A source that is shorter ends the sweep.
        loss_fn: (logits, targets) -> 0-d loss.
        backward: Computes gradients of a loss: `Tensor.backward`, or Fabric's `backward`.
        min_lr: First rate.
        max_lr: Last rate.
        num_steps: Updates.

    Source:
        Smith, "Cyclical Learning Rates", arXiv:1506.01186, section 3.3; the valley rule is fastai's
        (fastai/callback/schedule.py, `valley`).
    """
    rates = [min_lr * (max_lr / min_lr) ** (number / (num_steps - 1)) for number in range(num_steps)]
    base = [float(group.get("base_lr", group["lr"])) for group in optimizer.param_groups]
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with _restored(model, optimizer):
        for rate, (inputs, targets) in zip(rates, batches, strict=False):
            for group, its_base in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * its_base / max(base)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(inputs), targets)
            value = float(loss.item())
            if not math.isfinite(value):
                break
            average = SMOOTHING * average + (1 - SMOOTHING) * value
            lrs.append(rate)
            losses.append(value)
            smoothed.append(average / (1 - SMOOTHING ** len(lrs)))  # corrected for its start at zero
            if smoothed[-1] > EXPLOSION * min(smoothed):
                break
            backward(loss)
            optimizer.step()
    if len(lrs) < _MIN_POINTS:
        raise TrainingError(
            f"the learning-rate sweep saw only {len(lrs)} finite losses from {min_lr:g} on: give at least "
            f"{_MIN_POINTS} batches, or start lower"
        )
    # As fastai: the first tenth is noise of the start, the last few points are the explosion.
    window = slice(len(lrs) // 10, max(len(lrs) - 5, len(lrs) // 10 + 3))
    found = valley_point(lrs[window], smoothed[window]), steepest_point(lrs[window], smoothed[window])
    return LrSweep(tuple(lrs), tuple(losses), tuple(smoothed), *found, stopped_early=len(lrs) < num_steps)


@contextmanager
def _restored(model: nn.Module, optimizer: Optimizer) -> Generator[None]:
    """Train inside the block; afterwards weights, modes, optimizer and torch's random state are as before."""
    model_state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    modes = {module: module.training for module in model.modules()}
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            yield
    finally:
        model.load_state_dict(model_state)
        optimizer.zero_grad(set_to_none=True)
        optimizer.load_state_dict(optimizer_state)
        for module, mode in modes.items():
            module.training = mode


def valley_point(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Find the rate half way through the longest decreasing subsequence of the smoothed losses, by rising rates.

    Source:
        fastai, `fastai.callback.schedule.valley`: longest decreasing subsequence by dynamic programming, cut in three
        sections; the point is one section and a half in.
    """
    lengths = [1] * len(losses)
    start = end = 0
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[end] < lengths[i]:
                end = i
                start = end - lengths[end]
    section = (end - start) / 3
    return lrs[start + int(section) + int(section / 2)]


def steepest_point(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Find the rate at which the loss falls fastest over the logarithm of the rate, by central differences."""
    if len(lrs) < 3:
        return lrs[0]
    slopes = [
        (losses[i + 1] - losses[i - 1]) / (math.log(lrs[i + 1]) - math.log(lrs[i - 1])) for i in range(1, len(lrs) - 1)
    ]
    return lrs[1 + slopes.index(min(slopes))]
