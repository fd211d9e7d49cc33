"""Heads on frozen features: the minimum of their loss, and honest out-of-fold probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fieldmark.budget.heads import fit_head, refit_head
from fieldmark.training.metrics import log_loss


def make_features(num_photos: int, width: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(num_classes, width))
    labels = (np.arange(num_photos) % num_classes).astype(np.int64)
    noise = rng.normal(size=(num_photos, width)) * rng.uniform(0.1, 5, width)
    return (0.3 * centers[labels] + noise + 3 * rng.normal(size=width)).astype(np.float32), labels


@pytest.mark.parametrize(("num_photos", "width"), [(300, 50), (60, 200)], ids=["more photos", "more features"])
@pytest.mark.parametrize("l2", [0.1, 0.003])
def test_a_head_is_the_minimum_that_scikit_learn_finds(num_photos, width, l2):
    from sklearn.linear_model import LogisticRegression

    features, labels = make_features(num_photos, width, 4)
    head = fit_head(features, labels, np.arange(num_photos) // 4 % 5, num_classes=4, strengths=(l2,))

    scaled = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=1 / (l2 * num_photos), max_iter=10_000, tol=1e-8).fit(scaled, labels)
    with torch.inference_mode():
        ours = head.as_linear()(torch.from_numpy(features)).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(scaled), atol=2e-3)


def test_a_refitted_head_is_the_one_that_is_fitted_to_all_photos_at_once():
    features, labels = make_features(300, 50, 4)
    folds = np.arange(300) // 4 % 5
    some = fit_head(features[:200], labels[:200], folds[:200], num_classes=4, strengths=(0.1,))
    whole = fit_head(features, labels, folds, num_classes=4, strengths=(0.1,))
    refitted = refit_head(features, labels, some)
    torch.testing.assert_close(refitted.weight, whole.weight, atol=2e-3, rtol=0.01)
    torch.testing.assert_close(refitted.bias, whole.bias, atol=2e-3, rtol=0.01)


def test_out_of_fold_probabilities_are_of_heads_that_never_saw_the_photo():
    features, labels = make_features(120, 300, 3)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=features.shape).astype(np.float32)
    head = fit_head(noise, labels, np.arange(120) // 3 % 5, num_classes=3)

    # Noise can be learned by heart, but not predicted: seen photos would be right, held-out ones are at chance.
    assert log_loss(head.out_of_fold, labels) > 0.9 * np.log(3)
    np.testing.assert_allclose(head.out_of_fold.sum(1), 1, atol=1e-5)


def test_noise_is_regularized_more_than_signal():
    features, labels = make_features(120, 60, 3)
    folds = np.arange(120) // 3 % 5
    noise = np.random.default_rng(2).normal(size=features.shape).astype(np.float32)
    signal = np.eye(3, dtype=np.float32)[labels] + 0.3 * noise[:, :3]
    assert fit_head(noise, labels, folds, num_classes=3).l2 > fit_head(signal, labels, folds, num_classes=3).l2


def test_a_constant_feature_changes_nothing():
    features, labels = make_features(90, 10, 3)
    folds = np.arange(90) // 3 % 5
    wider = np.concatenate([features, np.full((90, 1), 7, np.float32)], axis=1)
    plain, padded = (fit_head(values, labels, folds, num_classes=3) for values in (features, wider))
    np.testing.assert_allclose(plain.out_of_fold, padded.out_of_fold, atol=1e-3)


def test_features_on_which_lapack_fails_in_32_bits_are_rotated_in_64(monkeypatch):
    features, labels = make_features(120, 300, 3)
    folds = np.arange(120) // 3 % 5
    whole = fit_head(features, labels, folds, num_classes=3, strengths=(0.1,))
    real = torch.linalg.eigh

    def fail_in_32_bits(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail_in_32_bits)
    head = fit_head(features, labels, folds, num_classes=3, strengths=(0.1,))
    torch.testing.assert_close(head.weight, whole.weight, atol=2e-3, rtol=0.01)
