"""Proof that an exported model is the model: logits and answers side by side on real photos.

Letters: N photos, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ExportError

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Parity:
    """How far two models agree.

    Attributes:
        photos: N.
        largest_difference: Largest absolute difference of a logit.
        relative_difference: The same over the largest absolute logit of the reference.
        same_answer: Share of photos with the same likeliest class, in [0, 1].
        limit: Largest `relative_difference` that was allowed.
    """

    photos: int
    largest_difference: float
    relative_difference: float
    same_answer: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AccuracyLoss:
    """What int8 costs on photos that the quantisation was not calibrated on.

    Attributes:
        photos: N.
        reference: Accuracy of the original, in [0, 1].
        quantized: Accuracy of the int8 model, in [0, 1].
        loss: `reference` minus `quantized`.
        worse: Photos that only the original has right.
        better: Photos that only the int8 model has right.
        calibration_photos: Other photos, which set the ranges of the activations.
        limit: Largest `loss` that was allowed.
    """

    photos: int
    reference: float
    quantized: float
    loss: float
    worse: int
    better: int
    calibration_photos: int
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def require_parity(reference: Logits, exported: Logits, *, limit: float) -> Parity:
    """Compare logits of the same photos.

    Args:
        reference: (N, K) of the run's own model.
        exported: (N, K) of the exported one.
        limit: Largest difference of a logit over the largest absolute logit of the reference.

    Raises:
        ExportError: They disagree: says on how many photos and by how much.
    """
    if reference.shape != exported.shape or not len(reference):
        raise ExportError(f"the exported model gives logits {exported.shape}, the run's {reference.shape}")
    gaps = np.abs(reference - exported)
    scale = max(float(np.abs(reference).max()), 1e-12)
    finite = np.where(np.isfinite(gaps), gaps, np.inf)
    parity = Parity(
        photos=len(reference),
        largest_difference=float(finite.max()),
        relative_difference=float(finite.max()) / scale,
        same_answer=float((reference.argmax(axis=1) == exported.argmax(axis=1)).mean()),
        limit=limit,
    )
    if not parity.relative_difference <= limit:
        raise ExportError(
            f"the exported model disagrees with the run on {parity.photos} photos: logits differ by up to "
            f"{parity.largest_difference:.3g} ({parity.relative_difference:.2%} of the largest, allowed {limit:.2%}), "
            f"the answer is the same on {parity.same_answer:.1%}. Nothing was written; another form may fit the model"
        )
    return parity


def require_small_loss(
    reference: Logits, quantized: Logits, labels: NDArray[np.integer[Any]], *, calibration_photos: int, limit: float
) -> AccuracyLoss:
    """Compare accuracies on the same labelled photos.

    Args:
        reference: (N, K) logits of the run's own model.
        quantized: (N, K) logits of the int8 model.
        labels: (N,) class numbers.
        calibration_photos: How many other photos set the ranges.
        limit: Largest loss of accuracy, as a share: 0.01 is one point.

    Raises:
        ExportError: No photos, or the loss is above the limit: says both accuracies.
    """
    if not len(labels):
        raise ExportError("int8 is only given with its accuracy measured, and there are no labelled photos to measure")
    was_right, is_right = reference.argmax(axis=1) == labels, quantized.argmax(axis=1) == labels
    loss = AccuracyLoss(
        photos=len(labels),
        reference=float(was_right.mean()),
        quantized=float(is_right.mean()),
        loss=float(was_right.mean() - is_right.mean()),
        worse=int((was_right & ~is_right).sum()),
        better=int((~was_right & is_right).sum()),
        calibration_photos=calibration_photos,
        limit=limit,
    )
    if loss.loss > limit + 1e-12:
        raise ExportError(
            f"int8 loses {100 * loss.loss:.2f} points of accuracy ({loss.reference:.2%} to {loss.quantized:.2%} on "
            f"{loss.photos} photos), allowed are {100 * limit:.2f}. Nothing was written; export without int8, or allow "
            "more with --max-accuracy-loss"
        )
    return loss
