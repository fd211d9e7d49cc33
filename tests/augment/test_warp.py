from __future__ import annotations

import io
from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
from PIL import Image

from fieldmark.augment.fast import augment_fast
from fieldmark.augment.reference import augment_reference
from fieldmark.augment.sample import OPERATIONS, AugmentSpec, BatchParams, sample_params
from fieldmark.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # a normalization that leaves 0 to 255
PLAIN = AugmentSpec(
    size=224,
    crop="random_resized",
    crop_scale=(0.35, 1.0),
    crop_ratio=(0.75, 4 / 3),
    crop_fraction=0.875,
    crop_interpolation="bicubic",
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
COLOR = replace(PLAIN, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)


def sizes_of(photos):
    return [(photo.shape[1], photo.shape[0]) for photo in photos]


def params_for(photos, spec, seed: int = 0) -> BatchParams:
    return sample_params(spec, sizes_of(photos), seed=seed, epoch=0, numbers=np.arange(len(photos)))


def take(params: BatchParams, rows: list[int]) -> BatchParams:
    return BatchParams(*[getattr(params, field.name)[rows] for field in fields(BatchParams)])


def reference(photos, params, spec):
    return [augment_reference(photo, params, row, spec).numpy() for row, photo in enumerate(photos)]


def both(photos, spec, given=None):
    """Pictures of both executors, 0 to 255; `given` are the photos that the fast one gets."""
    params = params_for(photos, spec)
    fast = augment_fast(given or photos, sizes_of(photos), params, spec)
    return fast, reference(photos, params, spec)


def sharpness(picture) -> float:
    picture = np.asarray(picture, dtype=np.float64)  # differences of bytes would wrap around
    return float(np.abs(np.diff(picture, axis=-1)).mean() + np.abs(np.diff(picture, axis=-2)).mean())


def mean_psnr(psnr, ours, theirs) -> float:
    return float(np.mean([psnr(a, b) for a, b in zip(ours, theirs, strict=True)]))


def mean_sharpness(ours, theirs) -> float:
    return float(np.mean([sharpness(a) / sharpness(b) for a, b in zip(ours, theirs, strict=True)]))


def resized(photo, short_side: int):
    scale = short_side / min(photo.shape[:2])
    size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR))


def as_jpeg(photo):
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def test_crop_resize_and_flips_are_the_reference(scenes, large, psnr):
    photos = (scenes + large) * 4
    ours, theirs = both(photos, PLAIN)
    assert min(psnr(a, b) for a, b in zip(ours, theirs, strict=True)) > 60


def test_small_photos_are_enlarged_as_the_reference_does(birds, psnr):
    assert mean_psnr(psnr, *both(birds, PLAIN)) > 52


def test_one_warp_is_nearer_to_a_bicubic_affine_than_the_competition(scenes, birds, psnr):
    photos = scenes * 4 + birds
    params = params_for(photos, AFFINE)
    oracle = [bicubic(photo, params, row) for row, photo in enumerate(photos)]
    ours = augment_fast(photos, sizes_of(photos), params, AFFINE)
    nearest = reference(photos, params, replace(AFFINE, affine_interpolation="nearest"))
    assert mean_psnr(psnr, ours, oracle) > max(40, mean_psnr(psnr, nearest, oracle) + 4)
    assert 0.85 < mean_sharpness(ours, oracle) < 1.15


def bicubic(photo, params, row):
    """The crop by torchvision, then the affine by Pillow's bicubic: one careful answer."""
    plain = augment_reference(photo, params, row, PLAIN).numpy()
    image = Image.fromarray(np.rint(plain).astype(np.uint8).transpose(1, 2, 0))
    from torchvision.transforms import functional as v1
    from torchvision.transforms.functional import _get_inverse_affine_matrix

    matrix = _get_inverse_affine_matrix(
        [112, 112], float(params.angle[row]), params.shift[row].tolist(), 1.0, [float(params.shear[row]), 0.0]
    )
    moved = image.transform((224, 224), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=AFFINE.fill)
    return v1.pil_to_tensor(moved).numpy()


