"""What other losses and targets earn is judged on photos that neither learned nor are of the test set."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from experiments import ingredients
from fieldmark.budget.candidates import find_backbones
from fieldmark.config import load_config
from fieldmark.data.folders import Photo
from fieldmark.data.index import PhotoIndex
from fieldmark.runs.dataset import Dataset


@pytest.fixture
def small(monkeypatch):
    for name, value in (("LEARN", 24), ("JUDGE", 16), ("SIZE", 32), ("TRAIN_SIZE", 32), ("EPOCHS", 1)):
        monkeypatch.setattr(ingredients, name, value)


@pytest.fixture
def photos(tmp_path, write_striped):
    return write_striped(tmp_path / "photos", 24)


def test_photos_that_judge_do_not_learn_and_test_photos_take_no_part(small):
    names = [("test" if number < 30 else "train", "ab"[number % 2]) for number in range(100)]
    found = tuple(Photo(f"{number}.png", label, split, "") for number, (split, label) in enumerate(names))
    index = PhotoIndex("root", found, ("a", "b"), {})
    drawn = ingredients.draw_photos(Dataset(index, tuple(SimpleNamespace() for _ in found), ()))
    assert {photo.path for photo in drawn.index.photos} <= {f"{number}.png" for number in range(30, 100)}
    counts = Counter((photo.split, photo.label) for photo in drawn.index.photos)
    assert counts == {("train", "a"): 12, ("train", "b"): 12, ("val", "a"): 8, ("val", "b"): 8}


def test_the_contrastive_term_is_the_mean_negative_log_share_of_the_own_class():
    features = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    labels = np.arange(12) % 3
    contrast = ingredients.Contrast.of(features, labels)
    embedded = functional.normalize(
        torch.randn(2, contrast.memory.shape[1], generator=torch.Generator().manual_seed(0))
    )
    expected = 0.0
    for vector, row in zip(embedded, (4, 6), strict=True):
        shares = (contrast.memory @ vector / ingredients.TEMPERATURE).softmax(0)
        expected -= shares[labels == labels[row]].log().mean().item()
    assert contrast.loss(embedded, torch.tensor([4, 6])).item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(contrast.memory.norm(dim=1), torch.ones(12))


def test_every_gain_is_a_difference_of_scores_and_what_was_trained_is_read(small, photos, tmp_path, monkeypatch):
    def find_tiny(config):
        return find_backbones(load_config(None, ["model.name=test_resnet", "model.weights=random"]))

    monkeypatch.setattr(ingredients, "find_backbones", find_tiny)
    ways = (ingredients.PLAIN, ingredients.WHOLE, ingredients.FULL)
    trial = ingredients.Trial.of(photos, tmp_path / "features")
    for way in ways:
        trial.run(way)
    row = trial.measure()
    assert (row["learned"], row["judged"]) == (24, 16)
    answers = [trial.answers[way.name] for way in ways]
    assert all(each.shape == (16, 2) for each in answers)
    assert not np.allclose(answers[0], answers[1])
    assert not np.allclose(answers[0], answers[2])
    for question, before, after in ingredients.QUESTIONS:
        for metric, gain in row["gains"].get(question, {}).items():
            difference = row["scores"][after][metric] - row["scores"][before][metric]
            assert gain[0] == pytest.approx(difference)
            assert gain[1] <= gain[0] <= gain[2]
    monkeypatch.setattr(ingredients, "update", None)  # nothing is trained again
    again = ingredients.Trial.of(photos, tmp_path / "features")
    for way in ways:
        again.run(way)
    assert again.measure() == row
    page = ingredients.write_page([row], ["test_resnet"])
    assert "| contrastive term of weight 0.1 | not run |" in page
    assert f"| {ingredients.PLAIN.name} | {trial.seconds[ingredients.PLAIN.name]:.0f} |" in page
