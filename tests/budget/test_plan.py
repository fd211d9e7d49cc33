"""A plan: decisions by the clock, on record, and repeated from there."""

from __future__ import annotations

import json

import pytest

from fieldmark.budget.plan import Plan, default_minutes
from fieldmark.errors import RunError


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def begin(tmp_path, clock, seconds=60.0) -> Plan:
    plan = Plan(tmp_path / "plan.jsonl", seconds, clock)
    plan.decide("budget", lambda: plan.seconds)
    return plan


def list_names(plan: Plan) -> list[str]:
    return [json.loads(line)["what"] for line in plan.path.read_text().splitlines()]


def test_a_decision_on_record_is_repeated_and_later_ones_are_new(tmp_path):
    clock = FakeClock()
    plan = begin(tmp_path, clock)
    clock.now += 10
    assert plan.decide("size", lambda: 224) == 224

    again = Plan.resume(tmp_path / "plan.jsonl", minutes=None, clock=clock)
    assert again.decide("size", lambda: pytest.fail("asked the clock again")) == 224
    assert again.decide("epochs", lambda: 5) == 5
    assert list_names(again) == ["budget", "size", "epochs"]


def test_a_resumed_plan_has_what_was_left_or_new_minutes(tmp_path):
    clock = FakeClock()
    plan = begin(tmp_path, clock)
    clock.now += 45
    plan.decide("size", lambda: 224)
    clock.now += 1000

    assert Plan.resume(plan.path, minutes=None, clock=clock).left == pytest.approx(15)
    assert Plan.resume(plan.path, minutes=2, clock=clock).left == pytest.approx(120)


def test_a_torn_last_line_is_forgotten(tmp_path):
    plan = begin(tmp_path, FakeClock())
    plan.decide("size", lambda: 224)
    with plan.path.open("a") as file:
        file.write('{"at": 3, "wh')

    again = Plan.resume(plan.path, minutes=None, clock=FakeClock())
    assert again.decide("size", lambda: 0) == 224
    again.decide("epochs", lambda: 5)
    assert list_names(plan) == ["budget", "size", "epochs"]


def test_a_record_of_another_version_is_refused(tmp_path):
    plan = begin(tmp_path, FakeClock())
    plan.decide("size", lambda: 224)
    again = Plan.resume(plan.path, minutes=None, clock=FakeClock())
    with pytest.raises(RunError, match=r"decides 'size' where this version decides 'epochs'.*Begin a new run"):
        again.decide("epochs", lambda: 5)


def test_the_default_budget_is_ten_minutes_on_two_cores_and_an_hour_on_a_gpu():
    assert default_minutes(cores=2, has_gpu=False) == 10
    assert default_minutes(cores=1, has_gpu=False) == 20
    assert default_minutes(cores=64, has_gpu=False) == 5
    assert default_minutes(cores=2, has_gpu=True) == 60
