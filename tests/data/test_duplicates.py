"""Laws of the duplicate search: exactly the pairs that comparing everything with everything finds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmark.data import audit
from fieldmark.data.audit import near_pairs


def by_brute_force(first, second, max_distance):
    distance = np.bitwise_count(first[:, None] ^ second[None, :])
    left, right = np.nonzero(distance <= max_distance)
    return sorted(zip(distance[left, right].tolist(), left.tolist(), right.tolist(), strict=True))


def make_hashes(rng: np.random.Generator, count: int, seeds: np.ndarray) -> np.ndarray:
    """Hashes a few bits away from some of `seeds`, so that all distances up to 16 occur."""
    hashes = rng.choice(seeds, count)
    for _ in range(16):
        flip = rng.integers(0, 2, count, dtype=np.uint64) << rng.integers(0, 64, count, dtype=np.uint64)
        hashes = hashes ^ flip
    return hashes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 30), st.integers(0, 13))
def test_the_search_finds_what_comparing_everything_finds(seed, num_first, num_second, max_distance):
    rng = np.random.default_rng(seed)
    seeds = rng.integers(0, 2**64, 3, dtype=np.uint64)
    first, second = make_hashes(rng, num_first, seeds), make_hashes(rng, num_second, seeds)
    second[: min(num_first, num_second) // 2] = first[: min(num_first, num_second) // 2]
    left, right, distance = near_pairs(first, second, max_distance=max_distance)
    found = list(zip(distance.tolist(), left.tolist(), right.tolist(), strict=True))
    assert found == by_brute_force(first, second, max_distance)


def test_portions_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, 200, dtype=np.uint64), rng.integers(0, 50, 300, dtype=np.uint64)
    monkeypatch.setattr(audit, "PAIRS_AT_ONCE", 7)
    left, right, distance = near_pairs(first, second, max_distance=2)
    assert list(zip(distance.tolist(), left.tolist(), right.tolist(), strict=True)) == by_brute_force(first, second, 2)


@pytest.mark.slow
def test_a_hundred_thousand_photos_take_seconds():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2**64, 80_000, dtype=np.uint64), rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    second[:50] = first[:50] ^ np.uint64(0b1011)
    start = time.process_time()
    left, _, distance = near_pairs(first, second, max_distance=6)
    assert time.process_time() - start < 20
    assert left.tolist() == list(range(50))
    assert set(distance.tolist()) == {3}
