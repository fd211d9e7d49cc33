from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fieldmark.errors import TrainingError
from fieldmark.runs.preview import find_lr, valley_point


def make_task(seed=0, count=200):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, 3, generator=generator)
    batches = []
    for _ in range(count):
        inputs = torch.randn(16, 8, generator=generator)
        batches.append((inputs, inputs @ truth))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches


def sweep(model, optimizer, batches, **changes):
    settings = {"highest": 10.0}
    backward = changes.pop("backward", torch.Tensor.backward)
    loss_fn = nn.functional.mse_loss
    return find_lr(model, optimizer, batches, loss_fn, backward=backward, **{**settings, **changes})


def test_the_sweep_rises_exponentially_and_the_suggestion_lies_before_the_explosion():
    found = sweep(*make_task())
    ratios = [b / a for a, b in zip(found.lrs, found.lrs[1:], strict=False)]
    assert found.lrs[0] == pytest.approx(1e-6)
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert len(found.lrs) == len(found.losses) == len(found.smoothed)
    best = found.lrs[found.smoothed.index(min(found.smoothed))]
    assert 1e-4 < found.suggestion < best


def test_the_suggested_rate_learns_faster_than_the_ends_of_the_sweep():
    def loss_after(lr):
        model, _, batches = make_task()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for inputs, targets in batches[:60]:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    suggestion = sweep(*make_task()).suggestion
    assert loss_after(suggestion) < 0.5 * min(loss_after(1e-6), loss_after(10.0))


def test_groups_keep_the_ratio_of_their_rates():
    model, _, batches = make_task()
    groups = [
        {"params": model[0].parameters(), "lr": 1.0, "base_lr": 1e-3},
        {"params": model[4].parameters(), "lr": 1.0, "base_lr": 1e-2},
    ]
    optimizer = torch.optim.SGD(groups)
    seen = []

    def backward(loss):
        seen.append([group["lr"] for group in optimizer.param_groups])
        loss.backward()

    found = sweep(model, optimizer, batches, num_steps=10, highest=1e-3, backward=backward)
    assert [high for _, high in seen] == pytest.approx(list(found.lrs))
    assert [low / high for low, high in seen] == pytest.approx([0.1] * 10)


def test_a_sweep_that_explodes_stops_early_and_one_that_does_not_reads_no_more_than_it_needs():
    model, _, batches = make_task()
    assert len(sweep(model, torch.optim.SGD(model.parameters()), batches, highest=1e6).lrs) < 100
    rest = iter(batches)
    assert len(sweep(*make_task()[:2], rest, highest=1e-5, num_steps=20).lrs) == 20
    assert len(list(rest)) == len(batches) - 20


def test_smoothing_is_corrected_for_its_start():
    found = sweep(*make_task(), highest=1e-5)
    weights = [0.9 ** (4 - i) for i in range(5)]
    by_hand = sum(w * loss for w, loss in zip(weights, found.losses, strict=False)) / sum(weights)
    assert found.smoothed[4] == pytest.approx(by_hand)


def test_a_sweep_without_anything_to_see_is_refused():
    model, optimizer, batches = make_task()
    with pytest.raises(TrainingError, match="only 4 finite losses from 1e-06 on"):
        sweep(model, optimizer, batches[:4])
    with pytest.raises(TrainingError, match="only 0 finite losses"):
        sweep(model, optimizer, [(torch.full((16, 8), math.nan), batches[0][1])])


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
