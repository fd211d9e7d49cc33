"""Training from Python in one call, and scikit-learn's interface."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import fieldmark
from fieldmark.errors import ConfigError, DataError, PhotoError

TINY = {
    "model": {"name": "test_resnet", "weights": "random"},
    "augment": {"size": 32},
    "eval": {"size": 32},
    "train": {"epochs": 1, "threads": 1, "device": "cpu"},
    "probe": {"epochs": 3},
    "loader": {"workers": 0},
    "schedule": {"warmup_epochs": 0},
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes that differ in brightness, twelve photos each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 210)):
        for number in range(12):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.normal(level, 10, (40, 40, 3)).clip(0, 255).astype(np.uint8)).save(file)
    return tmp_path / "photos"


def test_fit_trains_at_once_and_returns_the_finished_run(photos, tmp_path):
    run = fieldmark.fit(photos, recipe="laptop", out=tmp_path / "run", **TINY)
    assert run.summary["status"] == "finished"
    assert run.classes == ("dark", "light")
    assert run.config.train.epochs == 1


def test_a_setting_that_is_none_is_answered_with_the_right_one(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"no such setting.*epochs"):
        fieldmark.fit(photos, recipe="laptop", out=tmp_path / "run", train={"epocks": 1})
    assert not (tmp_path / "run").exists()


def test_a_classifier_answers_with_the_labels_it_was_given(photos):
    files = sorted(photos.rglob("*.png"))
    labels = np.array([7 if file.parent.name == "dark" else 12 for file in files])
    model = fieldmark.Classifier(recipe="laptop", settings=TINY)
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        model.predict(files)
    assert model.fit(files, labels) is model
    assert model.classes_.tolist() == [7, 12]
    probabilities = model.predict_proba(files)
    assert probabilities.shape == (24, 2)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (model.predict(files) == model.classes_[probabilities.argmax(1)]).all()
    assert model.score(files, labels) == (model.predict(files) == labels).mean()
    files[3].write_bytes(b"no photo")
    with pytest.raises(PhotoError, match=files[3].name):
        model.predict(files)


@pytest.mark.parametrize(("files", "labels", "words"), [
    (["a.png", "b.png"], ["a"], "one label for each photo"),
    (["a.png", "b.png"], ["a", "a"], "at least two classes"),
    ([], [], "no photos"),
])  # fmt: skip
def test_lists_that_cannot_be_learned_from_are_refused(files, labels, words):
    with pytest.raises(DataError, match=words):
        fieldmark.Classifier(recipe="laptop").fit(files, labels)
