"""Intervals, tests and sample sizes for paired comparisons of classifiers.

Pure functions over arrays. Shape letters: S runs of one variant (seeds), N photos, E epochs. A score is per photo and
in [0, 1] where it is correctness; differences are `second - first`, so a positive one favors the second. `level` is the
coverage of an interval, `draws` the number of bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fieldmark.training.metrics import wilson_interval

Scores = NDArray[np.float64]

MOST_FLIPPED = 14


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval around it, in the unit of the scores."""

    estimate: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width: the x in "± x"."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Variance:
    """Says where the uncertainty of a difference comes from, as variances of single scores."""

    photos: float  # of the true per-photo difference, between photos
    interaction: float  # of a photo's score between runs of one variant, beyond what shifts the whole run
    seeds: float | None  # of a run's mean score between runs of one variant; None where each variant has one run


@dataclass(frozen=True, slots=True)
class Difference:
    """Says how much better the second variant is than the first."""

    interval: Interval
    p_value: float
    variance: Variance
    num_photos: int
    num_runs: tuple[int, int]

    @property
    def photo_variance(self) -> float:
        """Variance between photos; with the pseudo-photos', or variants that always agree would need no photos."""
        return max(self.variance.photos, 1 / (self.num_photos + 2))


def mcnemar_exact(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided p-value that two classifiers err alike, from whether each was right on each of the same photos.

    Source:
        McNemar, Psychometrika 12 (1947), in its exact binomial form; recommended for one run of each of two classifiers
        by Dietterich, "Approximate statistical tests", Neural Computation 10 (1998), section 3.1.
    """
    from scipy.stats import binomtest

    gained, lost = int(np.sum(second & ~first)), int(np.sum(first & ~second))
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given: the chance of any false alarm stays under the level.

    Written by hand because scipy offers the false discovery rate only.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    return corrected.tolist()


def widen_to_wilson(interval: Interval, num_photos: float, *, level: float) -> Interval:
    """The interval of an accuracy, at least as wide as Wilson's: photos without an error are no proof of perfection.

    A bootstrap sees no spread where all photos have one score; nine photos without an error are [0.70, 1], not [1, 1].
    """
    low, high = wilson_interval(interval.estimate * num_photos, num_photos, confidence=level)
    return Interval(interval.estimate, min(low, interval.low), max(high, interval.high))


def mean_interval(scores: Scores, *, level: float, draws: int, rng: np.random.Generator) -> Interval:
    """Interval of the mean of one variant's (S, N) scores, over photos and, where there are several runs, over runs."""
    means = scores.mean(axis=0)
    drawn = _draw_means(means, _compare_within([scores]), 1 / len(scores), draws, rng, pad=False)
    return _interval(float(means.mean()), drawn, level)


def paired_difference(
    first: Scores, second: Scores, *, level: float, draws: int, rng: np.random.Generator
) -> Difference:
    """Bootstrap of the difference of two variants' mean scores, (S1, N) and (S2, N), with a two-sided p-value.

    Photos are resampled in pairs. Where a variant has several runs, the chance of training is added: the variance of a
    run's mean between runs is pooled over both variants and enters through Student's t, because resampling two or
    three seeds understates their variance by a half or a third. The photos' part is then shrunk to what differs between
    photos in truth, so that nothing counts twice. Two pseudo-photos, one in favor of each side, keep the interval open
    where the two hardly ever disagree.

    Source:
        Efron and Tibshirani, "An introduction to the bootstrap" (1993), section 8. Photos and seeds as crossed random
        effects: Owen, "The pigeonhole bootstrap", arXiv:0712.1111; why seeds count: Bouthillier et al., "Accounting for
        variance in machine learning benchmarks", arXiv:2103.03098. Pseudo-photos: Agresti and Min, "Simple improved
        confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005).
    """
    change = second.mean(axis=0) - first.mean(axis=0)
    within = _compare_within([first, second])
    share = 1 / len(first) + 1 / len(second)
    drawn = _draw_means(change, within, share, draws, rng, pad=True)
    variance = Variance(_between_photos(change, within, share), within.interaction, within.seeds(len(change)))
    interval = _interval(float(change.mean()), drawn, level)
    p_value = _p_value(first, second, change, drawn)
    return Difference(interval, p_value, variance, len(change), (len(first), len(second)))


def photos_needed(difference: Difference, *, effect: float, level: float, power: float) -> int | None:
    """Photos with which a true difference of `effect` would be seen with probability `power`, runs as they are.

    None where the spread between runs alone hides such a difference, however many photos.

    Source:
        Sample size of a paired z-test: Connor, "Sample size for testing differences in proportions for the
        paired-sample design", Biometrics 43 (1987), in its unconditional form.
    """
    variance, share = difference.variance, sum(1 / count for count in difference.num_runs)
    room = _variance_allowed(effect, level, power) - (variance.seeds or 0.0) * share
    return max(1, math.ceil((difference.photo_variance + variance.interaction * share) / room)) if room > 0 else None


def runs_needed(difference: Difference, *, effect: float, level: float, power: float) -> int | None:
    """Runs per variant with which a true difference of `effect` would be seen on the same photos.

    None where the photos alone hide it, or where each variant has one run and the spread between runs is not known.
    """
    variance = difference.variance
    room = _variance_allowed(effect, level, power) - difference.photo_variance / difference.num_photos
    if variance.seeds is None or room <= 0:
        return None
    return max(2, math.ceil(2 * (variance.seeds + variance.interaction / difference.num_photos) / room))


def _variance_allowed(effect: float, level: float, power: float) -> float:
    from scipy.stats import norm

    return float((effect / (norm.ppf((1 + level) / 2) + norm.ppf(power))) ** 2)


def _interval(estimate: float, drawn: Scores, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))


