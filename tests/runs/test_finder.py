"""The learning-rate sweep: what its losses say, and that it trains as a training does."""

from __future__ import annotations

import itertools

import pytest
import torch

from fieldmark.config import load_config
from fieldmark.errors import TrainingError
from fieldmark.progress import Quiet
from fieldmark.runs import preview
from fieldmark.runs.preview import read_sweep, search_lr, valley_point

RATES = [1e-6 * 10 ** (6 * k / 99) for k in range(100)]
# A loss as networks show it: level, then falling, then exploding from a rate of about 0.1.
CURVE = [2.0 - min(rate / 1e-2, 1.0) + (rate / 0.1) ** 3 for rate in RATES]


def test_the_suggestion_lies_in_the_fall_before_the_explosion():
    found = read_sweep(RATES, CURVE)
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 100
    best = found.lrs[found.smoothed.index(min(found.smoothed))]
    assert 1e-5 < found.suggestion < best


def test_a_sweep_that_explodes_stops_early_and_one_that_does_not_reads_no_more_than_it_needs():
    read = []
    read_sweep(RATES, (read.append(value) or value for value in CURVE))
    assert len(read) < 100
    rest = iter([1.0] * 130)
    assert len(read_sweep(RATES[:20], rest).lrs) == 20
    assert len(list(rest)) in (109, 110)


def test_smoothing_is_corrected_for_its_start():
    found = read_sweep(RATES, CURVE)
    weights = [0.9 ** (4 - i) for i in range(5)]
    by_hand = sum(w * loss for w, loss in zip(weights, found.losses, strict=False)) / sum(weights)
    assert found.smoothed[4] == pytest.approx(by_hand)


def test_a_sweep_without_anything_to_see_is_refused():
    with pytest.raises(TrainingError, match="only 4 finite losses from 1e-06 on"):
        read_sweep(RATES, CURVE[:4])


def test_the_sweep_rises_exponentially_in_all_groups_and_ends_where_a_loss_is_not_finite(
    tmp_path, write_photos, monkeypatch
):
    write_photos(tmp_path, ["a", "b"])
    overrides = [f"data.path={tmp_path}", "data.val_fraction=0.25", "model.name=test_resnet", "model.weights=random",
                 "augment.size=32", "eval.size=32", "train.batch_size=8", "train.precision=32-true", "cache.mode=off",
                 "loader.workers=0"]  # fmt: skip
    seen, whole = [], preview.update

    def watch(fabric, state, batch, options):
        seen.append([group["lr"] for group in state.optimizer.param_groups])
        if len(seen) == 21:
            batch.images[0] = torch.nan
        return whole(fabric, state, batch, options)

    monkeypatch.setattr(preview, "update", watch)
    found = search_lr(load_config(None, overrides), progress=Quiet())
    assert list(found.lrs) == pytest.approx(RATES[:20])
    assert [max(rates) for rates in seen[:20]] == pytest.approx(RATES[:20])
    assert [min(rates) / max(rates) for rates in seen] == pytest.approx([0.1] * 21)
    assert all(a > 0 for a, _ in itertools.pairwise(found.losses))


def test_the_valley_of_a_curve_known_by_hand():
    lrs = [10.0**k for k in range(-9, 3)]
    losses = [5.0, 5.1, 5.0, 4.9, 4.5, 3.0, 2.5, 2.4, 2.3, 2.5, 4.0, 9.0]
    # Longest fall: the eight places 1 to 8. fastai starts at 8 - 8 = 0; a third is 2.67, so place 0 + 2 + 1.
    assert valley_point(lrs, losses) == 1e-6


@pytest.mark.slow  # importing fastai takes seconds
def test_valley_equals_fastais_rule():
    schedule = pytest.importorskip("fastai.callback.schedule", reason="slow", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        losses = (torch.randn(60, generator=generator) * 0.3 - torch.linspace(0, 3, 60)).tolist()
        lrs = [10 ** (-6 + 0.1 * k) for k in range(60)]
        assert valley_point(lrs, losses) == pytest.approx(schedule.valley(lrs, losses, 60)[0])
