from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fieldmark.augment.sample import NOISE_SIZE, noise_bank, philox, uniform_streams, uniforms
from fieldmark.errors import DataError

# kat_vectors of Random123, the authors' own library: counter, key, answer of philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    first, second = words(key)
    given = np.array([words(counter), [1, 2, 3, 4]], dtype=np.uint64)
    assert philox(given, (first, second))[0].tolist() == words(answer)


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(3, 5, np.arange(2000), stream=1, count=10)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 0.01
    correlations = np.corrcoef(draws.T)[~np.eye(10, dtype=bool)]
    assert np.abs(correlations).max() < 0.1


def test_a_number_depends_on_its_own_address_alone():
    whole = uniforms(1, 2, [5, 6, 7], stream=0, count=12)
    assert np.array_equal(uniforms(1, 2, [7], stream=0, count=12)[0], whole[2])
    assert np.array_equal(uniforms(1, 2, [5, 6, 7], stream=0, count=5), whole[:, :5])
    together = uniform_streams(1, 2, [5, 6, 7], {4: 7, 0: 12, 3: 0})
    assert np.array_equal(together[0], whole)
    assert np.array_equal(together[4], uniforms(1, 2, [5, 6, 7], stream=4, count=7))
    assert together[3].shape == (3, 0)


@pytest.mark.parametrize("other", [(2, 2, 5, 0), (1, 3, 5, 0), (1, 2, 6, 0), (1, 2, 5, 1), (1 + (1 << 32), 2, 5, 0)])
def test_every_part_of_the_address_matters(other):
    seed, epoch, number, stream = other
    same = uniforms(1, 2, [5], stream=0, count=8) == uniforms(seed, epoch, [number], stream=stream, count=8)
    assert not same.any()


@pytest.mark.parametrize(
    ("seed", "epoch", "numbers"), [(-1, 0, [0]), (1 << 64, 0, [0]), (0, -1, [0]), (0, 0, [1 << 32])]
)
def test_an_address_out_of_range_is_refused(seed, epoch, numbers):
    with pytest.raises(DataError, match=r"a seed of 0 to 2\*\*64 - 1.*; got seed"):
        uniforms(seed, epoch, numbers, stream=0, count=1)


def test_the_noise_bank_is_normal_fixed_and_read_only():
    bank = noise_bank()
    assert bank.shape == (NOISE_SIZE,)
    assert bank.dtype == np.float32
    assert stats.kstest(bank[::16], "norm").pvalue > 0.01
    assert bank[:3].tolist() == pytest.approx([-0.24822916, -0.02676702, -1.94441628])
    with pytest.raises(ValueError, match="read-only"):
        bank[0] = 0
