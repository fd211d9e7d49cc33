from __future__ import annotations

import numpy as np
import pytest

from fieldmark.study.statistics import optimism_from_photos


def _equal_epochs(rng, *, epochs, photos=300):
    return rng.random((epochs, photos)) < 0.9


def test_choosing_among_equal_epochs_flatters_as_much_as_new_photos_show():
    rng = np.random.default_rng(0)
    excess, estimated = [], []
    for _ in range(60):
        correct = _equal_epochs(rng, epochs=20)
        excess.append(correct.mean(axis=1).max() - 0.9)
        estimated.append(optimism_from_photos(correct, draws=200, rng=rng))
    assert np.mean(estimated) == pytest.approx(np.mean(excess), rel=0.4)


def test_more_epochs_to_choose_from_flatter_more():
    rng = np.random.default_rng(1)
    few = optimism_from_photos(_equal_epochs(rng, epochs=3), draws=500, rng=rng)
    many = optimism_from_photos(_equal_epochs(rng, epochs=50), draws=500, rng=rng)
    assert many > 1.5 * few > 0


def test_an_epoch_that_is_better_on_every_photo_flatters_nothing():
    rng = np.random.default_rng(2)
    correct = np.stack([np.arange(300) < limit for limit in (100, 200, 290)])
    assert optimism_from_photos(correct, draws=500, rng=rng) < 0.001


def test_one_epoch_is_no_choice():
    rng = np.random.default_rng(3)
    assert optimism_from_photos(_equal_epochs(rng, epochs=1), draws=10, rng=rng) == 0
