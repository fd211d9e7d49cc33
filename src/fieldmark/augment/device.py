"""The executor for accelerators: uint8 photos that already lie on the device to normalized images, as one batch.

It executes the same parameters as the other two and runs on every device that torch has, so it is tested on the CPU.
All that is random or of varying shape is decided from the parameters on the host: nothing here waits for the device.

Shape letters: B photos; H, W height and width of the tensor that holds them; S side of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from fieldmark.augment.fast import compose, crop_matrices, picture_matrices
from fieldmark.augment.policy import apply_operation, is_geometric
from fieldmark.augment.sample import BRIGHTNESS, CONTRAST, SATURATION, AugmentSpec, BatchParams, noise_bank
from fieldmark.errors import DataError

SINGLE_LOOK = 1.25
"""Source pixels per output pixel that one bilinear look may step over; more looks are averaged beyond."""

MOST_LOOKS = 8
"""Looks per output pixel and direction: enough for photos eight to ten times as large as the output."""

RGB = tuple[float, float, float]


def augment_device(
    photos: Tensor,
    valid_sizes: ArrayLike,
    source_sizes: ArrayLike,
    params: BatchParams,
    spec: AugmentSpec,
    mean: RGB,
    std: RGB,
    *,
    compiled: bool,
) -> Tensor:
    """Execute the parameters of a batch on the device of `photos`.

    Args:
        photos: (B, 3, H, W) uint8, upright, each in the upper left corner of its slot.
        valid_sizes: (B, 2) width and height of each photo in its slot.
        source_sizes: (B, 2) upright width and height for which the parameters were drawn.
        params: Of the batch.
        spec: What they were drawn from. With `crop = "weights"` the filter is bilinear whatever the weights' own.
        mean: Per-channel mean, for values in [0, 1].
        std: Per-channel standard deviation, for values in [0, 1].
        compiled: Compile color, normalization and erasing with `torch.compile`; pays on a GPU only.

    Returns:
        (B, 3, S, S) float32 on the same device.

    Raises:
        DataError: The tensor is not (B, 3, H, W) uint8, or sizes and parameters are not of B photos.
    """
    valid = np.asarray(valid_sizes, dtype=np.float64).reshape(-1, 2)
    sizes = np.asarray(source_sizes, dtype=np.float64).reshape(-1, 2)
    if photos.dim() != 4 or photos.shape[1] != 3 or photos.dtype != torch.uint8:
        raise DataError(f"photos are (B, 3, H, W) uint8; got {tuple(photos.shape)} {photos.dtype}")
    if not len(photos) == len(valid) == len(sizes) == len(params):
        raise DataError(
            f"{len(photos)} photos, but sizes of {len(valid)} and {len(sizes)} and {len(params)} parameters"
        )
    images = _apply_policy_colors(_warp(photos, valid, valid / sizes, params, spec), params, spec)
    kinds = [kind for kind, width in enumerate(spec.color_ranges) if width]
    finish = _compiled_finish() if compiled else _finish
    put = _placer(photos.device)
    return finish(
        images,
        put(params.color_order),
        put(params.factors.astype(np.float32)),
        kinds,
        put(np.array(mean, dtype=np.float32)),
        put(np.array(std, dtype=np.float32)),
        put(params.erase) if params.erase.any() else None,
        put(params.noise_offset),
        _bank(photos.device) if spec.erase_value == "random" else None,
    )


def _placer(device: torch.device) -> Callable[[NDArray[Any]], Tensor]:
    def put(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        # Only a copy from pinned memory leaves the host free to go on.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return put


@cache
def _bank(device: torch.device) -> Tensor:
    return torch.from_numpy(noise_bank().copy()).to(device)


@cache
def _compiled_finish() -> Callable[..., Tensor]:
    return torch.compile(_finish, dynamic=False)


def _warp(
    photos: Tensor, valid: NDArray[np.float64], ratio: NDArray[np.float64], params: BatchParams, spec: AugmentSpec
) -> Tensor:
    """Crop, resize, flips and all geometry: (B, 3, S, S) float32, 0 to 255."""
    pictures = picture_matrices(params, spec)
    crop = crop_matrices(params, spec.size) * ratio[:, :, None]
    last = compose(crop, pictures[-1]) if pictures else crop
    steps = np.hypot(last[:, 0, :2], last[:, 1, :2]).max(axis=0, initial=1.0)  # the longest of the batch, per direction
    across, down = (min(max(ceil(step / SINGLE_LOOK), 1), MOST_LOOKS) for step in steps.tolist())
    box = params.box * np.tile(ratio, 2)
    first = np.clip(np.floor(box[:, :2] + 1e-6), 0, valid - 1)
    end = np.clip(np.ceil(box[:, :2] + box[:, 2:] - 1e-6), first + 1, valid)
    if spec.crop == "weights":  # the evaluation's filter sees beyond the box
        first, end = np.zeros_like(first), valid
    put = _placer(photos.device)
    as_float = np.float32
    places = _points(put(last.astype(as_float)), spec.size, across, down)
    low, high = put(first.astype(as_float))[:, None, None], put(end.astype(as_float) - 1)[:, None, None]
    extent = torch.tensor([photos.shape[3], photos.shape[2]], dtype=torch.float32, device=photos.device)
    pixels = torch.minimum(torch.maximum(places - 0.5, low), high)
    grid = (2 * pixels + 1) / extent - 1
    images = functional.grid_sample(photos.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    if across * down > 1:
        images = functional.avg_pool2d(images, (down, across))
    limits = [(picture, np.full_like(valid, spec.size)) for picture in pictures]
    if spec.crop == "zoom":
        limits.append((last, valid))
    for matrix, limit in limits:
        points = _points(put(matrix.astype(as_float)), spec.size, 1, 1)
        inside = ((points >= 0) & (points < put(limit.astype(as_float))[:, None, None])).all(dim=3)
        fill = put(np.array(spec.fill, dtype=as_float))[:, None, None]
        images = torch.where(inside[:, None], images, fill)
    return images


def _points(matrices: Tensor, size: int, across: int, down: int) -> Tensor:
    """(B, S · down, S · across, 2) where each look of each output pixel falls, x before y."""
    columns = (torch.arange(size * across, device=matrices.device) + 0.5) / across
    rows = (torch.arange(size * down, device=matrices.device) + 0.5) / down
    x, y, one = (matrices[:, None, None, :, place] for place in range(3))
    return x * columns[None, None, :, None] + y * rows[None, :, None, None] + one


def _apply_policy_colors(images: Tensor, params: BatchParams, spec: AugmentSpec) -> Tensor:
    """The policy's color operations, by torchvision on uint8, after all geometry."""
    from torchvision.transforms import InterpolationMode

    nearest = InterpolationMode.NEAREST
    for column in range(params.ops.shape[1]):
        for row, op in enumerate(params.ops[:, column].tolist()):
            if op and not is_geometric(op):
                strength = float(params.magnitudes[row, column])
                image = images[row].round().to(torch.uint8)
                images[row] = apply_operation(image, op, strength, interpolation=nearest, fill=spec.fill).float()
    return images


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

    Every operation runs at every place of the order, neutral for the photos whose turn it isn't: choosing rows would
    cost a wait for the device, and compiled it is one pass over memory.
    """
    for place in range(4 if kinds else 0):
        for kind in kinds:
            neutral = 0.0 if kind > SATURATION else 1.0
            strength = torch.where(order[:, place] == kind, factors[:, kind], neutral)[:, None, None]
            images = _recolor(images, kind, strength)
    images = (images / 255 - mean[:, None, None]) / std[:, None, None]
    if erase is None:
        return images
    size = images.shape[3]
    places = torch.arange(size, device=images.device)
    x, y, width, height = (erase[:, column, None] for column in range(4))
    columns, rows = (places >= x) & (places < x + width), (places >= y) & (places < y + height)
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
    channels: list[Tensor] = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)
