"""Intervals, tests and sample sizes for paired comparisons of classifiers, and how people read their numbers.

Pure functions over arrays. Shape letters: S runs of one variant (seeds), N photos, E epochs. A score is per photo and
in [0, 1] where it is correctness; differences are `second - first`, so a positive one favors the second. `level` is the
coverage of an interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which loads its parts when they are used: nobody waits a second for what a prediction does not need
from numpy.typing import NDArray

from fieldmark.training.metrics import wilson_interval

Scores = NDArray[np.float64]

MOST_FLIPPED = 14
EFFECT = 0.01  # the smallest difference worth seeing: one point of accuracy, or 0.01 nats of log loss


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


@dataclass(frozen=True)
class Shown:
    """A metric in words, and its numbers as people read them."""

    title: str
    scale: int = 100
    digits: int = 1
    suffix: str = " %"
    unit: str = "points"  # of differences
    effect: str = "1 point"  # `EFFECT` in words

    def number(self, value: float, sign: str = "") -> str:
        """The number alone; with `sign` "+" positive ones have a sign too."""
        return f"{self.scale * value:{sign}.{self.digits}f}"

    def value(self, value: float) -> str:
        """Such as `91.2 %`."""
        return self.number(value) + self.suffix

    def interval(self, interval: Interval) -> str:
        """Such as `91.2 % (88.1 to 93.6)`."""
        return f"{self.value(interval.estimate)} ({self.number(interval.low)} to {self.number(interval.high)})"

    def change(self, interval: Interval) -> str:
        """The ends of a difference's interval, such as `-1.3 to +3.3`."""
        return f"{self.number(interval.low, '+')} to {self.number(interval.high, '+')}"


SHOWN = {
    "top1": Shown("Top-1 accuracy"),
    "macro_recall": Shown("Macro recall"),
    "prior_top1": Shown("Accuracy under the training prior"),
    "log_loss": Shown("Negated log loss", scale=1, digits=3, suffix="", unit="nats", effect=f"{EFFECT:g} nats"),
}


@dataclass(frozen=True, slots=True)
class Variance:
    """Says where the uncertainty of a difference comes from, as variances of single scores."""

    photos: float  # of the true per-photo difference, between photos
    interaction: float  # of a photo's score between runs of one variant, beyond what shifts the whole run
    seeds: float | None  # of a run's mean score between runs of one variant; None where each variant has one run

    def add_pseudo_photos(self, num_photos: int) -> float:
        """Variance between photos with the pseudo-photos', or variants that always agree would need no photos."""
        return self.photos + 1 / (num_photos + 2)


@dataclass(frozen=True, slots=True)
class Difference:
    """Says how much better the second variant is than the first."""

    interval: Interval
    p_value: float
    variance: Variance
    num_photos: int
    num_runs: tuple[int, int]


