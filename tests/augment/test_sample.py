from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms

from fieldmark.augment.sample import AugmentSpec, BatchParams, crop_fallback_rate, sample_params

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
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
DRAWS = 3000


def draw(spec: AugmentSpec, width: int = 500, height: int = 375, count: int = DRAWS, seed: int = 1) -> BatchParams:
    return sample_params(spec, [(width, height)] * count, seed=seed, epoch=0, numbers=np.arange(count))


def same_law(ours, theirs) -> bool:
    return stats.ks_2samp(ours, theirs).pvalue > 0.01


@pytest.fixture(autouse=True)
def fixed_torch_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (500, 200), (64, 64)])
def test_crops_follow_random_resized_crop(width, height):
    photo = torch.empty(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(photo, [0.6, 1.2], [0.75, 1.33]) for _ in range(DRAWS)])
    ours = draw(REPORT, width, height).box
    assert np.array_equal(ours, np.rint(ours))
    for column, place in enumerate((1, 0, 3, 2)):
        assert same_law(ours[:, column], theirs[:, place])


def test_the_fallback_is_torchvisions_center_crop():
    impossible = replace(REPORT, crop_scale=(1.5, 2.0))
    for width, height in [(500, 375), (501, 200), (200, 501), (64, 64)]:
        params = draw(impossible, width, height, count=2)
        top, left, h, w = transforms.RandomResizedCrop.get_params(
            torch.empty(3, height, width), [1.5, 2.0], [0.75, 1.33]
        )
        assert params.box.tolist() == [[left, top, w, h]] * 2


@pytest.mark.parametrize(
    ("width", "height", "rate", "slack"),
    [(1000, 1000, 0.003, 0.001), (1200, 900, 0.04, 0.006), (1200, 800, 0.18, 0.01), (1920, 1080, 0.62, 0.01)],
)
def test_the_fallback_rate_of_the_competition_is_as_measured(width, height, rate, slack):
    assert crop_fallback_rate(REPORT, [(width, height)], draws=20_000) == pytest.approx(rate, abs=slack)


def test_the_fallback_rate_is_the_mean_over_photos_and_zero_for_other_crops():
    square, wide = [(1000, 1000)], [(1920, 1080)]
    apart = [crop_fallback_rate(REPORT, sizes, draws=5000) for sizes in (square, wide)]
    assert crop_fallback_rate(REPORT, square + wide, draws=5000) == pytest.approx(np.mean(apart), abs=0.01)
    assert crop_fallback_rate(replace(REPORT, crop="zoom"), wide, draws=10) == 0.0
    assert crop_fallback_rate(REPORT, np.zeros((0, 2)), draws=10) == 0.0


def test_zoom_really_zooms_out():
    params = draw(replace(REPORT, crop="zoom", crop_scale=(1.2, 1.2), crop_ratio=(1.0, 1.0)), 400, 400)
    x, y, w, h = params.box.T
    assert np.all(w * h >= 1.19 * 400 * 400)
    assert np.all((x <= 0) & (x + w >= 400))
    assert np.all((y <= 0) & (y + h >= 400))
    assert len(set(x.tolist())) > 20


def test_zoom_without_zooming_out_is_random_resized_crop():
    inside = replace(REPORT, crop_scale=(0.3, 0.5))
    assert np.array_equal(draw(replace(inside, crop="zoom")).box, draw(inside).box)


def test_fixed_crops():
    squash = draw(replace(REPORT, crop="squash"), count=2)
    assert squash.box.tolist() == [[0, 0, 500, 375]] * 2
    weights = draw(replace(REPORT, crop="weights"), count=1)
    # 500×375 becomes 341×256; the center 224 starts at 58.5, rounded to 58, and 16.
    scale_x, scale_y = 500 / 341, 375 / 256
    assert weights.box[0] == pytest.approx([58 * scale_x, 16 * scale_y, 224 * scale_x, 224 * scale_y])


