"""A model that would kill the process is found out in another one, once."""

from __future__ import annotations

import pytest

from fieldmark.errors import TrainingError
from fieldmark.training import trial
from fieldmark.training.trial import Computation, choose_computation

MODEL = {
    "name": "test_resnet",
    "num_classes": 2,
    "head": "linear",
    "head_hidden": 8,
    "head_dropout": 0.0,
    "feature_dropout": 0.0,
    "drop_path": 0.0,
    "stride_in_1x1": False,
}
WANTED = Computation(True, "bf16-mixed")


def answer(monkeypatch, survives):
    tried = []

    def try_update(job):
        computation = Computation(job["channels_last"], job["precision"])
        tried.append(computation)
        return survives(computation)

    monkeypatch.setattr(trial, "try_update", try_update)
    return tried


def test_a_trial_that_survives_is_remembered_and_says_nothing(monkeypatch, tmp_path):
    tried = answer(monkeypatch, lambda computation: True)
    for _ in range(2):
        assert choose_computation(MODEL, WANTED, processor="a processor", memory=tmp_path) == (WANTED, "")
    assert tried == [WANTED]


def test_a_trial_that_crashes_falls_back_to_the_layout_then_to_32_bit_and_says_so(monkeypatch, tmp_path):
    tried = answer(monkeypatch, lambda computation: computation.precision == "32-true")
    for _ in range(2):
        chosen, reason = choose_computation(MODEL, WANTED, processor="a processor", memory=tmp_path)
        assert chosen == Computation(False, "32-true")
        assert "test_resnet crashes torch" in reason
        assert "uses 32-true, contiguous layout instead" in reason
    assert tried == [WANTED, Computation(False, "bf16-mixed"), chosen]


def test_a_trial_that_never_survives_is_an_error_and_one_that_says_nothing_is_not_remembered(monkeypatch, tmp_path):
    tried = answer(monkeypatch, lambda computation: None)
    for _ in range(2):
        assert choose_computation(MODEL, WANTED, processor="a processor", memory=tmp_path) == (WANTED, "")
    assert tried == [WANTED, WANTED]
    assert not list(tmp_path.iterdir())
    answer(monkeypatch, lambda computation: False)
    with pytest.raises(TrainingError, match="in every layout and precision"):
        choose_computation(MODEL, WANTED, processor="a processor", memory=tmp_path)


@pytest.mark.slow
def test_a_real_trial_survives_or_dies_without_this_process(tmp_path):
    assert trial.try_update({"model": MODEL, "channels_last": True, "precision": "32-true"}) is True
    for name in ("mobileone_s0", "repvgg_a0", "fastvit_t8"):
        chosen, reason = choose_computation(
            {**MODEL, "name": name}, Computation(True, "32-true"), processor="a processor", memory=tmp_path
        )
        assert bool(reason) == (not chosen.channels_last)
        assert chosen.precision == "32-true"
