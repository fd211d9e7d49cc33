"""What a training will do, known before its first update: the photos of each update, and what holds in each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.loader import cut_plan, epoch_order


@dataclass(frozen=True)
class Phase:
    """What holds during one epoch.

    Attributes:
        size: Side of the training images, in pixels.
        freeze: Frozen stages from the input, or `all`.
        is_fixres: Head and norms alone learn, on the evaluation picture.
        is_mixing: Whether batches may be mixed.
    """

    size: int
    freeze: int | Literal["all"]
    is_fixres: bool
    is_mixing: bool


@dataclass(frozen=True)
class PhaseRules:
    """What `phase` depends on besides the epoch; the names are those of the settings.

    Attributes:
        size: Training size in pixels where `resolution_steps` says nothing.
        eval_size: Evaluation size in pixels, for FixRes.
        num_stages: Stages of the backbone.
    """

    epochs: int
    size: int
    eval_size: int
    num_stages: int
    resolution_steps: tuple[tuple[float, int], ...]
    fixres_epochs: int
    mix_off_epochs: int
    freeze: int | Literal["all"]
    unfreeze_every_epochs: int

    def phase(self, epoch: int) -> Phase:
        """Give what holds during an epoch (0-based)."""
        is_fixres = self.epochs - self.fixres_epochs <= epoch < self.epochs
        size = self.size
        for start, side in self.resolution_steps:
            size = side if epoch >= start * self.epochs else size
        freeze = self.freeze
        if self.unfreeze_every_epochs:
            frozen = self.num_stages if freeze == "all" else int(freeze)
            freeze = max(frozen - epoch // self.unfreeze_every_epochs, 0)
            freeze = "all" if freeze == self.num_stages else freeze
        return Phase(
            size=self.eval_size if is_fixres else size,
            freeze=freeze,
            is_fixres=is_fixres,
            is_mixing=epoch < self.epochs - self.mix_off_epochs,
        )


@dataclass(frozen=True)
class TrainPlan:
    """The order of the photos over all epochs: a pure function of these values.

    Attributes:
        rules: What holds in which epoch.
        train_numbers: (N,) int64 photo numbers of the training split.
        val_numbers: (M,) int64 photo numbers of the validation split.
        seed: Of the run.
        batch_size: Photos per update over all processes.
        eval_batch_size: Photos at once in evaluation.
        processes: That train together.
    """

    rules: PhaseRules
    train_numbers: NDArray[np.int64]
    val_numbers: NDArray[np.int64]
    seed: int
    batch_size: int
    eval_batch_size: int
    processes: int

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return self.rules.epochs

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one epoch: arithmetic alone, since it is asked for often."""
        return count_updates(len(self.train_numbers), self.batch_size, processes=self.processes)

    def updates(self, epoch: int) -> list[Sequence[int]]:
        """Shuffle an epoch and cut it into updates of photo numbers, over all processes."""
        order = epoch_order(len(self.train_numbers), seed=self.seed, epoch=epoch, shuffle=True)
        return cut_updates(self.train_numbers[order], self.batch_size, processes=self.processes)  # type: ignore[arg-type]

    def eval_share(self, numbers: NDArray[np.int64], rank: int) -> list[Sequence[int]]:
        """Give one process every n-th evaluation batch, so that batches do not depend on the number of processes."""
        return cut_plan(numbers.tolist(), self.eval_batch_size)[rank :: self.processes]


def count_updates(num_photos: int, batch_size: int, *, processes: int) -> int:
    """Count the updates that `cut_updates` makes."""
    count = -(-num_photos // batch_size)
    last = num_photos - (count - 1) * batch_size
    return count - (count > 1 and last < 2 * processes)


def cut_updates(order: Sequence[int], batch_size: int, *, processes: int) -> list[Sequence[int]]:
    """Cut an epoch's order into updates; no photo is dropped.

    A last batch that would leave a process with fewer than two photos joins the one before: BatchNorm has no variance
    of one value, which is what a single photo amounts to at the end of a network on small images.
    """
    cuts = cut_plan(order, batch_size)
    if len(cuts) > 1 and len(cuts[-1]) < 2 * processes:
        cuts[-2:] = [order[(len(cuts) - 2) * batch_size :]]
    return cuts
