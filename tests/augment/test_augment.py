from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from fieldmark.augment.reference import EvalSpec, augment_reference, erase_noise, eval_reference
from fieldmark.augment.sample import AugmentSpec, BatchParams, noise_bank, sample_params
from fieldmark.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPORT = AugmentSpec(
    size=224,
    crop="random_resized",
    crop_scale=(0.6, 1.2),
    crop_ratio=(0.75, 1.33),
    crop_fraction=0.875,
    crop_interpolation="bicubic",
    horizontal_flip=0.5,
    vertical_flip=0.5,
    degrees=20.0,
    translate=(0.1, 0.1),
    shear=5.0,
    affine_interpolation="nearest",
    fill=(0, 0, 0),
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.1,
    policy="none",
    rand_ops=2,
    rand_magnitude=9,
    erase=0.3,
    erase_scale=(0.02, 0.15),
    erase_ratio=(0.3, 3.3),
    erase_value="random",
    mean=MEAN,
    std=STD,
)
PLAIN = replace(
    REPORT,
    crop="squash",
    horizontal_flip=0.0,
    vertical_flip=0.0,
    degrees=0.0,
    translate=(0.0, 0.0),
    shear=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    erase=0.0,
)


def params_for(photos: Sequence[Any], spec: AugmentSpec, seed: int = 0) -> BatchParams:
    sizes = [(photo.shape[1], photo.shape[0]) for photo in photos]
    return sample_params(spec, sizes, seed=seed, epoch=0, numbers=np.arange(len(photos)))


def told(kind: type, method: str, answer: Any, **arguments: Any) -> Any:
    """A transform of torchvision that draws `answer` instead of random numbers."""
    return type(kind.__name__, (kind,), {method: staticmethod(lambda *_, **__: answer)})(**arguments)


def report_pipeline(params: BatchParams, row: int) -> transforms.Compose:
    """The competition's pipeline in torchvision's own transforms, told what to draw."""
    x, y, width, height = (int(pixels) for pixels in params.box[row])
    shift = tuple(int(pixels) for pixels in params.shift[row])
    factors = params.factors[row].tolist()
    ex, ey, ew, eh = params.erase[row].tolist()
    noise = torch.from_numpy(erase_noise(int(params.noise_offset[row]), ex, ey, ew, eh, 224))
    return transforms.Compose(
        [
            told(transforms.RandomResizedCrop, "get_params", (y, x, height, width), size=224),
            transforms.RandomHorizontalFlip(float(params.flip_x[row])),
            transforms.RandomVerticalFlip(float(params.flip_y[row])),
            told(
                transforms.RandomAffine,
                "get_params",
                (float(params.angle[row]), shift, 1.0, (float(params.shear[row]), 0.0)),
                degrees=20,
            ),
            told(transforms.ColorJitter, "get_params", (torch.from_numpy(params.color_order[row]), *factors)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            told(transforms.RandomErasing, "get_params", (ey, ex, eh, ew, noise), p=1.0 if ew else 0.0),
        ]
    )


def test_the_competition_recipe_is_executed_exactly_as_by_torchvision(scenes, birds):
    photos = (scenes + birds) * 3
    params = params_for(photos, REPORT)
    assert params.erase[:, 2].any()
    for row, photo in enumerate(photos):
        theirs = report_pipeline(params, row)(Image.fromarray(photo))
        ours = augment_reference(photo, params, row, REPORT)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_crop_outside_the_photo_shows_the_fill(scenes):
    photo = scenes[0]
    spec = replace(
        PLAIN,
        crop="zoom",
        crop_scale=(2.0, 2.0),
        crop_ratio=(1.0, 1.0),
        fill=(10, 20, 30),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    params = params_for([photo], spec)
    x, y, w, h = params.box[0].astype(int)
    canvas = np.full((h, w, 3), (10, 20, 30), dtype=np.uint8)
    canvas[-y : -y + photo.shape[0], max(-x, 0) : -x + photo.shape[1]] = photo[:, max(x, 0) : x + w]
    theirs = functional.resized_crop(Image.fromarray(canvas), 0, 0, h, w, [224, 224])
    ours = augment_reference(photo, params, 0, spec)
    assert torch.equal(ours, functional.to_tensor(theirs))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_weights_crop_is_the_evaluation_picture(scenes, psnr, interpolation):
    scenes = [*scenes, scenes[0].transpose(1, 0, 2)]
    spec = replace(PLAIN, crop="weights", crop_interpolation=interpolation)
    params = params_for(scenes, spec)
    evaluation = EvalSpec("weights", 224, 0.875, interpolation, MEAN, STD)
    for row, photo in enumerate(scenes):
        ours = augment_reference(photo, params, row, spec)
        assert psnr(ours, eval_reference(photo, evaluation), peak=1 / 0.226) > 50


def test_erasing_with_zero_is_the_mean_color(scenes):
    spec = replace(PLAIN, erase=1.0, erase_value="zero")
    params = params_for(scenes[:1], spec)
    x, y, w, h = params.erase[0]
    ours = augment_reference(scenes[0], params, 0, spec)
    assert not ours[:, y : y + h, x : x + w].any()
    plain = augment_reference(scenes[0], params_for(scenes[:1], PLAIN), 0, PLAIN)
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[y : y + h, x : x + w] = False
    assert torch.equal(ours[:, outside], plain[:, outside])


def test_erase_noise_reads_the_bank_at_its_address():
    noise = erase_noise(len(noise_bank()) - 10, 3, 5, 4, 6, 32)
    assert noise.shape == (3, 6, 4)
    assert noise[2, 1, 3] == noise_bank()[(len(noise_bank()) - 10 + (2 * 32 + 6) * 32 + 6) % len(noise_bank())]


@pytest.mark.parametrize(
    ("size", "crop_fraction", "interpolation"),
    [(224, 0.875, "bicubic"), (224, 0.9, "bilinear"), (288, 1.0, "bicubic"), (160, 0.95, "bicubic")],
)
def test_evaluation_is_timms_own_transform(scenes, birds, size, crop_fraction, interpolation):
    theirs = timm.data.create_transform(
        input_size=size, is_training=False, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_fraction
    )
    spec = EvalSpec("weights", size, crop_fraction, interpolation, MEAN, STD)
    for photo in [*scenes, *birds]:
        assert torch.equal(eval_reference(photo, spec), theirs(Image.fromarray(photo)))


def test_squash_is_the_competitions_evaluation(scenes, birds):
    theirs = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    spec = EvalSpec("squash", 224, 0.875, "bilinear", MEAN, STD)
    for photo in [*scenes, *birds]:
        assert torch.equal(eval_reference(photo, spec), theirs(Image.fromarray(photo)))


@pytest.mark.parametrize("photo", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_photo_is_refused(photo):
    with pytest.raises(DataError, match=r"a photo is \(H, W, 3\) uint8; got"):
        eval_reference(photo, EvalSpec("squash", 8, 1.0, "bilinear", MEAN, STD))
