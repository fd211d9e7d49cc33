"""A fused model is the same function."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from fieldmark.models.weights import fuse_batch_norm


def make_model(name, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_efficientnet.r160_in1k", "tf_efficientnet_lite0"])
def test_a_fused_model_gives_the_same_logits_and_no_norm_is_left(name):
    model = make_model(name)
    images = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    fused, count = fuse_batch_norm(model)
    with torch.no_grad():
        expected, got = model(images), fused(images)
    assert torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert type(fused) is type(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_convolution_that_someone_else_reads_is_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images):
            seen = self.conv(images)
            return self.norm(seen) + seen

    assert fuse_batch_norm(Shared().eval())[1] == 0


def test_a_model_that_cannot_be_traced_is_copied_as_it_is():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(self.conv(images)) if images.sum() > 0 else images

    model = Branching().eval()
    images = torch.rand(1, 3, 4, 4)
    fused, count = fuse_batch_norm(model)
    assert count == 0
    assert torch.equal(fused(images), model(images))
