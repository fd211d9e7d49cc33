"""Averages of weights: over time with buffers, over members with care."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fieldmark.runs.session import AVERAGE
from fieldmark.training.checkpoint import average_weights, greedy_soup


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_the_running_average_follows_the_formula_for_weights_and_buffers():
    model = make_model()
    average = ModelEmaV3(model, decay=0.9, **AVERAGE)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(200):
        model.train()(torch.randn(4, 3, 8, 8) + 5)
        with torch.no_grad():
            model[0].weight += 0.1
        average.update(model, step=step)
        keep = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = keep * expected[name] + (1 - keep) * tensor
    own = average.module.state_dict()
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(own[name], expected[name])
    assert own["1.num_batches_tracked"] == 200


def test_the_running_average_is_a_copy_that_learns_nothing_itself():
    model = make_model()
    average = ModelEmaV3(model, decay=0.99)
    assert not average.module.training
    with torch.no_grad():
        model[0].weight.zero_()
    assert average.module[0].weight.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_uniform_soup_is_the_mean():
    members = [{"w": torch.full((2,), float(value)), "n": torch.tensor(value)} for value in (1, 2, 6)]
    soup = average_weights(members)
    assert soup["w"].tolist() == [3.0, 3.0]
    assert soup["n"] == 1


def test_the_greedy_soup_keeps_only_what_does_not_hurt():
    members = [{"w": torch.tensor(value)} for value in (1.0, 3.0, 100.0)]
    kept, soup = greedy_soup(members, lambda member: -abs(float(member["w"]) - 2.0))
    assert sorted(kept) == [0, 1]
    assert soup["w"] == pytest.approx(2.0)
