"""The experiment on photos of none of the classes measures what it says, on invented features."""

from __future__ import annotations

import numpy as np
import torch

from experiments import unseen
from fieldmark.budget.heads import fit_head


def make_photos(count: int, labels: np.ndarray, centers: np.ndarray, *, seed: int) -> tuple[np.ndarray, ...]:
    values = (centers[labels] + np.random.default_rng(seed).normal(0, 1, (count, 32))).astype(np.float32)
    return values, labels, np.where(np.arange(count) % 5 == 0, "val", "train")


def test_photos_far_away_are_told_apart_and_photos_of_none_help_with_their_own_kind(monkeypatch):
    monkeypatch.setattr(unseen, "HELD_OUT", 4)
    rng = np.random.default_rng(0)
    birds = make_photos(240, np.repeat(np.arange(12), 20), rng.normal(0, 1, (12, 32)), seed=1)
    features, labels, _ = make_photos(90, np.zeros(90, np.int64), np.full((1, 32), 2.0), seed=2)
    far = features, labels, np.where(np.arange(90) % 2 == 0, "val", "test")
    rows = [row for draw in (0, 1) for row in unseen.measure(draw, birds, far)]
    found = {(row["none"], row["head"], row["score"]): row for row in rows if row["draw"] == 0}
    assert found["", "plain", "nearest neighbors"][f"auroc {unseen.FAR}"] > 0.95
    learned = found[unseen.FAR, "a class of its own", "probability"]
    assert learned[f"auroc {unseen.FAR}"] > found["", "plain", "probability"][f"auroc {unseen.FAR}"]
    assert learned[f"fpr95 {unseen.FAR}"] < 0.05
    page = unseen.write_page(rows, ("birds", "clothes"))
    assert page.count("\n| both |") == 4
    assert "as a class of its own, less plain" in page


def test_a_head_on_one_hot_targets_is_the_one_that_budgets_fit():
    features, labels, _ = make_photos(120, np.arange(120) % 3, np.random.default_rng(3).normal(0, 1, (3, 32)), seed=4)
    head = fit_head(features, labels, np.arange(120) % 2, num_classes=3, strengths=(1e-2,))
    basis = unseen._Basis.of(torch.from_numpy(features))
    weight, bias = unseen.fit(basis, np.ones(120, np.bool_), np.eye(3)[labels], 1e-2)
    np.testing.assert_allclose(weight.T, head.weight.numpy(), atol=2e-2)
    np.testing.assert_allclose(bias - bias.mean(), (head.bias - head.bias.mean()).numpy(), atol=2e-2)
