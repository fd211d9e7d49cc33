"""A batch of photos, as it travels from those who prepare it to the model.

Shape letters: B batch, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


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
