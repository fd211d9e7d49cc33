"""Training from Python in one call, and scikit-learn's interface."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator

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


def test_epochs_without_a_recipe_are_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"train.epochs goes with a recipe"):
        fieldmark.fit(photos, out=tmp_path / "run", epochs=5)
    assert not (tmp_path / "run").exists()


def test_a_pickle_and_a_copy_hold_the_run(photos):
    files = sorted(photos.rglob("*.png"))
    model = fieldmark.Classifier(recipe="laptop", settings=TINY).fit(files, [file.parent.name for file in files])
    expected, place = model.predict_proba(files[:3]), model.run_.path
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    np.testing.assert_array_equal(model.predict_proba(files[:3]), expected)  # itself too
    del model
    gc.collect()
    assert not place.exists()
    for other in others:
        np.testing.assert_array_equal(other.predict_proba(files[:3]), expected)


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


# Those of scikit-learn's checks that do not fit on a table of random numbers.
WITHOUT_A_TABLE = {
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_estimators_unfitted",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_classifiers_regression_target",
    "check_estimators_partial_fit_n_features",
    "check_non_transformer_estimators_n_iter",
    "check_decision_proba_consistency",
}


def test_the_checks_of_scikit_learn_that_need_no_table_of_numbers_pass():
    found = check_estimator(fieldmark.Classifier(minutes=1), on_skip=None, on_fail=None)
    assert {one["check_name"] for one in found if one["status"] == "passed"} >= WITHOUT_A_TABLE


class Rendered(fieldmark.Classifier):
    """A classifier of tables, for scikit-learn's checks: each row becomes a photo of stripes."""

    def fit(self, X, y):  # noqa: N803
        return super().fit(render(X), y)

    def predict_proba(self, X):  # noqa: N803
        return super().predict_proba(render(X))


def render(table):
    rows = np.asarray(table, float)
    folder = Path(tempfile.gettempdir())
    files = [folder / f"{hashlib.sha256(row.tobytes()).hexdigest()[:16]}.png" for row in rows]
    for file, row in zip(files, rows, strict=True):
        stripes = (128 + 30 * np.resize(row, 32)).clip(0, 255).astype(np.uint8)
        Image.fromarray(np.tile(stripes[None, :, None], (32, 1, 3))).save(file)
    return files


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_dict_unchanged,
        estimator_checks.check_estimators_overwrite_params,
        estimator_checks.check_estimators_fit_returns_self,
        estimator_checks.check_fit_check_is_fitted,
        estimator_checks.check_fit_idempotent,
        estimator_checks.check_methods_sample_order_invariance,
        estimator_checks.check_methods_subset_invariance,
        estimator_checks.check_classifiers_classes,
        estimator_checks.check_estimators_pickle,
    ],
    ids=lambda check: check.__name__,
)
def test_the_checks_of_scikit_learn_that_fit_pass_on_photos_of_their_tables(check, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = {**TINY, "train": {**TINY["train"], "precision": "32-true"}}
    check("Rendered", Rendered(recipe="laptop", settings=settings))
