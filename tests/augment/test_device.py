from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fieldmark.augment.device import augment_device
from fieldmark.augment.fast import augment_fast
from fieldmark.augment.sample import AugmentSpec, sample_params

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
PLAIN = AugmentSpec(
    size=160,
    crop="random_resized",
    crop_scale=(0.35, 1.0),
    crop_ratio=(0.75, 4 / 3),
    crop_fraction=0.875,
    crop_interpolation="bilinear",
    horizontal_flip=0.5,
    vertical_flip=0.5,
    degrees=0.0,
    translate=(0.0, 0.0),
    shear=0.0,
    affine_interpolation="bilinear",
    fill=(124, 116, 104),
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    policy="none",
    rand_ops=2,
    rand_magnitude=9,
    erase=0.0,
    erase_scale=(0.02, 0.15),
    erase_ratio=(0.3, 3.3),
    erase_value="random",
    mean=BYTES[0],
    std=BYTES[1],
)
AFFINE = replace(PLAIN, degrees=20.0, translate=(0.1, 0.1), shear=5.0)
EVERYTHING = replace(AFFINE, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, erase=0.5)


@pytest.fixture(scope="module")
def photos(birds, scenes):
    return [*birds[:4], *(scene[100:340, 50:380] for scene in scenes)]


def both(photos, spec, enlarged=1, compiled=False):
    """Pictures of this executor and of the fast one; photos stand in slots with rubbish around them."""
    sizes = np.array([(photo.shape[1], photo.shape[0]) for photo in photos])
    params = sample_params(spec, sizes * enlarged, seed=0, epoch=0, numbers=np.arange(len(photos)))
    slots = torch.full((len(photos), 3, 350, 360), 255, dtype=torch.uint8)
    for slot, photo in zip(slots, photos, strict=True):
        slot[:, : photo.shape[0], : photo.shape[1]] = torch.from_numpy(photo.transpose(2, 0, 1).copy())
    device = augment_device(slots, sizes, sizes * enlarged, params, spec, compiled=compiled)
    assert device.dtype == torch.float32
    return device.numpy(), augment_fast(photos, sizes * enlarged, params, spec)


def least_psnr(psnr, ours, theirs):
    return min(psnr(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        (AFFINE, 40),
        (EVERYTHING, 40),
        (replace(AFFINE, crop="squash"), 38),
        (replace(AFFINE, crop="zoom", crop_scale=(0.8, 2.0)), 33),
        (replace(AFFINE, policy="trivial"), 36),
    ],
    ids=["affine", "everything", "squash", "zoom", "trivial"],
)
def test_the_device_shows_the_cpus_pictures(photos, psnr, spec, least):
    ours, theirs = both(photos, spec)
    average = np.mean([psnr(a, b) for a, b in zip(ours, theirs, strict=True)])
    assert average > least


def test_without_rescaling_the_two_agree_closely(photos, psnr):
    # One look per pixel in both: no difference but rounding is left.
    close = [photo[:150, :150] for photo in photos]
    assert least_psnr(psnr, *both(close, AFFINE)) > 60


@pytest.mark.parametrize("channel", ["brightness", "contrast", "saturation", "hue"])
def test_color_agrees_closely(photos, psnr, channel):
    close = [photo[:150, :150] for photo in photos]
    ours, theirs = both(close, replace(PLAIN, **{channel: 0.3}))
    assert np.abs(ours - theirs).mean() < 0.3
    assert np.abs(ours - both(close, PLAIN)[0]).mean() > 2


@pytest.mark.parametrize("value", ["random", "zero"])
def test_erasing_is_the_same_rectangle_and_noise(photos, value):
    ours, theirs = both(photos, replace(PLAIN, erase=1.0, erase_value=value, mean=MEAN, std=STD))
    spec = replace(PLAIN, erase=1.0)
    sizes = [(photo.shape[1], photo.shape[0]) for photo in photos]
    params = sample_params(spec, sizes, seed=0, epoch=0, numbers=np.arange(len(photos)))
    for row, (x, y, w, h) in enumerate(params.erase):
        assert w > 0
        assert np.array_equal(ours[row][:, y : y + h, x : x + w], theirs[row][:, y : y + h, x : x + w])


def test_parameters_of_larger_sources_fit_smaller_photos(photos, psnr):
    assert np.mean([psnr(a, b) for a, b in zip(*both(photos, AFFINE, enlarged=3), strict=True)]) > 40


@pytest.mark.slow
def test_compiled_gives_the_same_pictures(photos, psnr):
    plain, _ = both(photos, EVERYTHING)
    compiled, _ = both(photos, EVERYTHING, compiled=True)
    assert least_psnr(psnr, compiled, plain) > 70