def test_the_fill_lies_where_the_reference_has_it(scenes):
    spec = replace(AFFINE, fill=(255, 0, 255))
    photos = [np.zeros_like(scenes[0])] * 6
    ours, theirs = both(photos, spec)
    inside = [picture[0] < 128 for picture in (*ours, *theirs)]
    disagreement = [np.mean(a != b) for a, b in zip(inside[:6], inside[6:], strict=True)]
    assert max(disagreement) < 0.005
    assert all(0.02 < 1 - mask.mean() < 0.6 for mask in inside)


@pytest.mark.parametrize(
    ("spec", "mean_error"),
    [
        (replace(PLAIN, brightness=0.4), 1.0),
        (replace(PLAIN, contrast=0.4), 1.0),
        (replace(PLAIN, saturation=0.4), 1.0),
        (replace(PLAIN, hue=0.1), 1.0),
        (replace(PLAIN, hue=0.5), 1.0),
        (COLOR, 1.65),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "any hue", "all"],
)
def test_color_is_the_references_color(scenes, birds, spec, mean_error):
    ours, theirs = both(scenes * 4 + birds, spec)
    still, still_theirs = both(scenes * 4 + birds, replace(spec, brightness=0, contrast=0, saturation=0, hue=0))
    base = np.abs(still - np.stack(still_theirs)).mean()
    assert np.abs(ours - np.stack(theirs)).mean() < mean_error + base
    assert np.abs(ours - still).mean() > 3 * mean_error


def test_color_operations_keep_their_order(scenes):
    photos = scenes[:1] * 2
    params = take(params_for(photos, COLOR), [0, 0])
    params.color_order[:] = [[0, 1, 2, 3], [3, 2, 1, 0]]
    params.factors[:] = (1.9, 0.3, 1.8, 0.2)
    spec = replace(COLOR, brightness=1.0, contrast=1.0, saturation=1.0)
    ours = augment_fast(photos, sizes_of(photos), params, spec)
    theirs = reference(photos, params, spec)
    for row in range(2):
        assert np.abs(ours[row] - theirs[row]).mean() < 2
    assert np.abs(ours[0] - ours[1]).mean() > 8


@pytest.mark.parametrize("value", ["random", "zero"])
def test_erasing_and_normalization_are_the_references(scenes, value):
    spec = replace(PLAIN, erase=1.0, erase_value=value, mean=MEAN, std=STD)
    params = params_for(scenes, spec)
    ours = augment_fast(scenes, sizes_of(scenes), params, spec)
    for row, photo in enumerate(scenes):
        theirs = augment_reference(photo, params, row, spec).numpy()
        x, y, w, h = params.erase[row]
        assert w > 0
        assert np.array_equal(ours[row][:, y : y + h, x : x + w], theirs[:, y : y + h, x : x + w])
        assert np.abs(ours[row] - theirs).mean() < 0.01


@pytest.mark.parametrize(
    ("make", "least"),
    [(lambda p: resized(p, 320), 38), (lambda p: as_jpeg(resized(p, 320)), 32)],
    ids=["uint8", "jpeg"],
)
def test_cached_photos_give_nearly_the_same_picture(scenes, large, psnr, make, least):
    # These two photos are far more detailed than most: the same bounds on birds and cells are 6 to 10 dB higher.
    photos = scenes * 3 + large[1:]
    ours, theirs = both(photos, PLAIN, given=[make(photo) for photo in photos])
    assert mean_psnr(psnr, ours, theirs) > least
    assert 0.9 < mean_sharpness(ours, theirs) < 1.15


def test_a_photo_given_at_half_size_keeps_its_place(large, psnr):
    smooth = [cv2.GaussianBlur(photo, (0, 0), 9) for photo in large]
    ours, theirs = both(smooth, PLAIN, given=[resized(photo, 600) for photo in smooth])
    assert mean_psnr(psnr, ours, theirs) > 50


def test_large_photos_do_not_alias(large, psnr):
    photos = large * 2
    params = params_for(photos, AFFINE)
    oracle = [bicubic(photo, params, row) for row, photo in enumerate(photos)]
    ours = augment_fast(photos, sizes_of(photos), params, AFFINE)
    assert mean_psnr(psnr, ours, oracle) > 36
    assert mean_sharpness(ours, oracle) < 1.1


