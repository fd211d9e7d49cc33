"""How much the best epoch's accuracy flatters, because it was chosen on the photos it is measured on.

Shape letters: E epochs, N photos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Optimism:
    """Expected excess of the best epoch's accuracy over the same epoch's accuracy on new photos.

    Attributes:
        points: The excess, as a fraction (0.01 is one point).
        source: `photos` from per-photo predictions of every epoch; `history` from the accuracies alone, where the
            epochs' true ups and downs count as noise, so that it is an upper bound; `none` where nothing was selected.
    """

    points: float
    source: Literal["photos", "history", "none"]


def optimism_from_photos(correct: NDArray[np.bool_], *, draws: int, rng: np.random.Generator) -> Optimism:
    """Bootstrap of the choice: pick the best epoch on resampled photos, judge it on all of them.

    Args:
        correct: (E, N) whether each photo was right after each epoch.
        draws: Bootstrap draws.
        rng: Source of the draws.

    Source:
        Efron, "Estimating the error rate of a prediction rule", JASA 78 (1983): the optimism of a rule that was tuned
        on the data it is judged on; Tibshirani and Tibshirani, arXiv:0908.2904, name the case of a minimum over
        settings.
    """
    num_epochs, num_photos = correct.shape
    if num_epochs < 2:
        return Optimism(0.0, "none")
    right = correct.astype(np.float64)
    truth = right.mean(axis=1)
    excess: list[float] = []
    rows = max(1, 2_000_000 // num_photos)
    for start in range(0, draws, rows):
        weights = rng.multinomial(num_photos, np.full(num_photos, 1 / num_photos), size=min(rows, draws - start))
        drawn = weights @ right.T / num_photos
        best = drawn.argmax(axis=1)
        excess.extend(drawn[np.arange(len(drawn)), best] - truth[best])
    return Optimism(max(0.0, float(np.mean(excess))), "photos")


def optimism_from_history(accuracies: NDArray[np.float64], *, draws: int, rng: np.random.Generator) -> Optimism:
    """The same from one number per epoch: ups and downs around a smooth curve are taken for noise.

    Args:
        accuracies: (E,) validation accuracy after each epoch.
        draws: Simulated histories.
        rng: Source of the draws.

    Source:
        A parametric bootstrap (Efron and Tibshirani, "An introduction to the bootstrap", section 6.5) around a running
        mean over five epochs; the noise is estimated from second differences (Gasser, Sroka and Jennen-Steinmetz,
        "Residual variance and residual pattern in nonlinear regression", Biometrika 73, 1986), by their median, so
        that the steep first epochs do not inflate it.
    """
    if len(accuracies) < 3:
        return Optimism(0.0, "none")
    # 1.4826: from the median of absolute normal noise to its standard deviation; 6 = 1 + 4 + 1.
    noise = 1.4826 * float(np.median(np.abs(np.diff(accuracies, 2)))) / 6**0.5
    trend = smooth(accuracies, width=5)
    drawn = trend + rng.normal(0.0, noise, size=(draws, len(trend)))
    best = drawn.argmax(axis=1)
    return Optimism(max(0.0, float(np.mean(drawn[np.arange(draws), best] - trend[best]))), "history")


def smooth(values: NDArray[np.float64], *, width: int) -> NDArray[np.float64]:
    """Running mean over `width` values; nearer to the ends, over as many on each side as there are."""
    half = width // 2
    places = range(len(values))
    reach = [min(half, place, len(values) - 1 - place) for place in places]
    return np.array([values[place - r : place + r + 1].mean() for place, r in zip(places, reach, strict=True)])
