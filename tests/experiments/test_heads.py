"""The table of what each ingredient earns says what heads did out of fold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import heads
from fieldmark.budget.candidates import find_backbones
from fieldmark.config import load_config


@pytest.fixture
def photos(tmp_path, write_striped):
    return write_striped(tmp_path / "photos", 12)


def test_each_question_has_a_row_and_the_gain_is_the_difference_of_its_accuracies(photos, tmp_path, monkeypatch):
    def find_tiny(config):
        tiny = load_config(None, [f'data.path="{photos.as_posix()}"', "model.name=test_resnet", "model.weights=random",
                                  f"model.pool={config.model.pool}"])  # fmt: skip
        return find_backbones(tiny)

    monkeypatch.setattr(heads, "find_backbones", find_tiny)
    trial = heads.Trial(photos, tmp_path / "features")
    rows = heads.compare(trial, ["test_resnet"])
    assert len(rows) == 5  # three questions are of several backbones
    assert {(row["data"], row["photos"]) for row in rows} == {("photos", 24)}
    for row in rows:
        assert row["gain"] == pytest.approx(row["after"] - row["before"])
        assert row["low"] <= row["gain"] <= row["high"]
    plain, mirrored = (trial.features(kind, "test_resnet") for kind in (heads.POOLED, heads.MIRRORED))
    assert plain.shape == mirrored.shape
    assert not np.allclose(plain, mirrored)
    page = heads.write_page(rows, ["test_resnet"])
    assert page.count("| photos | 24 |") == 5


def test_what_unlabeled_photos_teach_is_judged_on_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = (rng.normal(size=(60, 4)) + 3 * labels[:, None]).astype(np.float32)
    trial = heads.Trial(tmp_path, tmp_path)
    index = SimpleNamespace(photos=[SimpleNamespace(group="")] * 60, classes=("a", "b"))
    for name, value in (("labels", labels), ("numbers", np.arange(60)), ("dataset", SimpleNamespace(index=index))):
        monkeypatch.setitem(trial.__dict__, name, value)
    wrong = np.eye(2, dtype=np.float32)[1 - labels]
    right = np.eye(2, dtype=np.float32)[labels]
    scores = [(heads.learn_unlabeled(trial, features, each).argmax(1) == labels).mean() for each in (right, wrong)]
    assert scores[0] > 0.9
    # A teacher that is always wrong does harm, but its answer about a photo is never that photo's own.
    assert 0.1 < scores[1] <= scores[0]