def test_affine_follows_random_affine():
    theirs = [
        transforms.RandomAffine.get_params([-20, 20], [0.1, 0.1], None, [-5, 5], [224, 224]) for _ in range(DRAWS)
    ]
    ours = draw(REPORT)
    assert same_law(ours.angle, [angle for angle, _, _, _ in theirs])
    assert same_law(ours.shift[:, 0], [shift[0] for _, shift, _, _ in theirs])
    assert same_law(ours.shift[:, 1], [shift[1] for _, shift, _, _ in theirs])
    assert same_law(ours.shear, [shear[0] for _, _, _, shear in theirs])
    assert np.array_equal(ours.shift, np.rint(ours.shift))


def test_color_follows_color_jitter():
    jitter = transforms.ColorJitter(0.2, 0.2, 0.2, 0.1)
    theirs = [
        transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(DRAWS)
    ]
    ours = draw(REPORT)
    for column in range(4):
        assert same_law(ours.factors[:, column], [row[column + 1] for row in theirs])
    orders = np.unique(ours.color_order, axis=0, return_counts=True)
    assert len(orders[0]) == 24
    assert stats.chisquare(orders[1]).pvalue > 0.01


def test_a_factor_never_falls_below_zero():
    assert draw(replace(REPORT, brightness=3.0)).factors[:, 0].min() >= 0
    assert draw(replace(REPORT, brightness=3.0)).factors[:, 0].max() > 3


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.02, 0.15), (0.3, 3.3)), ((0.02, 0.15), (1.5, 3.0)), ((0.3, 1.5), (0.3, 3.3))]
)
def test_erasing_follows_random_erasing(scale, ratio):
    image = torch.zeros(3, 224, 224)
    theirs = np.array([transforms.RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(DRAWS)])
    theirs = theirs[theirs[:, 2] < 224]  # torchvision says "nothing" by the whole image
    ours = draw(replace(REPORT, erase=1.0, erase_scale=scale, erase_ratio=ratio)).erase
    ours = ours[ours[:, 2] > 0]
    assert len(ours) == pytest.approx(len(theirs), rel=0.02)
    for column, place in enumerate((1, 0, 3, 2)):
        assert same_law(ours[:, column], theirs[:, place])


def test_probabilities_are_kept():
    params = draw(replace(REPORT, horizontal_flip=0.2, vertical_flip=0.7))
    for happens, probability in [(params.flip_x, 0.2), (params.flip_y, 0.7), (params.erase[:, 2] > 0, 0.3)]:
        assert stats.binomtest(int(happens.sum()), DRAWS, probability).pvalue > 0.01


def test_what_is_off_draws_nothing_and_shifts_nothing():
    off = replace(REPORT, erase=0.0, degrees=0.0, translate=(0.0, 0.0), shear=0.0, hue=0.0, horizontal_flip=0.0)
    params, full = draw(off), draw(REPORT)
    assert not params.erase.any()
    assert not params.angle.any()
    assert not params.shift.any()
    assert not params.factors[:, 3].any()
    assert not params.flip_x.any()
    assert np.array_equal(params.box, full.box)
    assert np.array_equal(params.flip_y, full.flip_y)
    assert np.array_equal(params.factors[:, :3], full.factors[:, :3])


@settings(max_examples=20, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 100_000), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    policy=st.sampled_from(["none", "trivial", "rand"]),
)
def test_a_photos_params_depend_on_seed_epoch_and_number_alone(numbers, seed, epoch, policy):
    # Large crops and rectangles, so that first attempts fail too.
    spec = replace(REPORT, policy=policy, crop_scale=(0.6, 1.5), erase=0.7, erase_scale=(0.3, 1.5))
    sizes = [(400 + number % 300, 300) for number in numbers]
    batch = sample_params(spec, sizes, seed=seed, epoch=epoch, numbers=numbers)
    alone = [
        sample_params(spec, [size], seed=seed, epoch=epoch, numbers=[number])
        for size, number in zip(sizes, numbers, strict=True)
    ]
    assert len(batch) == len(numbers)
    for field in fields(BatchParams):
        rows = [getattr(one, field.name) for one in alone]
        assert np.array_equal(getattr(batch, field.name), np.concatenate(rows)), field.name
        assert getattr(batch, field.name).dtype == rows[0].dtype