def _p_value(first: Scores, second: Scores, change: Scores, drawn: Scores) -> float:
    """McNemar's exact one where each variant has one run and scores are 0 or 1; from the draws otherwise."""
    scores = np.concatenate([first, second])
    if len(first) == len(second) == 1 and bool(np.isin(scores, (0.0, 1.0)).all()):
        return mcnemar_exact(first[0] > 0, second[0] > 0)
    tail = min(int(np.sum(drawn <= 0)), int(np.sum(drawn >= 0)))
    return max(min(1.0, 2 * (tail + 1) / (len(drawn) + 1)), _sign_flip_p(change))


def _sign_flip_p(change: Scores) -> float:
    """Two-sided p-value that photos changed for better and for worse alike; 0 where too many changed to enumerate.

    A bootstrap of four photos that all improved never sees a loss, but chance does so once in eight times.

    Source:
        Pitman, "Significance tests which may be applied to samples from any populations", Supplement to the Journal of
        the Royal Statistical Society 4 (1937), for paired samples.
    """
    changed = change[change != 0]
    if len(changed) > MOST_FLIPPED:
        return 0.0
    signs = 1 - 2 * ((np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1)
    return float(np.mean(np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12))


@dataclass(frozen=True, slots=True)
class _Within:
    """Variances within variants, over `freedom` degrees: of the runs' means, and of a photo's score between runs."""

    freedom: int
    spread: float
    interaction: float

    def seeds(self, num_photos: int) -> float | None:
        """Variance of a run's true mean: the spread that is left when photos' own ups and downs are taken off."""
        return max(0.0, self.spread - self.interaction / num_photos) if self.freedom else None


def _compare_within(variants: Sequence[Scores]) -> _Within:
    """Crossed analysis of variance within each variant, pooled over the variants."""
    freedom = sum(len(scores) - 1 for scores in variants)
    if freedom == 0:
        return _Within(0, 0.0, 0.0)
    spread = sum(float(scores.mean(axis=1).var()) * len(scores) for scores in variants) / freedom
    rest = 0.0
    for scores in variants:
        residual = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
        rest += float(np.sum(residual**2))
    return _Within(freedom, spread, rest / (freedom * max(variants[0].shape[1] - 1, 1)))


def _between_photos(values: Scores, within: _Within, share: float) -> float:
    """Variance between photos of their true values, (N,) means over runs being what was seen."""
    return max(0.0, float(values.var(ddof=1)) - within.interaction * share) if len(values) > 1 else 0.0


def _draw_means(
    values: Scores, within: _Within, share: float, draws: int, rng: np.random.Generator, *, pad: bool
) -> Scores:
    """(draws,) means as other photos and other runs would have given them.

    Resampling understates the spread of few photos: draws are stretched as in the expanded percentile interval
    (Hesterberg, arXiv:1411.5279, section 3.2), by 30 % for 9 photos and half a percent for 300.
    """
    from scipy.stats import t as student

    drawn = _resample_means(values, draws, rng, pad=pad)
    freedom = max(len(values) - 1, 1)
    stretch = float(student.ppf(0.975, freedom)) / 1.95996 * math.sqrt((freedom + 1) / freedom)
    drawn = float(drawn.mean()) + stretch * (drawn - float(drawn.mean()))
    if not within.freedom:
        return drawn
    # The spread between runs holds the photos' ups and downs from run to run; they must not count twice.
    seen = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    kept = math.sqrt(_between_photos(values, within, share) / seen) if seen > 0 else 1.0
    center = float(values.mean())
    of_runs = rng.standard_t(within.freedom, size=draws) * math.sqrt(within.spread * share)
    return center + kept * (drawn - center) + of_runs


def _resample_means(values: Scores, draws: int, rng: np.random.Generator, *, pad: bool) -> Scores:
    """(draws,) means of as many photos, drawn with replacement."""
    if pad:
        # Squares summing to 1, as half a photo in each of the four cells of the two-by-two table has.
        values = np.append(values, (math.sqrt(0.5), -math.sqrt(0.5)))
    # Resampling counts of equal values is the same draw as resampling photos, and far smaller.
    kinds, counts = np.unique(values, return_counts=True)
    rows = max(1, 4_000_000 // len(kinds))
    parts = [
        rng.multinomial(len(values), counts / len(values), size=min(rows, draws - start)) @ kinds
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts) / len(values)


def optimism_from_photos(correct: NDArray[np.bool_], *, draws: int, rng: np.random.Generator) -> float:
    """Expected excess of the best epoch's accuracy over the same epoch's on new photos, as a fraction.

    Bootstrap of the choice: pick the best epoch on resampled photos, score it on all (E, N).

    Source:
        Efron, "Estimating the error rate of a prediction rule", JASA 78 (1983): the optimism of a rule that was tuned
        on the data that scores it; Tibshirani and Tibshirani, arXiv:0908.2904, name the case of a minimum over
        settings.
    """
    num_epochs, num_photos = correct.shape
    if num_epochs < 2:
        return 0.0
    right = correct.astype(np.float64)
    truth = right.mean(axis=1)
    excess: list[float] = []
    rows = max(1, 2_000_000 // num_photos)
    for start in range(0, draws, rows):
        weights = rng.multinomial(num_photos, np.full(num_photos, 1 / num_photos), size=min(rows, draws - start))
        drawn = weights @ right.T / num_photos
        excess.extend(drawn.max(axis=1) - truth[drawn.argmax(axis=1)])
    return max(0.0, float(np.mean(excess)))
