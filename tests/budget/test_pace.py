"""A training that ends on time, on simulated machines: none is late, and none is cut at a high rate."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from fieldmark.budget.plan import REPLAN_EVERY, Pace, Shape


def simulate(*, seconds: float, planned: float, actual: list[float]) -> tuple[float, list[float]]:
    """Train for `seconds` with updates planned to take `planned` each that take `actual` in turn: end, and factors."""
    now, step = 0.0, 0
    pace = Pace(Shape.of(int(seconds / planned)), lambda: seconds - now)
    factors: list[float] = []
    pace.observe(now)
    while step < pace.shape.end:
        end = pace.propose(step)
        if end is not None:
            pace.shape = pace.shape.moved(step, end)
            continue_ = step < pace.shape.end
            if not continue_:
                break
        factors.append(pace.shape.factor(step))
        now += actual[step % len(actual)]
        step += 1
        pace.observe(now)
    return now, factors


@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_machines_end_on_time_and_at_a_low_rate(seed):
    rng = random.Random(seed)
    seconds, planned = rng.uniform(30, 1800), rng.uniform(0.05, 1)
    pace = planned * rng.uniform(0.5, 3)
    actual = [pace * rng.uniform(0.8, 1.2) for _ in range(997)]
    end, factors = simulate(seconds=seconds, planned=planned, actual=actual)

    assert end <= seconds * 1.02 + 5
    assert factors[-1] <= 0.1
    assert end >= 0.85 * seconds


def test_a_machine_that_slows_three_times_in_the_middle_still_ends_on_time_at_a_low_rate():
    actual = [0.2] * 1000 + [0.6] * 4000
    end, factors = simulate(seconds=400, planned=0.2, actual=actual)
    assert end <= 400 * 1.02 + 5
    assert factors[-1] <= 0.05
    # The cooldown started when the slowing was seen, and nothing jumped down.
    assert max(a - b for a, b in pairwise(factors[50:])) < 0.05


def test_the_rate_rises_stays_and_ends_at_zero():
    shape = Shape.of(500)
    factors = [shape.factor(step) for step in range(500)]
    assert factors[0] < factors[5] < factors[40] == 1
    assert factors[shape.start - 1] == 1
    assert factors[-1] == pytest.approx(1 / 201)
    assert shape.factor(500) == 0


def test_a_plan_that_holds_is_left_alone():
    now = 0.0
    pace = Pace(Shape.of(500), lambda: 100 - now)
    pace.observe(now)
    for step in range(1, 400):
        now += 0.2
        pace.observe(now)
        assert pace.propose(step) is None or step % REPLAN_EVERY, step
