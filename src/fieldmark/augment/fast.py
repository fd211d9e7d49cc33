"""The fast executor on the CPU: reduce, soften, warp once, then color, normalize and erase in compiled loops.

It executes the same parameters as `augment.augment_reference`, on photos that may have been decoded or cached at a
smaller size. It resamples once where the reference does so twice, so its pictures are sharper where there is an affine.

Shape letters: B photos; H, W height and width of a photo as given; S side of the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.augment.kernels import finish, soften, warp
from fieldmark.augment.reference import require_photo, resize_box, to_pil
from fieldmark.augment.sample import MOVING, AugmentSpec, BatchParams, apply_operation, noise_bank, operation_matrix

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

# Source pixels per output pixel, along its row or column: up to MOST_LEFT softening is antialiasing enough; with more a
# photo is reduced to REDUCED_TO, and softening does the rest.
MOST_LEFT, REDUCED_TO = 2.0, 1.5
# How much of its softness a reduced photo is taken to have. All of it would match the variance of the reference's
# filter; half of it also keeps the pictures as near to the reference's.
ALREADY_SOFT = 0.5
_TINY = 1e-6
_FAR = 1e9  # beyond any photo; not infinity, which fast arithmetic leaves undefined


def _compose(outer: Floats, inner: Floats) -> Floats:
    """The matrix that applies `inner` to a point first, then `outer`."""
    linear = outer[..., :2]
    return np.concatenate([linear @ inner[..., :2], linear @ inner[..., 2:] + outer[..., 2:]], axis=-1)


def _picture_matrices(params: BatchParams, spec: AugmentSpec) -> list[Floats]:
    """From the output back to the crop resized to S×S, step by step: K cumulative arrays (B, 2, 3).

    A point that leaves [0, S]² after any of them shows the fill, because the stages one after another would have lost
    it there. K is 0 if nothing moves after the crop and the flips.
    """
    steps: list[Floats] = [_affine_matrices(params, spec.size)] if spec.has_affine else []
    for ops, magnitudes in zip(params.ops.T[::-1].tolist(), params.magnitudes.T[::-1].tolist(), strict=True):
        pairs = zip(ops, magnitudes, strict=True)
        steps.append(np.stack([operation_matrix(op, magnitude, spec.size) for op, magnitude in pairs]))
    return [*accumulate(steps, lambda first, then: _compose(then, first))]


def _affine_matrices(params: BatchParams, size: int) -> Floats:
    """(B, 2, 3) inverse affine matrices of torchvision: rotation and x-shear about the center, shift in pixels."""
    turn, tangent, half = np.radians(params.angle), np.tan(np.radians(params.shear)), size / 2
    cos, sin = np.cos(turn), np.sin(turn)
    linear = np.stack([cos - sin * tangent, cos * tangent + sin, -sin, cos], axis=1).reshape(-1, 2, 2)
    offset = half - linear @ (half + params.shift)[:, :, None]
    return np.concatenate([linear, offset], axis=2)


def _crop_matrices(params: BatchParams, size: int) -> Floats:
    """(B, 2, 3) from the S×S crop, flipped, to upright source pixels."""
    corner, extent = params.box[:, :2], params.box[:, 2:]
    flips = np.stack([params.flip_x, params.flip_y], axis=1)
    scale = np.where(flips, -extent, extent) / size
    matrices = np.zeros((len(corner), 2, 3))
    matrices[:, 0, 0], matrices[:, 1, 1] = scale[:, 0], scale[:, 1]
    matrices[:, :, 2] = corner + np.where(flips, extent, 0.0)
    return matrices


def _crop_limits(box: Floats, given: Whole) -> tuple[Whole, Whole]:
    """(B, 2) first column and row, and one past the last, of crops (B, 4) within photos of (B, 2) pixels as given."""
    first = np.clip(np.floor(box[:, :2] + _TINY).astype(np.int64), 0, given - 1)
    return first, np.clip(np.ceil(box[:, :2] + box[:, 2:] - _TINY).astype(np.int64), first + 1, given)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Says how each photo's picture is made of the photo as given: structure of arrays, one row per photo."""

    box: Floats  # (B, 4) x, y, width, height of the crop in given pixels
    first: Whole  # (B, 2) first column and row that belongs to the crop
    end: Whole  # (B, 2) one past the last
    extent: Whole  # (B, 2) size to which `first` to `end` is reduced before the warp; equal to theirs for none
    matrices: Floats  # (B, K, 2, 3) from the output, stage by stage; the last ends in the reduced crop
    limits: Floats  # (B, K, 4) x low, high, y low, high after each stage: points outside show the fill
    softness: NDArray[np.uint16]  # (B, 2) weight of a pixel's neighbors in its row and in its column, in 1/256


