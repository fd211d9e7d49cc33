"""The fast executor on the CPU: reduce, warp once, then colour, normalise and erase in compiled loops.

It executes the same parameters as `augment.augment_reference`, on photos that may have been decoded or cached at a
smaller size. It resamples once where the reference does so twice, so its pictures are sharper where there is an affine.

Shape letters: B photos; H, W height and width of a photo as given; S side of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fieldmark.errors import DataError
from fieldmark.vision.augment import RGB, EvalSpec, eval_crop, resize_box, to_pil
from fieldmark.vision.geometry import Matrix, compose, crop_matrices, picture_matrices
from fieldmark.vision.kernels import finish, look_up, warp
from fieldmark.vision.policy import apply_operation, is_geometric
from fieldmark.vision.sample import AugmentSpec, BatchParams, noise_bank

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_LOOK = 1.25
"""Source pixels per output pixel, along its row or column, that one bilinear look may step over; two looks are averaged
beyond."""

MOST_LEFT = 2.0
"""Source pixels per output pixel that two looks may step over; photos are reduced with antialiasing beyond."""

REDUCED_TO = 1.5
"""Source pixels per output pixel after that reduction, so that the looks average what is left."""

_TINY = 1e-6
_FAR = 1e9  # beyond any photo; not infinity, which fast arithmetic leaves undefined


@dataclass(frozen=True, slots=True)
class _Plan:
    """How each photo's crop lies in the photo as given: structure of arrays, one row per photo."""

    box: NDArray[np.float64]
    """(B, 4) x, y, width, height of the crop in given pixels."""
    matrix: Matrix
    """(B, 2, 3) from the S×S crop to given pixels."""
    first: NDArray[np.int64]
    """(B, 2) first column and row that belongs to the crop."""
    end: NDArray[np.int64]
    """(B, 2) one past the last."""
    extent: NDArray[np.int64]
    """(B, 2) width and height to which `first` to `end` is reduced before the warp; equal to theirs for none."""


