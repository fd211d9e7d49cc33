"""When an update's passes are recorded; what they compute is tested on a GPU, in tests/runs/test_gpu.py."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fieldmark.training.replay import ALIKE_FIRST, Replay


@pytest.fixture
def replay(monkeypatch):
    """A replay whose recordings are the model itself, with all shapes that were recorded."""
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    made = Replay(
        SimpleNamespace(autocast=nullcontext), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))
    )
    made.recorded = []

    def record(module, sample, **_):
        made.recorded.append(tuple(sample[0].shape))
        module(sample[0])  # as torch does to warm up, which moves the running statistics
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


def test_a_shape_that_comes_again_and_again_is_recorded_once_and_a_last_smaller_batch_is_not(replay):
    full, last = torch.randn(4, 3, 2, 2), torch.randn(2, 3, 2, 2)
    for epoch in range(ALIKE_FIRST + 2):
        answers = [replay.compute(full) is not None for _ in range(5)]
        assert all(answers) or not epoch
        assert replay.compute(last) is None
    assert replay.recorded == [(4, 3, 2, 2)]


def test_what_else_learns_is_recorded_anew(replay):
    full = torch.randn(4, 3, 2, 2)
    for _ in range(ALIKE_FIRST):
        replay.compute(full)
    replay._model[1].requires_grad_(False)
    assert [replay.compute(full) is not None for _ in range(ALIKE_FIRST)] == [False, False, True]
    assert len(replay.recorded) == 2


def test_a_recording_leaves_running_statistics_as_they_were(replay):
    full = torch.randn(4, 3, 2, 2)
    before = {name: buffer.clone() for name, buffer in replay._model.named_buffers()}
    replay._record(full)
    assert all(torch.equal(buffer, before[name]) for name, buffer in replay._model.named_buffers())


def test_without_room_for_a_recording_there_is_none(replay, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9, 100))
    assert [replay.compute(torch.randn(4, 3, 2, 2)) for _ in range(5)] == [None] * 5
    assert not replay.give_up()


def test_a_recording_that_is_given_up_is_freed_and_does_not_come_again(replay):
    full = torch.randn(4, 3, 2, 2)
    assert [replay.compute(full) is not None for _ in range(4)][-1]
    passes = weakref.ref(replay._passes)
    assert replay.give_up()
    assert passes() is None
    assert [replay.compute(full) for _ in range(5)] == [None] * 5
    assert not replay.give_up()


def test_passes_that_cannot_be_recorded_go_as_before(replay, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    assert [replay.compute(torch.randn(4, 3, 2, 2)) for _ in range(5)] == [None] * 5
