from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide, autoaugment

from fieldmark.augment.sample import (
    MOVING,
    OPERATIONS,
    apply_operation,
    operation_matrix,
    sample_policy,
    uniforms,
)

FILL = (10, 200, 30)


def draw(policy, count=4000, size=224, num_ops=2, magnitude=9):
    chances = uniforms(0, 0, np.arange(count), stream=4, count=3 * {"none": 0, "trivial": 1, "rand": num_ops}[policy])
    return sample_policy(policy, chances, magnitude=magnitude, size=size)


def test_trivial_augment_draws_torchvisions_space():
    space = TrivialAugmentWide()._augmentation_space(31)
    assert tuple(space) == OPERATIONS
    ops, magnitudes = draw("trivial", count=20_000)
    assert ops.shape == (20_000, 1)
    assert stats.chisquare(np.bincount(ops[:, 0], minlength=14)).pvalue > 0.01
    for number, (values, signed) in enumerate(space.values()):
        expected = np.unique(np.concatenate([values.numpy().ravel(), -values.numpy().ravel() if signed else []]))
        assert np.unique(magnitudes[ops == number]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [224, 96])
def test_rand_augment_draws_torchvisions_space(size):
    space = RandAugment()._augmentation_space(31, (size, size))
    ops, magnitudes = draw("rand", size=size, num_ops=3, magnitude=11)
    assert ops.shape == (4000, 3)
    for number, (values, signed) in enumerate(space.values()):
        value = float(values[11] if values.ndim else values)
        expected = sorted({value, -value}) if signed else [value]
        assert np.unique(magnitudes[ops == number]) == pytest.approx(expected, abs=1e-4)
        if signed:
            assert np.mean(magnitudes[ops == number] > 0) == pytest.approx(0.5, abs=0.06)


def test_no_policy_draws_nothing():
    ops, magnitudes = draw("none")
    assert ops.shape == magnitudes.shape == (4000, 0)


@pytest.mark.parametrize("interpolation", [InterpolationMode.NEAREST, InterpolationMode.BILINEAR])
def test_each_operation_is_torchvisions(scenes, interpolation):
    image = Image.fromarray(scenes[0]).resize((96, 96))
    ops, magnitudes = draw("trivial", count=300)
    for op, magnitude in set(zip(ops[:, 0].tolist(), magnitudes[:, 0].tolist(), strict=True)):
        ours = apply_operation(image, op, magnitude, interpolation=interpolation, fill=FILL)
        theirs = autoaugment._apply_op(image, OPERATIONS[op], magnitude, interpolation, list(FILL))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), OPERATIONS[op]


@pytest.mark.parametrize("op", MOVING)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_matrix_is_what_the_operation_does(scenes, op, sign):
    size, magnitude = 96, sign * {"Rotate": 33.0, "TranslateX": 17.2, "TranslateY": 17.2}.get(OPERATIONS[op], 0.4)
    image = Image.fromarray(scenes[0]).resize((size, size))
    theirs = apply_operation(image, op, magnitude, interpolation=InterpolationMode.NEAREST, fill=FILL)
    matrix = operation_matrix(op, magnitude, size)
    rows, columns = np.mgrid[0:size, 0:size] + 0.5
    x, y = np.einsum("ij,jhw->ihw", matrix[:, :2], np.stack([columns, rows])) + matrix[:, 2, None, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    source = np.asarray(image)[np.clip(y, 0, size - 1).astype(int), np.clip(x, 0, size - 1).astype(int)]
    ours = np.where(inside[..., None], source, FILL)
    assert np.mean(np.any(ours != np.asarray(theirs), axis=2)) < 0.01


def test_colors_move_nothing():
    assert operation_matrix(OPERATIONS.index("Solarize"), 3.0, 8).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_operations_take_tensors_too():
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    op = OPERATIONS.index("Posterize")
    changed = apply_operation(image, op, 4.0, interpolation=InterpolationMode.NEAREST, fill=FILL)
    assert torch.equal(changed, image & 0xF0)
