"""A run folder becomes a thing to ask: photos in, class names and probabilities out.

The pipeline is the one that judged the run: same decoding, same evaluation transform, same weights. Nothing but the
run folder is needed.

Shape letters: B batch, K classes, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of one photo.

    Attributes:
        path: The photo, as it was named; "" for pixels without a name.
        classes: K class names, in order of class number.
        probabilities: (K,) float32 summing to 1; NaN for a photo that could not be read.
        problem: Why the photo could not be read; "" if it could.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    problem: str

    @property
    def label(self) -> str:
        """The most probable class; "" for a photo that could not be read."""
        return "" if self.problem else self.classes[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """The probability of `label`, in [0, 1]; NaN for a photo that could not be read."""
        return float("nan") if self.problem else float(self.probabilities.max())

    def top(self, k: int) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities; empty for a photo that could not be read."""
        if self.problem:
            return []
        # Stable on the negated row, so that equals keep class order, as the accuracy counts them.
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[number], float(self.probabilities[number])) for number in order]
