"""The head alone learns what a linear classifier can learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fieldmark.training.loop import train_head


def fit(seed: int) -> tuple[nn.Module, list[float], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8) * 0.3 + functional.one_hot(labels, 8).float()
    head = nn.Linear(8, 3)
    losses = list(
        train_head(
            head,
            features,
            functional.one_hot(labels, 3).float(),
            epochs=60,
            lr=0.03,
            generator=torch.Generator().manual_seed(seed),
        )
    )
    return head, losses, features, labels


def test_the_probe_separates_what_is_separable():
    head, losses, features, labels = fit(0)
    assert losses[-1] < losses[0] / 2
    assert (head(features).argmax(1) == labels).float().mean() > 0.95


def test_class_weights_count_in_the_probe():
    features, targets = torch.ones(100, 2), functional.one_hot((torch.arange(100) >= 90).long(), 2).float()
    shares = []
    for weights in (None, torch.tensor([1 / 9, 1.0])):
        head = nn.Linear(2, 2)
        given = {"epochs": 200, "lr": 0.05, "generator": torch.Generator().manual_seed(0)}
        list(train_head(head, features, targets, weights, **given))
        shares.append(head(features[:1]).softmax(1)[0, 1].item())
    assert shares == [pytest.approx(0.1, abs=0.02), pytest.approx(0.5, abs=0.03)]


def test_same_seed_same_head_and_another_seed_another():
    (first, *_), (second, *_), (other, *_) = fit(0), fit(0), fit(1)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_no_gradient_is_left_for_the_training_that_follows():
    head, *_ = fit(0)
    assert all(parameter.grad is None for parameter in head.parameters())
