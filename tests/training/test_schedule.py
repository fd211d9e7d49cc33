from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from fieldmark.training.loop import EpochTally, TrainState
from fieldmark.training.optim import ScheduleSpec


def curve(name, *, epochs, steps_per_epoch=1, warmup=0.0, restart=None, factor=2):
    spec = ScheduleSpec(name, epochs, warmup, restart, factor)
    return [spec.factor(step, steps_per_epoch=steps_per_epoch) for step in range(epochs * steps_per_epoch)]


def make_optimizer(base_lrs=(1e-2, 1e-3)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr, "base_lr": lr} for lr in base_lrs]
    return torch.optim.SGD(groups)


def make_state(optimizer, **changes):
    shape = {
        "name": "cosine",
        "total_epochs": 6,
        "warmup_epochs": 1.0,
        "restart_epochs": None,
        "restart_factor": 2,
    }
    spec = ScheduleSpec(**{**shape, **changes})
    model = torch.nn.Identity()
    tally = EpochTally.zeros(torch.device("cpu"))
    return TrainState(model, model, optimizer, partial(spec.factor, steps_per_epoch=4), None, tally, 1)


@pytest.mark.parametrize("t_mult", [1, 2, 3])
@pytest.mark.parametrize("t_0", [1, 3, 10])
def test_warm_restarts_equal_torch_stepped_once_per_epoch(t_0, t_mult):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = CosineAnnealingWarmRestarts(optimizer, T_0=t_0, T_mult=t_mult)
    ours = curve("warm_restarts", epochs=130, steps_per_epoch=3, restart=t_0, factor=t_mult)
    for epoch in range(130):
        theirs = optimizer.param_groups[0]["lr"]
        assert ours[3 * epoch : 3 * epoch + 3] == pytest.approx([theirs] * 3, rel=1e-12, abs=1e-15)
        optimizer.step()
        reference.step()


@given(warmup=st.integers(0, 9), rest=st.integers(1, 20), steps=st.integers(1, 7))
def test_cosine_rises_then_falls_and_stays_in_range(warmup, rest, steps):
    values = curve("cosine", epochs=warmup + rest, steps_per_epoch=steps, warmup=warmup)
    top = warmup * steps
    assert all(0 < value <= 1 for value in values)
    assert values[top] == 1
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_cosine_follows_the_formula_and_reaches_zero_just_after_the_end():
    values = curve("cosine", epochs=10, steps_per_epoch=10, warmup=2.0)
    assert values[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert values[60] == pytest.approx(0.5)  # half way down
    spec = ScheduleSpec("cosine", 10, 2.0, None, 2)
    assert [spec.factor(step, steps_per_epoch=10) for step in (100, 250)] == pytest.approx([0, 0])


def test_constant_warms_up_then_stays_level():
    assert curve("constant", epochs=3, steps_per_epoch=2, warmup=1.5) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_warm_restarts_without_a_length_are_one_cycle_over_the_run():
    assert curve("warm_restarts", epochs=8) == pytest.approx([(1 + math.cos(math.pi * e / 8)) / 2 for e in range(8)])


def test_a_schedule_scales_every_group_by_its_own_peak():
    optimizer = make_optimizer()
    state = make_state(optimizer)
    for state.step, factor in enumerate([*curve("cosine", epochs=6, steps_per_epoch=4, warmup=1.0), 0]):
        state.set_rates()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-2 * factor, 1e-3 * factor], abs=1e-12)


def test_rates_survive_the_optimizer_replacing_its_groups():
    optimizer = make_optimizer()
    state = make_state(optimizer, name="constant", warmup_epochs=0.0)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 123.0
    optimizer.load_state_dict(saved)
    state.step = 3
    state.set_rates()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]


def warn(epochs, restart, factor=2, name="warm_restarts", warmup=0.0):
    return ScheduleSpec(name, epochs, warmup, restart, factor).warnings()


def test_a_run_no_longer_than_the_first_cycle_is_told_that_it_never_restarts():
    never, mid = warn(50, 100)
    assert "never restarts: 50 epochs" in never
    assert "100" in never
    assert "cycles end at train.epochs = 100" in mid
    assert "epoch 50 of a cycle of 100" in mid
    assert "52% of the peak" in mid
    (only,) = warn(100, 100)
    assert "never restarts" in only


def test_a_run_that_ends_mid_cycle_is_told_the_nearest_good_counts():
    (mid,) = warn(200, 100)
    assert "cycles end at train.epochs = 100 or 300" in mid
    (even,) = warn(25, 10, factor=1)
    assert "20 or 30" in even


@pytest.mark.parametrize(("epochs", "restart", "factor"), [(300, 100, 2), (7, 1, 2), (40, 10, 1), (13, 1, 3)])
def test_a_run_that_ends_with_a_cycle_is_not_warned(epochs, restart, factor):
    assert warn(epochs, restart, factor) == []


@settings(deadline=None)  # the first warning loads the templates
@given(restart=st.integers(1, 20), factor=st.integers(1, 3), epochs=st.integers(1, 200))
def test_cycles_end_exactly_where_the_next_epoch_is_at_the_peak(restart, factor, epochs):
    values = curve("warm_restarts", epochs=epochs + 1, restart=restart, factor=factor)
    assert any("within a cycle" in line for line in warn(epochs, restart, factor)) == (values[epochs] != 1)


def test_one_cycle_asked_for_as_such_and_runs_without_epochs_are_not_warned():
    assert warn(50, None) == []
    assert warn(0, 10) == []
    assert warn(10, None, name="cosine", warmup=1.0) == []


def test_a_warm_up_of_most_of_the_run_is_warned():
    assert "more than half" in warn(4, None, name="cosine", warmup=3.0)[0]
