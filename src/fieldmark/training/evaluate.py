"""A model and a loader become predictions or features: each photo exactly once, on any number of processes.

Shape letters: B batch, N photos, K classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.data.loader import Batch
from fieldmark.errors import NonFiniteError


class _Compute(Protocol):
    """What evaluating needs of a Fabric, whose import takes seconds that a single prediction need not wait for."""

    @property
    def device(self) -> torch.device: ...

    @property
    def world_size(self) -> int: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Predictions:
    """Holds what a model says of some photos, in the order of their numbers."""

    numbers: NDArray[np.int64]  # (N,) photo numbers in the index, rising
    logits: NDArray[np.float32]  # (N, K); NaN for a photo that could not be read
    problems: dict[int, str]  # photo number -> why it could not be read

    def require_finite(self, *, step: int) -> None:
        """Refuse logits that are not finite, but for unreadable photos, after update number `step` (0-based).

        Weights that are finite can be too large to compute with.
        """
        is_bad = ~np.isfinite(self.logits).all(axis=1) & ~np.isin(self.numbers, list(self.problems))
        if is_bad.any():
            raise NonFiniteError(step, [], what=f"the output for {is_bad.sum()} of {len(is_bad)} photos after")

    def probabilities(self) -> NDArray[np.float32]:
        """(N, K) softmax of the logits."""
        return softmax(self.logits)


@dataclass(frozen=True)
class Validation:
    """Holds what a model scores on the validation photos; both are empty without any."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])  # as `metrics.summarize` gives them
    predictions: Predictions | None = None


def softmax(logits: NDArray[np.floating[Any]], *, temperature: float = 1.0) -> NDArray[np.float32]:
    """(N, K) probabilities, computed in 64 bit and rounded once."""
    scaled = logits.astype(np.float64) / temperature
    with np.errstate(invalid="ignore"):  # a row that is not finite has no probabilities: NaN
        scaled -= scaled.max(axis=1, keepdims=True, initial=-np.inf)
        exponents = np.exp(scaled)
        return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


@torch.inference_mode()
def predict_batches(
    fabric: _Compute, model: Callable[[Tensor], Tensor], batches: Iterable[Batch], *, flips: bool, channels_last: bool
) -> Predictions:
    """Predict this process's share of batches, with `flips` also mirrored and averaged; give each process them all."""
    numbers: list[Tensor] = []
    logits: list[Tensor] = []
    problems: dict[int, str] = {}
    for batch in batches:
        images = batch.images.to(fabric.device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        with fabric.autocast():
            output = model(images)
            if flips:
                output = (output + model(images.flip(-1))) / 2
        output = output.float().clone()
        for row, reason in batch.problems:
            output[row] = torch.nan
            problems[int(batch.numbers[row])] = reason
        numbers.append(batch.numbers)
        logits.append(output)
    own_numbers = torch.cat(numbers).cpu().numpy() if numbers else np.zeros(0, np.int64)
    own_logits = torch.cat(logits).cpu().numpy() if logits else np.zeros((0, 0), np.float32)
    return _gather(fabric, own_numbers, own_logits, problems)


def _gather(
    fabric: _Compute, numbers: NDArray[np.int64], logits: NDArray[np.float32], problems: dict[int, str]
) -> Predictions:
    if fabric.world_size > 1:
        # Shares differ in length, and an empty one does not know K: objects may differ, tensors may not.
        shares: list[tuple[NDArray[np.int64], NDArray[np.float32], dict[int, str]] | None] = [None] * fabric.world_size
        torch.distributed.all_gather_object(shares, (numbers, logits, problems))
        filled = [share for share in shares if share is not None and len(share[0])]
        numbers = np.concatenate([share[0] for share in filled])
        logits = np.concatenate([share[1] for share in filled])
        problems = {number: reason for share in filled for number, reason in share[2].items()}
    order = np.argsort(numbers, kind="stable")
    assert len(np.unique(numbers)) == len(numbers), "a photo was evaluated twice"
    return Predictions(numbers[order], logits[order], problems)