def augment_fast(
    photos: Sequence[NDArray[np.uint8]],
    source_sizes: ArrayLike,
    params: BatchParams,
    spec: AugmentSpec,
    mean: RGB,
    std: RGB,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Execute the parameters of a batch.

    Args:
        photos: B photos (H, W, 3) uint8, upright, each at its source size or smaller.
        source_sizes: (B, 2) upright width and height for which the parameters were drawn.
        params: Of the batch.
        spec: What they were drawn from.
        mean: Per-channel mean, for values in [0, 1].
        std: Per-channel standard deviation, for values in [0, 1].
        out: (B, 3, S, S) float32 to write into; None makes one.

    Returns:
        (B, 3, S, S) float32.

    Raises:
        DataError: A photo is not (H, W, 3) uint8, or their number is not that of the parameters.
    """
    sizes = np.asarray(source_sizes, dtype=np.float64).reshape(-1, 2)
    if not len(photos) == len(sizes) == len(params):
        raise DataError(f"parameters of {len(params)} photos, but {len(photos)} photos and {len(sizes)} sizes")
    if out is None:
        out = np.empty((len(photos), 3, spec.size, spec.size), dtype=np.float32)
    scale, offset = _normalization(mean, std)
    bank = noise_bank() if spec.erase_value == "random" else noise_bank()[:0]
    colors = np.flatnonzero(spec.color_ranges)
    factors = params.factors.astype(np.float32)
    pictures = picture_matrices(params, spec)
    plan = _plan(photos, sizes, params, spec, is_plain=not pictures)
    for row, photo in enumerate(photos):
        steps = [picture[row] for picture in pictures]
        _warp(photo, plan, row, steps, spec, out[row])
        _apply_policy_colors(out[row], params, row, spec)
        order = params.color_order[row]
        kinds = order if len(colors) == 4 else order[np.isin(order, colors)]
        finish(out[row], kinds, factors[row, kinds], scale, offset, params.erase[row], bank, params.noise_offset[row])
    return out


def eval_fast(photo: NDArray[np.uint8], spec: EvalSpec) -> Tensor:
    """`augment.eval_reference`, the same numbers to the bit, with a table instead of arithmetic.

    The resize stays Pillow's: an evaluation that another resize would change is none.

    Args:
        photo: (H, W, 3) uint8, upright.
        spec: Which picture.

    Returns:
        (3, S, S) float32.

    Raises:
        DataError: The photo is not (H, W, 3) uint8.
    """
    import torch

    pixels = np.asarray(eval_crop(to_pil(photo), spec))
    out = np.empty((3, spec.size, spec.size), dtype=np.float32)
    look_up(pixels, _table(spec.mean, spec.std), out)
    return torch.from_numpy(out)


@lru_cache(maxsize=8)
def _table(mean: RGB, std: RGB) -> NDArray[np.float32]:
    """(3, 256) normalised value of each byte, computed as torchvision does."""
    import torch
    from torchvision.transforms import functional

    values = torch.arange(256, dtype=torch.float32).div(255).expand(3, 1, 256).clone()
    return np.ascontiguousarray(functional.normalize(values, list(mean), list(std)).numpy()[:, 0])


def _normalization(mean: RGB, std: RGB) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and summand that normalise values of 0 to 255."""
    deviation = np.asarray(std, dtype=np.float64)
    return (1 / (255 * deviation)).astype(np.float32), (-np.asarray(mean) / deviation).astype(np.float32)


def _plan(
    photos: Sequence[NDArray[np.uint8]],
    source_sizes: NDArray[np.float64],
    params: BatchParams,
    spec: AugmentSpec,
    *,
    is_plain: bool,
) -> _Plan:
    for photo in photos:
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or 0 in photo.shape:
            raise DataError(f"a photo is (H, W, 3) uint8; got {photo.shape} {photo.dtype}. Decode it with data.decode")
    given = np.array([photo.shape[1::-1] for photo in photos], dtype=np.int64).reshape(-1, 2)
    ratio = given / source_sizes
    box = params.box * np.tile(ratio, 2)
    matrix = crop_matrices(params, spec.size) * ratio[:, :, None]
    first = np.clip(np.floor(box[:, :2] + _TINY).astype(np.int64), 0, given - 1)
    end = np.clip(np.ceil(box[:, :2] + box[:, 2:] - _TINY).astype(np.int64), first + 1, given)
    # Whole pixels and no warp after the resize: the reference's own picture, so reduce straight to it.
    is_exact = np.abs(box - np.rint(box)).max(axis=1, keepdims=True, initial=0) < _TINY
    is_exact = is_exact & (is_plain and spec.crop != "zoom")
    left = box[:, 2:] / spec.size
    most, target = np.where(is_exact, 1.0, MOST_LEFT), np.where(is_exact, 1.0, REDUCED_TO)
    reduced = np.maximum(np.rint((end - first) * target / left), 2).astype(np.int64)
    return _Plan(box, matrix, first, end, np.where(left > most, reduced, end - first))


def _warp(
    photo: NDArray[np.uint8],
    plan: _Plan,
    row: int,
    steps: list[Matrix],
    spec: AugmentSpec,
    out: NDArray[np.float32],
) -> None:
    """Crop, resize, flips and all geometry in one look-up, values 0 to 255."""
    pixels, matrix = _view(photo, plan, row, spec)
    limits = np.empty((len(steps) + 1, 4))
    limits[:-1] = (0, spec.size, 0, spec.size)
    limits[-1] = (0, pixels.shape[1], 0, pixels.shape[0]) if spec.crop == "zoom" else (-_FAR, _FAR, -_FAR, _FAR)
    matrices = np.stack([*steps, compose(matrix, steps[-1]) if steps else matrix])
    across, down = 1 + (np.hypot(*matrices[-1, :, :2]) > SINGLE_LOOK)
    warp(pixels, matrices, limits, across, down, np.array(spec.fill, dtype=np.float32), out)


def _view(photo: NDArray[np.uint8], plan: _Plan, row: int, spec: AugmentSpec) -> tuple[NDArray[np.int32], Matrix]:
    """The pixels of the crop and no others, reduced where need be, and the matrix from the S×S crop to them.

    Returns:
        (H, W) int32 as `kernels.warp` reads them, and (2, 3).
    """
    import cv2

    (left, top), (right, bottom), matrix = plan.first[row], plan.end[row], plan.matrix[row]
    if spec.crop == "weights":
        return _evaluation_view(photo, plan.box[row], matrix, spec)
    part = photo[top:bottom, left:right]
    extent = plan.extent[row]
    scale = np.array([[extent[0] / (right - left)], [extent[1] / (bottom - top)]])
    matrix = np.concatenate([matrix[:, :2], matrix[:, 2:] - [[left], [top]]], axis=1) * scale
    if extent[0] != right - left or extent[1] != bottom - top:
        return _words(cv2.merge([*_reduce(part, extent), np.zeros((extent[1], extent[0]), np.uint8)])), matrix
    if min(part.shape[:2]) < 2:  # the look-up reads pairs of pixels
        return _words(cv2.cvtColor(part.repeat(2, axis=0).repeat(2, axis=1), cv2.COLOR_RGB2RGBA)), matrix * 2.0
    return _words(cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)), matrix