def augment_fast(
    photos: Sequence[NDArray[np.uint8]], source_sizes: Whole, params: BatchParams, spec: AugmentSpec
) -> NDArray[np.float32]:
    """Execute parameters on B upright photos (H, W, 3), each at its source size (B, 2) or smaller: (B, 3, S, S)."""
    out = np.empty((len(photos), 3, spec.size, spec.size), dtype=np.float32)
    deviation = np.asarray(spec.std, dtype=np.float64)
    scale, offset = (1 / (255 * deviation)).astype(np.float32), (-np.asarray(spec.mean) / deviation).astype(np.float32)
    bank = noise_bank() if spec.erase_value == "random" else noise_bank()[:0]
    colors = np.flatnonzero(spec.color_ranges)
    factors = params.factors.astype(np.float32)
    fill = np.array(spec.fill, dtype=np.float32)
    plan = _plan(photos, source_sizes, params, spec)
    words = np.empty(int((plan.extent + 1).prod(axis=1).max(initial=0)), np.uint32)
    for row, photo in enumerate(photos):
        pixels, (left, top), (width, height) = _view(photo, plan, row, spec)
        part = words[: (height + 1) * (width + 1)].reshape(height + 1, width + 1)
        soften(pixels.reshape(len(pixels), -1), left, top, *plan.softness[row], part)
        warp(part, plan.matrices[row], plan.limits[row], fill, out[row])
        _apply_policy_colors(torch.from_numpy(out[row]), params.ops[row], params.magnitudes[row], spec.fill)
        order = params.color_order[row]
        kinds = order if len(colors) == 4 else order[np.isin(order, colors)]
        finish(out[row], kinds, factors[row, kinds], scale, offset, params.erase[row], bank, params.noise_offset[row])
    return out


def _plan(photos: Sequence[NDArray[np.uint8]], source_sizes: Whole, params: BatchParams, spec: AugmentSpec) -> _Plan:
    for photo in photos:
        require_photo(photo)
    pictures = _picture_matrices(params, spec)
    given = np.array([photo.shape[1::-1] for photo in photos], dtype=np.int64).reshape(-1, 2)
    ratio = given / source_sizes
    box = params.box * np.tile(ratio, 2)
    first, end = _crop_limits(box, given)
    if spec.crop == "weights":  # the evaluation's own picture
        extent, corner, scale = np.full_like(first, spec.size), box[:, :2], spec.size / box[:, 2:]
    else:
        extent = _reduced_extents(box, end - first, spec, is_plain=not pictures)
        corner, scale = first, extent / (end - first)
    to_view = _crop_matrices(params, spec.size) * ratio[:, :, None]
    to_view[:, :, 2] -= corner
    to_view *= scale[:, :, None]
    matrices = np.stack([*pictures, _compose(to_view, pictures[-1]) if pictures else to_view], axis=1)
    limits = np.empty((len(box), len(pictures) + 1, 4))
    limits[:, :-1] = (0, spec.size, 0, spec.size)
    limits[:, -1] = (-_FAR, _FAR, -_FAR, _FAR)
    if spec.crop == "zoom":
        limits[:, -1, 0::2], limits[:, -1, 1::2] = 0, extent
    return _Plan(box, first, end, extent, matrices, limits, _softness(matrices[:, -1], scale * ratio))


