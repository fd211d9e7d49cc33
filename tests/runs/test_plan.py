"""The plan of a training: a pure function of its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.config import load_config
from fieldmark.runs import dataset
from fieldmark.runs.build import build_phase
from fieldmark.runs.dataset import TrainPlan, count_updates, cut_updates

CONFIG = load_config(
    None,
    [
        "train.epochs=10",
        "train.resolution_steps=[[0.0, 32], [0.5, 64]]",
        "mix.off_epochs=3",
    ],
)


def make_plan(num_photos: int, batch_size: int = 8, processes: int = 1) -> TrainPlan:
    return TrainPlan(
        10,
        np.arange(num_photos) * 3,
        np.arange(7),
        seed=1,
        batch_size=batch_size,
        eval_batch_size=3,
        processes=processes,
    )


@given(num=st.integers(0, 200), size=st.integers(1, 50), processes=st.integers(1, 4))
def test_updates_are_counted_without_cutting_them(num, size, processes):
    assert count_updates(num, size, processes=processes) == len(cut_updates(range(num), size, processes=processes))


def test_asking_for_the_number_of_updates_sorts_nothing(monkeypatch):
    monkeypatch.setattr(dataset, "epoch_order", None)
    assert make_plan(10**6).steps_per_epoch == 125_000


def test_an_epoch_holds_every_training_photo_once_in_another_order_each_time():
    found = make_plan(37)
    first, second = ([number for update in found.updates(epoch) for number in update] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == found.train_numbers.tolist()
    assert first != second


def test_processes_share_the_evaluation_batches_of_one():
    numbers = np.arange(20)
    shares = [make_plan(8).eval_share(numbers, rank=rank, processes=2) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == make_plan(8).eval_share(numbers, rank=0, processes=1)


def test_each_epoch_has_its_size_and_its_mixing():
    phases = [build_phase(CONFIG, epoch, SimpleNamespace(train_size=64)) for epoch in range(10)]
    assert [size for size, _ in phases] == [32] * 5 + [64] * 5
    assert [is_mixing for _, is_mixing in phases] == [True] * 7 + [False] * 3