def _words(pixels: Any) -> NDArray[np.int32]:
    return pixels.view(np.int32)[:, :, 0]


def _evaluation_view(
    photo: NDArray[np.uint8], box: NDArray[np.float64], matrix: Matrix, spec: AugmentSpec
) -> tuple[NDArray[np.int32], Matrix]:
    """The crop as the evaluation would show it, by Pillow's resize with the weights' own filter.

    Training on the evaluation's picture is the point of this crop (Touvron et al., FixRes, arXiv:1906.06423).
    """
    import cv2

    pixels = np.asarray(resize_box(to_pil(photo), box[:2].tolist(), box[2:].tolist(), spec))
    shifted = np.concatenate([matrix[:, :2], matrix[:, 2:] - box[:2, None]], axis=1)
    return _words(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)), shifted * (spec.size / box[2:, None])


def _reduce(part: NDArray[np.uint8], extent: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Antialiased bilinear resize to `extent` (width, height), channel by channel: (3, height, width).

    Done by torch's uint8 path, which is several times as fast as Pillow or OpenCV's area filter.
    """
    import torch

    if not part.flags.writeable:  # a photo from a cache: torch warns of such, though nothing here writes
        part = part.copy()
    source = torch.from_numpy(part).permute(2, 0, 1)[None]
    size = (int(extent[1]), int(extent[0]))
    return torch.nn.functional.interpolate(source, size=size, mode="bilinear", antialias=True)[0].contiguous().numpy()


def _apply_policy_colors(picture: NDArray[np.float32], params: BatchParams, row: int, spec: AugmentSpec) -> None:
    """The policy's colour operations, by torchvision on uint8, in place.

    They come after all geometry, where the reference mixes both: the same picture, except that the fill of an earlier
    geometric step keeps its colour in the reference's order only.
    """
    steps = [
        (op, strength)
        for op, strength in zip(params.ops[row], params.magnitudes[row], strict=True)
        if op and not is_geometric(op)
    ]
    if not steps:
        return
    import torch
    from torchvision.transforms import InterpolationMode

    image = torch.from_numpy(np.rint(picture).astype(np.uint8))
    for op, strength in steps:
        image = apply_operation(
            image, int(op), float(strength), interpolation=InterpolationMode.NEAREST, fill=spec.fill
        )
    picture[:] = image.numpy()
