"""A batch of photos, as it travels from those who prepare it to the model.

Shape letters: B batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without waiting."""
        return Batch(self.images.pin_memory(), self.numbers.pin_memory(), self.labels.pin_memory(), self.problems)


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    problems: list[tuple[int, str]] = []
    place = 0
    for part in parts:
        problems += [(place + at, reason) for at, reason in part.problems]
        place += len(part.numbers)
    images, numbers, labels = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "numbers", "labels")
    )
    return Batch(images, numbers, labels, tuple(problems))