def _reduced_extents(box: Floats, extent: Whole, spec: AugmentSpec, *, is_plain: bool) -> Whole:
    """(B, 2) width and height before the warp of crops of that extent."""
    # Whole pixels and no warp after the resize: the reference's own picture, so reduce straight to it.
    is_exact = np.abs(box - np.rint(box)).max(axis=1, keepdims=True, initial=0) < _TINY
    is_exact = is_exact & (is_plain and spec.crop != "zoom")
    left = box[:, 2:] / spec.size
    most, target = np.where(is_exact, 1.0, MOST_LEFT), np.where(is_exact, 1.0, REDUCED_TO)
    reduced = np.maximum(np.rint(extent * target / left), 2).astype(np.int64)
    return np.where(left > most, reduced, extent)


def _softness(matrices: Floats, reduction: Floats) -> NDArray[np.uint16]:
    """(B, 2) what the neighbors of a pixel must weigh for a bilinear look to be an antialiased one.

    The reference resizes with a triangle as wide as `step` source pixels to either side, whose variance is step² / 6.
    A bilinear look is a triangle of one pixel, and neighbors that weigh w each add 2 w. So w is (step² - 1) / 12, up
    to the 1/4 of two pixels per step, where the two filters are one. A reduction by r, of which (B, 2) 1 / r is given,
    has added (1 - 1 / r²) / 6 before.
    """
    step_squared = np.square(matrices[:, :, :2]).sum(axis=2)
    weight = (step_squared - 1 - ALREADY_SOFT * (1 - np.square(reduction))) / 12
    return np.rint(256 * np.clip(weight, 0, 0.25)).astype(np.uint16)


def _view(
    photo: NDArray[np.uint8], plan: _Plan, row: int, spec: AugmentSpec
) -> tuple[NDArray[np.uint8], Sequence[int], Sequence[int]]:
    """Contiguous (H, W, 3) pixels with the crop, reduced where need be; where it begins in them; width and height."""
    first, end, extent = plan.first[row].tolist(), plan.end[row].tolist(), plan.extent[row].tolist()
    if spec.crop == "weights":
        # By Pillow's resize with the weights' own filter: training on the evaluation's picture is the point of this
        # crop (Touvron et al., FixRes, arXiv:1906.06423).
        return np.array(resize_box(to_pil(photo), plan.box[row].tolist(), spec)), (0, 0), extent
    (left, top), (right, bottom) = first, end
    if extent != [right - left, bottom - top]:
        return _reduce(photo[top:bottom, left:right], extent), (0, 0), extent
    return np.ascontiguousarray(photo), first, extent


def _reduce(part: NDArray[np.uint8], extent: Sequence[int]) -> NDArray[np.uint8]:
    """Antialiased bilinear resize to (width, height), by torch: several times as fast on uint8 as Pillow or OpenCV."""
    import cv2

    if not part.flags.writeable:  # a photo from a cache: torch warns of such, though nothing here writes
        part = part.copy()
    source = torch.from_numpy(part).permute(2, 0, 1)[None]
    size = (extent[1], extent[0])
    planes = torch.nn.functional.interpolate(source, size=size, mode="bilinear", antialias=True)[0].numpy()
    return cv2.merge([*planes])  # pyright: ignore[reportReturnType]  # 25 times as fast as numpy's transposed copy


def _apply_policy_colors(picture: Tensor, ops: Whole, magnitudes: Floats, fill: tuple[int, int, int]) -> None:
    """Apply the policy's color operations to one (3, S, S) picture of 0 to 255, by torchvision on uint8, in place.

    They come after all geometry, where the reference mixes both: the same picture, except that the fill of an earlier
    geometric step keeps its color in the reference's order only.
    """
    pairs = zip(ops.tolist(), magnitudes.tolist(), strict=True)
    steps = [(op, magnitude) for op, magnitude in pairs if op and op not in MOVING]
    if not steps:
        return
    image = picture.round().to(torch.uint8)
    for op, magnitude in steps:
        image = apply_operation(image, op, magnitude, interpolation="nearest", fill=fill)
    picture.copy_(image)