def mcnemar_exact(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided p-value that two classifiers err alike, from whether each was right on each of the same photos.

    Source:
        McNemar, Psychometrika 12 (1947), in its exact binomial form; recommended for one run of each of two classifiers
        by Dietterich, "Approximate statistical tests", Neural Computation 10 (1998), section 3.1.
    """
    gained, lost = int(np.sum(second & ~first)), int(np.sum(first & ~second))
    return float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


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

    There is no spread where all photos have one score; nine photos without an error are [0.70, 1], not [1, 1].
    """
    low, high = wilson_interval(interval.estimate * num_photos, num_photos, confidence=level)
    return Interval(interval.estimate, min(low, interval.low), max(high, interval.high))


def mean_interval(scores: Scores, *, level: float) -> Interval:
    """Interval of the mean of one variant's (S, N) scores, over photos and, where there are several runs, over runs."""
    means = scores.mean(axis=0)
    variance, freedom = _find_variance(means, [scores])
    error = _mean_error(variance.photos, variance, len(means), freedom, 1 / len(scores))
    return _interval(float(means.mean()), *error, level=level)


def paired_difference(first: Scores, second: Scores, *, level: float) -> Difference:
    """The difference of two variants' mean scores, (S1, N) and (S2, N) on the same photos, by Student's t.

    Its variance is that of the photos' true differences and, where a variant has several runs, that of a run's mean
    between runs, pooled over both variants. Two pseudo-photos, one in favor of each side, keep the interval open where
    the two hardly ever disagree.

    Source:
        Photos and seeds as crossed random effects: Owen, "The pigeonhole bootstrap", arXiv:0712.1111; why seeds count:
        Bouthillier et al., "Accounting for variance in machine learning benchmarks", arXiv:2103.03098. Pseudo-photos:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24 (2005).
    """
    change = second.mean(axis=0) - first.mean(axis=0)
    estimate, num_photos = float(change.mean()), len(change)
    variance, freedom = _find_variance(change, [first, second])
    share = 1 / len(first) + 1 / len(second)
    error, freedom = _mean_error(variance.add_pseudo_photos(num_photos), variance, num_photos, freedom, share)
    p_value = _p_value(first, second, estimate / error, freedom)
    interval = _interval(estimate, error, freedom, level=level)
    return Difference(interval, p_value, variance, num_photos, (len(first), len(second)))


def photos_needed(difference: Difference, *, effect: float, level: float, power: float) -> int | None:
    """Photos with which a true difference of `effect` would be seen with probability `power`, runs as they are.

    None where the spread between runs alone hides such a difference, however many photos.

    Source:
        Sample size of a paired z-test: Connor, "Sample size for testing differences in proportions for the
        paired-sample design", Biometrics 43 (1987), in its unconditional form.
    """
    variance, share = difference.variance, sum(1 / count for count in difference.num_runs)
    room = _variance_allowed(effect, level, power) - (variance.seeds or 0.0) * share
    single = variance.add_pseudo_photos(difference.num_photos) + variance.interaction * share
    return max(1, math.ceil(single / room)) if room > 0 else None


def runs_needed(difference: Difference, *, effect: float, level: float, power: float) -> int | None:
    """Runs per variant with which a true difference of `effect` would be seen on the same photos.

    None where the photos alone hide it, or where each variant has one run and the spread between runs is not known.
    """
    variance, num_photos = difference.variance, difference.num_photos
    room = _variance_allowed(effect, level, power) - variance.add_pseudo_photos(num_photos) / num_photos
    if variance.seeds is None or room <= 0:
        return None
    return max(2, math.ceil(2 * (variance.seeds + variance.interaction / num_photos) / room))


def _variance_allowed(effect: float, level: float, power: float) -> float:
    normal = scipy.stats.norm
    return float((effect / (normal.ppf((1 + level) / 2) + normal.ppf(power))) ** 2)


def _interval(estimate: float, error: float, freedom: float, *, level: float) -> Interval:
    half = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    return Interval(estimate, estimate - half, estimate + half)


def _p_value(first: Scores, second: Scores, t_value: float, freedom: float) -> float:
    """McNemar's exact one where each variant has one run and scores are 0 or 1; Student's otherwise."""
    scores = np.concatenate([first, second])
    if len(first) == len(second) == 1 and bool(np.isin(scores, (0.0, 1.0)).all()):
        return mcnemar_exact(first[0] > 0, second[0] > 0)
    change = second.mean(axis=0) - first.mean(axis=0)
    return max(float(2 * scipy.stats.t.sf(abs(t_value), freedom)), _sign_flip_p(change))


def _sign_flip_p(change: Scores) -> float:
    """Two-sided p-value that photos changed for better and for worse alike; 0 where too many changed to enumerate.

    Four photos that all improved by as much have no spread, but chance does so once in eight times.

    Source:
        Pitman, "Significance tests which may be applied to samples from any populations", Supplement to the Journal of
        the Royal Statistical Society 4 (1937), for paired samples.
    """
    changed = change[change != 0]
    if len(changed) > MOST_FLIPPED:
        return 0.0
    signs = 1 - 2 * ((np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1)
    return float(np.mean(np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12))


def _find_variance(values: Scores, variants: Sequence[Scores]) -> tuple[Variance, int]:
    """Variance of (N,) means over runs, or of their differences, and the degrees of freedom of what runs differ in.

    It is a crossed analysis of variance within each variant, pooled over the variants.
    """
    freedom, num_photos = sum(len(scores) - 1 for scores in variants), len(values)
    spread = interaction = 0.0
    for scores in variants if freedom else ():
        means = scores.mean(axis=1, keepdims=True)
        spread += float(means.var()) * len(scores) / freedom
        rest = scores - scores.mean(axis=0) - means + scores.mean()
        interaction += float(np.sum(rest**2)) / (freedom * max(num_photos - 1, 1))
    seen = float(values.var(ddof=1)) if num_photos > 1 else 0.0
    photos = max(0.0, seen - interaction * sum(1 / len(scores) for scores in variants))
    # The spread between runs holds the photos' ups and downs from run to run; they must not count twice.
    seeds = max(0.0, spread - interaction / num_photos) if freedom else None
    return Variance(photos, interaction, seeds), freedom


def _mean_error(photos: float, variance: Variance, num_photos: int, freedom: int, share: float) -> tuple[float, float]:
    """Standard error of a mean, and its degrees of freedom; `photos` is the variance between photos.

    Source:
        Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2 (1946).
    """
    of_photos = photos / num_photos
    of_runs = ((variance.seeds or 0.0) + variance.interaction / num_photos) * share
    total = of_photos + of_runs
    squares = of_photos**2 / max(num_photos - 1, 1) + of_runs**2 / max(freedom, 1)
    return math.sqrt(total), total**2 / squares if squares else 1.0


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
    right, even = correct.astype(np.float64), np.full(num_photos, 1 / num_photos)
    truth, excess = right.mean(axis=1), 0.0
    for _ in range(draws):
        drawn = right @ rng.multinomial(num_photos, even) / num_photos
        excess += float(drawn.max() - truth[drawn.argmax()])
    return max(0.0, excess / draws)
