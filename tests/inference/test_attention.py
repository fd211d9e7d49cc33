"""Attention maps point at what decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fieldmark.inference.triage import AttentionMaps
from fieldmark.models.classifier import Classifier, create_classifier


class Brightness(nn.Module):
    """A map of 8 × 8 cells and two features: brightness of the upper left part, and of the lower right."""

    num_features = 1

    def forward_features(self, images):
        return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8)

    def forward_head(self, cells):
        return torch.stack([cells[:, 0, :4, :4].mean((1, 2)), cells[:, 0, 4:, 4:].mean((1, 2))], dim=1)


def _classifier(name, **options):
    plain = {"head": "linear", "head_hidden": 1, "head_dropout": 0, "feature_dropout": 0, "drop_path": 0}
    return create_classifier(name, num_classes=3, **plain, stride_in_1x1=False, **options).eval()


def test_the_map_is_bright_where_the_evidence_is():
    images = np.zeros((2, 3, 64, 64), np.float32)
    images[:, :, 8:24, 8:24] = 1
    model = Classifier(Brightness(), nn.Identity(), name="", feature_dropout=0.0, pool=None).eval()
    maps = AttentionMaps(model, size=64)(images, [0, 0])
    assert maps.shape == (2, 28, 28)
    assert (maps.min(), maps.max()) == (0, 1)
    rows, columns = np.unravel_index(maps[0].argmax(), maps[0].shape)
    assert rows < 14
    assert columns < 14
    assert maps[0, 14:, 14:].max() < 0.1


@pytest.mark.parametrize("pool", ["average", "covariance"])
def test_a_map_leaves_the_model_as_it_was_and_is_of_its_own_answer(pool):
    model = _classifier("test_resnet", pool=pool)
    maps, images = AttentionMaps(model, size=64), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.classify_map(model.feature_map(images)), model(images))
    assert maps(images.numpy(), [1]).max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "side", "has_map"),
    [
        ("test_vit", 160, False),
        ("test_convnext", 160, True),
        ("test_efficientnet", 160, True),
        ("mobilenetv3_small_050", 64, True),
        ("swin_tiny_patch4_window7_224", 224, False),  # its channels are last, and no places
    ],
)
def test_only_a_model_whose_features_are_a_map_of_places_has_one(name, side, has_map):
    maps = AttentionMaps(_classifier(name), size=side)
    assert maps.is_available == has_map
    if has_map:
        assert np.isfinite(maps(np.ones((1, 3, side, side), np.float32), [0])).all()
