"""Covariance pooling is what it says: means, and the root of a covariance, of a map behind a ReLU."""

from __future__ import annotations

import pytest
import torch

from fieldmark.errors import ConfigError
from fieldmark.models.classifier import CovariancePool, create_classifier

SETTINGS = {
    "num_classes": 3, "head": "linear", "head_hidden": 8, "head_dropout": 0.0, "feature_dropout": 0.0, "drop_path": 0.0,
    "stride_in_1x1": False,
}  # fmt: skip


def upper_to_square(values, side):
    square = torch.zeros(len(values), side, side)
    rows, columns = torch.triu_indices(side, side)
    square[:, rows, columns] = values
    square[:, columns, rows] = values
    return square


def test_the_second_part_squared_is_the_covariance_of_the_places():
    torch.manual_seed(0)
    maps = torch.rand(5, 4, 9, 9) * torch.tensor([1.0, 1.5, 2.0, 3.0])[:, None, None] + 1
    maps[:, 1] += maps[:, 0] / 2  # two channels that go together
    pooled = CovariancePool(4)(maps)
    assert pooled.shape == (5, 4 + 10)
    root = upper_to_square(pooled[:, 4:], 4)
    expected = torch.stack([torch.cov(photo.flatten(1), correction=0) for photo in maps])
    assert torch.allclose(root @ root, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_the_first_part_lies_between_the_mean_and_the_maximum_and_is_the_value_of_a_flat_map():
    torch.manual_seed(0)
    maps = torch.rand(2, 6, 5, 7)
    first = CovariancePool(6)(maps)[:, :6]
    assert (first > maps.mean((2, 3))).all()
    assert (first < maps.amax((2, 3))).all()
    flat = CovariancePool(6)(torch.full((1, 6, 5, 7), 2.5))
    assert torch.allclose(flat[:, :6], torch.full((1, 6), 2.5))


@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, 1e3])
def test_a_photo_of_nothing_has_finite_features_and_gradients(value):
    torch.manual_seed(0)
    maps = (torch.full((2, 40, 3, 3), value) + 1e-7 * torch.rand(2, 40, 3, 3)).requires_grad_()
    pooled = CovariancePool(40)(maps)
    pooled.square().sum().backward()
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(maps.grad).all()


def test_directions_are_those_in_which_places_vary_most_and_the_same_every_time():
    torch.manual_seed(0)
    maps = torch.rand(8, 50, 4, 4)
    maps[:, [3, 17]] *= 10
    first, second = CovariancePool(50), CovariancePool(50)
    first.fit(maps)
    second.fit(maps)
    assert torch.equal(first.projection, second.projection)
    assert torch.allclose(first.projection.T @ first.projection, torch.eye(32), atol=1e-5)
    assert first.projection[[3, 17], -2:].square().sum() > 1.9


def test_it_computes_in_32_bit_whatever_the_network_computes_in():
    torch.manual_seed(0)
    maps = torch.rand(2, 40, 4, 4)
    pool = CovariancePool(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pool(maps)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, pool(maps))


def test_a_classifier_with_it_learns_through_it_and_keeps_its_directions_with_its_weights():
    torch.manual_seed(0)
    model = create_classifier("test_resnet", pool="covariance", **SETTINGS)
    assert model.pool is not None
    model.pool.fit(model.feature_map(torch.rand(4, 3, 64, 64)))
    assert model.features(torch.rand(2, 3, 64, 64)).shape == (2, model.head.in_features)
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "pool.projection" in model.state_dict()
    assert not any("pool" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto", "mobilenetv3_small_050"])
def test_a_backbone_without_a_map_behind_a_relu_is_refused(name):
    with pytest.raises(ConfigError, match=r"Set model\.pool=average"):
        create_classifier(name, pool="covariance", **SETTINGS)
