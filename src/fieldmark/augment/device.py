"""The executor for accelerators: uint8 photos that are already on the device to normalized images, as one batch.

It executes the same parameters as the other two and runs on every device that torch has, so it is tested on the CPU.
All that is random or of varying shape is decided from the parameters on the host: nothing here waits for the device.

Shape letters: B photos; H, W height and width of the tensor that holds them; S side of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fieldmark.augment import fast
from fieldmark.augment.fast import Floats, Whole
from fieldmark.augment.sample import BRIGHTNESS, CONTRAST, SATURATION, AugmentSpec, BatchParams, noise_bank

SINGLE_LOOK = 1.25  # source pixels per output pixel that one bilinear look may step over; beyond, more are averaged
MOST_LOOKS = 8  # per output pixel and direction: enough for photos eight to ten times as large as the output


def augment_device(
    photos: Tensor, valid_sizes: Whole, source_sizes: Whole, params: BatchParams, spec: AugmentSpec, *, compiled: bool
) -> Tensor:
    """Execute parameters on (B, 3, H, W) photos, upright, each in the upper left corner of its slot: (B, 3, S, S).

    Valid sizes are (B, 2) width and height in the slots, source sizes those for which the parameters were drawn. With
    `crop = "weights"` the filter is bilinear whatever the weights' own. To compile color, normalization and erasing
    pays on a GPU only.
    """
    images = _warp(photos, valid_sizes, valid_sizes / source_sizes, params, spec)
    for image, ops, magnitudes in zip(images, params.ops, params.magnitudes, strict=True):
        fast.apply_policy_colors(image, ops, magnitudes, spec.fill)
    kinds = [kind for kind, width in enumerate(spec.color_ranges) if width]
    finish = _compiled_finish() if compiled else _finish
    put = partial(_put, device=photos.device)
    return finish(
        images,
        put(params.color_order, dtype=np.int64),
        put(params.factors),
        kinds,
        put(np.array(spec.mean)),
        put(np.array(spec.std)),
        put(params.erase, dtype=np.int64) if params.erase.any() else None,
        put(params.noise_offset, dtype=np.int64),
        _bank(photos.device) if spec.erase_value == "random" else None,
    )


def _put(array: NDArray[Any], device: torch.device, dtype: Any = np.float32) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
    # Only a copy from pinned memory leaves the host free to go on.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def _bank(device: torch.device) -> Tensor:
    return torch.from_numpy(noise_bank().copy()).to(device)


@cache
def _compiled_finish() -> Callable[..., Tensor]:
    return torch.compile(_finish, dynamic=False)


def _warp(photos: Tensor, valid: Whole, ratio: Floats, params: BatchParams, spec: AugmentSpec) -> Tensor:
    """Crop, resize, flips and all geometry: (B, 3, S, S) float32, 0 to 255."""
    pictures = fast.picture_matrices(params, spec)
    crop = fast.crop_matrices(params, spec.size) * ratio[:, :, None]
    last = fast.compose(crop, pictures[-1]) if pictures else crop
    steps = np.hypot(last[:, 0, :2], last[:, 1, :2]).max(axis=0, initial=1.0)  # the longest of the batch, per direction
    across, down = (min(max(ceil(step / SINGLE_LOOK), 1), MOST_LOOKS) for step in steps.tolist())
    first, end = fast.crop_limits(params.box * np.tile(ratio, 2), valid)
    if spec.crop == "weights":  # the evaluation's filter sees beyond the box
        first, end = np.zeros_like(first), valid
    put = partial(_put, device=photos.device)
    low, high = put(first)[:, None, None], put(end - 1)[:, None, None]
    extent = torch.tensor([photos.shape[3], photos.shape[2]], dtype=torch.float32, device=photos.device)
    pixels = torch.minimum(torch.maximum(_points(put(last), spec.size, across, down) - 0.5, low), high)
    grid = (2 * pixels + 1) / extent - 1
    images = functional.grid_sample(photos.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    if across * down > 1:
        images = functional.avg_pool2d(images, (down, across))
    limits = [(picture, np.full_like(valid, spec.size)) for picture in pictures]
    if spec.crop == "zoom":
        limits.append((last, valid))
    for matrix, limit in limits:
        points = _points(put(matrix), spec.size, 1, 1)
        inside = ((points >= 0) & (points < put(limit)[:, None, None])).all(dim=3)
        images = torch.where(inside[:, None], images, put(np.array(spec.fill))[:, None, None])
    return images


def _points(matrices: Tensor, size: int, across: int, down: int) -> Tensor:
    """(B, S · down, S · across, 2) x and y in the source of each look of each output pixel."""
    columns = (torch.arange(size * across, device=matrices.device) + 0.5) / across
    rows = (torch.arange(size * down, device=matrices.device) + 0.5) / down
    x, y, one = matrices[:, None, None].unbind(dim=4)
    return x * columns[None, None, :, None] + y * rows[None, :, None, None] + one


def _finish(
    images: Tensor,
    order: Tensor,
    factors: Tensor,
    kinds: Sequence[int],
    mean: Tensor,
    std: Tensor,
    erase: Tensor | None,
    noise_offset: Tensor,
    bank: Tensor | None,
) -> Tensor:
    """Color in each photo's own order, normalize, erase.

    Every operation runs at every position of the order, neutral for the photos whose turn it isn't: choosing rows would
    cost a wait for the device, and compiled it is one pass over memory.
    """
    for position in range(4 if kinds else 0):
        for kind in kinds:
            neutral = 0.0 if kind > SATURATION else 1.0
            strength = torch.where(order[:, position] == kind, factors[:, kind], neutral)[:, None, None]
            images = _recolor(images, kind, strength)
    images = (images / 255 - mean[:, None, None]) / std[:, None, None]
    if erase is None:
        return images
    size = images.shape[3]
    numbers = torch.arange(size, device=images.device)
    x, y, width, height = erase[:, :, None].unbind(dim=1)
    columns, rows = (numbers >= x) & (numbers < x + width), (numbers >= y) & (numbers < y + height)
    covered = (rows[:, :, None] & columns[:, None, :])[:, None]
    if bank is None:
        return torch.where(covered, 0.0, images)
    address = torch.arange(3 * size * size, device=images.device).reshape(3, size, size)
    noise = bank[(noise_offset[:, None, None, None] + address) % len(bank)]
    return torch.where(covered, noise, images)


def _recolor(images: Tensor, kind: int, strength: Tensor) -> Tensor:
    """One color operation; `strength` is (B, 1, 1)."""
    red, green, blue = images.unbind(dim=1)
    if kind == BRIGHTNESS:
        return (images * strength[:, None]).clamp(0, 255)
    if kind not in (CONTRAST, SATURATION):
        return _turn_hue(red, green, blue, strength)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    if kind == CONTRAST:  # Pillow rounds the mean
        gray = (gray.mean(dim=(1, 2), keepdim=True) + 0.5).floor()
    return torch.lerp(gray[:, None].expand_as(images), images, strength[:, None]).clamp(0, 255)


def _turn_hue(red: Tensor, green: Tensor, blue: Tensor, shift: Tensor) -> Tensor:
    """True HSV hue turned by `shift` of the circle, as in `kernels.turn_hue`."""
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / chroma.clamp(min=1e-6)
    hue = torch.where(green == value, (blue - red) * scale + 2, (red - green) * scale + 4)
    hue = torch.where(red == value, (green - blue) * scale, hue) + 6 * shift
    turned = [torch.remainder(hue + offset, 6) for offset in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in turned], dim=1)