def test_the_weights_crop_is_the_references(scenes, psnr):
    spec = replace(PLAIN, crop="weights")
    assert mean_psnr(psnr, *both(scenes * 2, spec)) > 60


def test_zoom_shows_the_fill_around_the_photo(scenes, psnr):
    spec = replace(PLAIN, crop="zoom", crop_scale=(1.2, 2.5), fill=(0, 255, 0))
    smooth = [cv2.GaussianBlur(photo, (0, 0), 5) for photo in scenes]
    ours, theirs = both(smooth * 3, spec)
    assert mean_psnr(psnr, ours, theirs) > 27
    fills = [np.mean(np.all(np.rint(p) == np.array([0, 255, 0])[:, None, None], axis=0)) for p in (*ours, *theirs)]
    assert np.abs(np.subtract(fills[:6], fills[6:])).max() < 0.02
    assert min(fills) > 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_policy_operation_is_the_references(birds, name, psnr):
    op = OPERATIONS.index(name)
    spec = replace(PLAIN, policy="trivial")
    params = params_for(birds, spec)
    params.ops[:] = op
    params.magnitudes[:] = {
        "Rotate": 30.0,
        "TranslateX": 20.0,
        "TranslateY": -20.0,
        "Posterize": 4.0,
        "Solarize": 128.0,
    }.get(name, 0.4)
    ours = augment_fast(birds, sizes_of(birds), params, spec)
    # Posterize and solarize jump where values differ by rounding; the mean difference stays small.
    assert np.abs(ours - np.stack(reference(birds, params, spec))).mean() < 2.5


def test_rand_augment_composes_its_geometry(birds, psnr):
    spec = replace(PLAIN, policy="rand", rand_ops=2, rand_magnitude=9)
    params = params_for(birds, spec)
    params.ops[:] = [1, 5]
    params.magnitudes[:] = [0.3, 25.0]
    ours = augment_fast(birds, sizes_of(birds), params, spec)
    assert mean_psnr(psnr, ours, reference(birds, params, spec)) > 28


def test_pictures_do_not_depend_on_the_batch(scenes):
    spec = replace(AFFINE, hue=0.1, contrast=0.2, erase=0.5, policy="trivial")
    photos = scenes * 2
    params = params_for(photos, spec)
    whole = augment_fast(photos, sizes_of(photos), params, spec)
    for row in range(4):
        alone = augment_fast([photos[row]], [sizes_of(photos)[row]], take(params, [row]), spec)
        assert np.array_equal(alone[0], whole[row])


def test_read_only_and_strided_photos_are_left_alone(scenes, large):
    photos = [scenes[0], large[0]]
    locked = [photo.copy() for photo in photos]
    for photo in locked:
        photo.setflags(write=False)
    flipped = [np.asfortranarray(photo) for photo in photos]
    params = params_for(photos, AFFINE)
    expected = augment_fast(photos, sizes_of(photos), params, AFFINE)
    assert np.array_equal(augment_fast(locked, sizes_of(photos), params, AFFINE), expected)
    assert np.array_equal(augment_fast(flipped, sizes_of(photos), params, AFFINE), expected)
    assert all(np.array_equal(a, b) for a, b in zip(locked, photos, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 500)])
@pytest.mark.parametrize("crop", ["random_resized", "zoom", "squash", "weights"])
def test_tiny_photos_work(shape, crop):
    photo = np.full((*shape, 3), 77, dtype=np.uint8)
    spec = replace(AFFINE, crop=crop, fill=(77, 77, 77))
    ours = augment_fast([photo] * 3, [shape[::-1]] * 3, params_for([photo] * 3, spec), spec)
    assert np.abs(ours - 77).max() < 1e-3


def test_what_is_no_photo_is_refused(scenes):
    params = params_for(scenes, PLAIN)
    with pytest.raises(DataError, match=r"a photo is \(H, W, 3\) uint8; got \(427, 640\) uint8"):
        augment_fast([scene[:, :, 0] for scene in scenes], sizes_of(scenes), params, PLAIN)
