"""Attention maps point at what decides."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fieldmark.inference.triage import AttentionMaps, last_spatial_layer


class Corner(nn.Module):
    """Class 0 is brightness of the upper left part, class 1 of the lower right; a map of 8 × 8 decides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        self.conv.weight.data.fill_(1 / 3)

    def forward(self, images):
        cells = nn.functional.adaptive_avg_pool2d(self.conv(images), 8)
        return torch.stack([cells[:, 0, :4, :4].mean((1, 2)), cells[:, 0, 4:, 4:].mean((1, 2))], dim=1)


def test_the_map_is_bright_where_the_evidence_is():
    images = np.zeros((2, 3, 64, 64), np.float32)
    images[:, :, 8:24, 8:24] = 1
    maps = AttentionMaps(Corner(), size=64)(images, [0, 0])
    assert maps.shape == (2, 28, 28)
    assert maps.min() >= 0
    assert maps.max() <= 1
    rows, columns = np.unravel_index(maps[0].argmax(), maps[0].shape)
    assert rows < 14
    assert columns < 14
    assert maps[0, 14:, 14:].max() < 0.1


def test_the_model_that_predicts_keeps_no_hooks():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    maps = AttentionMaps(model, size=64)
    assert maps.is_available
    maps(np.zeros((1, 3, 64, 64), np.float32), [1])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_map_says_so():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).eval()
    model(torch.zeros(1, 3, 224, 224))
    assert last_spatial_layer(model, size=224) is None
    assert not AttentionMaps(model, size=224).is_available


@pytest.mark.parametrize(
    ("name", "has_map"), [("test_vit", False), ("test_convnext", True), ("test_efficientnet", True)]
)
def test_only_a_model_whose_features_are_a_map_of_places_has_one(name, has_map):
    """A transformer's first convolution would show edges, not what decided."""
    model = timm.create_model(name, num_classes=3).eval()
    side = model.pretrained_cfg["input_size"][-1]
    assert AttentionMaps(model, size=side).is_available == has_map


def test_channels_last_are_not_taken_for_places():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, depths=(1, 1, 1, 1)).eval()
    assert model.forward_features(torch.zeros(1, 3, 224, 224)).shape[1:3] == (7, 7)
    assert last_spatial_layer(model, size=224) is None
