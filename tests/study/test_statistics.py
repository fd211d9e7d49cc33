from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from fieldmark.study.statistics import holm, mcnemar_exact, mean_interval, paired_difference, photos_needed, runs_needed


def _pair(rng, *, photos=300, runs=(1, 1), shift=0.5, spread=0.0):
    difficulty = rng.normal(2.0, 2.5, photos)

    def draw(num_runs, extra):
        logits = difficulty + extra + rng.normal(0, spread, (num_runs, 1))
        return (rng.random((num_runs, photos)) < 1 / (1 + np.exp(-logits))).astype(float)

    return draw(runs[0], 0.0), draw(runs[1], shift)


def test_holm_agrees_with_statsmodels():
    rng = np.random.default_rng(8)
    for count in (1, 2, 5, 12):
        p_values = list(rng.random(count) ** 4)
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_agrees_with_statsmodels(outcomes):
    first, second = np.array(outcomes).T
    table = [[int(np.sum((first == a) & (second == b))) for b in (True, False)] for a in (True, False)]
    assert mcnemar_exact(first, second) == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_the_paired_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(0)
    first, second = _pair(rng, photos=2000)
    ours = paired_difference(first, second, level=0.95).interval
    theirs = bootstrap(
        (second[0] - first[0],), np.mean, method="percentile", n_resamples=5_000, rng=1
    ).confidence_interval
    assert ours.estimate == pytest.approx(second.mean() - first.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.0015)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    first, second = _pair(rng)
    paired = paired_difference(first, second, level=0.95).interval
    unpaired = paired_difference(first, rng.permuted(second, axis=1), level=0.95).interval
    assert paired.half_width < 0.85 * unpaired.half_width


def test_spread_between_seeds_widens_the_interval():
    even, odd = np.tile([1.0, 0.0, 1.0, 1.0], 75), np.tile([0.0, 1.0, 1.0, 1.0], 75)
    steady = paired_difference(np.stack([even] * 3), np.stack([odd] * 3), level=0.95)
    first = np.stack([np.where(np.arange(300) < limit, even, 0.0) for limit in (300, 270, 240)])
    shaky = paired_difference(first, np.stack([odd] * 3), level=0.95)
    assert steady.variance.seeds == 0
    assert shaky.variance.seeds > 0.001
    assert shaky.interval.half_width > 1.5 * steady.interval.half_width


def test_settings_that_never_disagree_keep_an_open_interval():
    same = np.ones((1, 300))
    found = paired_difference(same, same, level=0.95)
    assert found.interval.low < 0 < found.interval.high
    assert found.interval.half_width < 0.01
    assert found.p_value == 1.0


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3))
def test_swapping_the_settings_turns_the_difference_around(seed, runs_a, runs_b):
    rng = np.random.default_rng(seed)
    first, second = _pair(rng, photos=40, runs=(runs_a, runs_b))
    there = paired_difference(first, second, level=0.95)
    back = paired_difference(second, first, level=0.95)
    assert there.interval.estimate == pytest.approx(-back.interval.estimate)
    assert there.interval.low <= there.interval.estimate <= there.interval.high
    assert 0 < there.p_value <= 1


def test_more_photos_are_asked_for_where_settings_disagree_more():
    rng = np.random.default_rng(3)
    close = paired_difference(*_pair(rng, shift=0.0), level=0.95)
    first = (rng.random((1, 300)) < 0.5).astype(float)
    far = paired_difference(first, 1 - first, level=0.95)
    options = {"effect": 0.01, "level": 0.95, "power": 0.8}
    assert 300 < photos_needed(close, **options) < photos_needed(far, **options)


def test_the_photos_asked_for_have_the_power_promised():
    rng = np.random.default_rng(4)
    pilot = paired_difference(*_pair(rng, photos=200_000, shift=0.25), level=0.95)
    needed = photos_needed(pilot, effect=abs(pilot.interval.estimate), level=0.95, power=0.8)
    seen = [paired_difference(*_pair(rng, photos=needed, shift=0.25), level=0.95).p_value < 0.05 for _ in range(150)]
    assert 0.65 < np.mean(seen) < 0.92


def test_seeds_cannot_be_asked_for_without_knowing_their_spread():
    rng = np.random.default_rng(5)
    options = {"effect": 0.01, "level": 0.95, "power": 0.8}
    one_each = paired_difference(*_pair(rng), level=0.95)
    assert runs_needed(one_each, **options) is None
    many = paired_difference(*_pair(rng, photos=20_000, runs=(3, 3), shift=0, spread=0.3), level=0.95)
    assert runs_needed(many, **options) > 3
    assert photos_needed(many, **options) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "spread"), [((1, 1), 0.0), ((3, 3), 0.0), ((3, 3), 0.15), ((3, 3), 0.3), ((5, 5), 0.3), ((2, 3), 0.2)]
)
def test_the_interval_covers_the_truth(runs, spread):
    rng = np.random.default_rng(11)
    photos = rng.normal(2.0, 2.5, 1_000_000)
    runs_chance = rng.normal(0, spread, (2, len(photos)))
    first_truth, second_truth = (
        np.mean(1 / (1 + np.exp(-photos - shift - runs_chance[n]))) for n, shift in ((0, 0), (1, 0.4))
    )
    truth = second_truth - first_truth
    covered = 0
    for _ in range(1000):
        first, second = _pair(rng, runs=runs, shift=0.4, spread=spread)
        interval = paired_difference(first, second, level=0.95).interval
        covered += interval.low <= truth <= interval.high
    assert covered / 1000 >= 0.93


def test_an_interval_over_seeds_is_wider_than_over_photos():
    rng = np.random.default_rng(6)
    scores, _ = _pair(rng, runs=(4, 1), spread=0.8)
    over_both = mean_interval(scores, level=0.95)
    over_photos = mean_interval(scores.mean(axis=0, keepdims=True), level=0.95)
    assert over_both.half_width > 1.2 * over_photos.half_width
