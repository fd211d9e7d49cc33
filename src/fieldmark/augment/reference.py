"""The reference executor: parameters and a photo to a tensor, by torchvision's functions one after another.

Also the evaluation transforms. Every faster executor is tested against this module.

Shape letters: H, W height and width of a photo; S side of the square output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.augment.policy import apply_operation
from fieldmark.augment.sample import BRIGHTNESS, CONTRAST, SATURATION, AugmentSpec, BatchParams, noise_bank
from fieldmark.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor


RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """The picture that a photo is judged on.

    Args:
        transform: `weights`: resize the short side to `size / crop_fraction`, cut the center. `squash`: resize to a
            square, aspect lost.
        size: Side of the output, in pixels.
        crop_fraction: `size` over the resized short side, in (0, 1]; unused by `squash`.
        interpolation: Filter of the resize, always antialiased.
        mean: Per-channel mean of normalization, for values in [0, 1].
        std: Per-channel standard deviation of normalization, for values in [0, 1].
    """

    transform: Literal["weights", "squash"]
    size: int
    crop_fraction: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: RGB
    std: RGB


def augment_reference(
    photo: NDArray[np.uint8], params: BatchParams, row: int, spec: AugmentSpec, mean: RGB, std: RGB
) -> Tensor:
    """Execute one row of the parameters as torchvision would.

    The order is the report's: crop and resize, flips, policy, affine, color, normalize, erase.

    Args:
        photo: (H, W, 3) uint8, upright, at the full size for which the parameters were drawn.
        params: Of the batch.
        row: Which photo of the batch.
        spec: What the parameters were drawn from.
        mean: Per-channel mean, for values in [0, 1].
        std: Per-channel standard deviation, for values in [0, 1].

    Returns:
        (3, S, S) float32.

    Raises:
        DataError: The photo is not (H, W, 3) uint8.
    """
    from torchvision.transforms import InterpolationMode

    functional = _functional()
    image = _crop(to_pil(photo), params.box[row], spec)
    if params.flip_x[row]:
        image = functional.horizontal_flip(image)
    if params.flip_y[row]:
        image = functional.vertical_flip(image)
    interpolation = InterpolationMode(spec.affine_interpolation)
    for op, magnitude in zip(params.ops[row].tolist(), params.magnitudes[row].tolist(), strict=True):
        image = apply_operation(image, op, magnitude, interpolation=interpolation, fill=spec.fill)
    if spec.has_affine:
        image = functional.affine(
            image,
            angle=float(params.angle[row]),
            translate=[int(pixels) for pixels in params.shift[row]],
            scale=1.0,
            shear=[float(params.shear[row]), 0.0],
            interpolation=interpolation,
            fill=list(spec.fill),
        )
    image = _jitter(image, params, row, spec)
    return _erase(normalize(image, mean, std), params, row, spec)


def eval_reference(photo: NDArray[np.uint8], spec: EvalSpec) -> Tensor:
    """The evaluation picture of a photo, by torchvision: the same numbers as timm's own evaluation transform.

    Args:
        photo: (H, W, 3) uint8, upright.
        spec: Which picture.

    Returns:
        (3, S, S) float32.

    Raises:
        DataError: The photo is not (H, W, 3) uint8.
    """
    return normalize(eval_crop(to_pil(photo), spec), spec.mean, spec.std)


def eval_crop(image: PILImage, spec: EvalSpec) -> PILImage:
    """The (S, S) evaluation picture before it becomes numbers."""
    from torchvision.transforms import InterpolationMode

    functional = _functional()
    interpolation = InterpolationMode(spec.interpolation)
    if spec.transform == "squash":
        return functional.resize(image, [spec.size, spec.size], interpolation)
    short_side = int(spec.size / spec.crop_fraction)  # rounded down, as in timm
    return functional.center_crop(functional.resize(image, [short_side], interpolation), [spec.size, spec.size])


def to_pil(photo: NDArray[np.uint8]) -> PILImage:
    """A PIL image of an (H, W, 3) uint8 photo.

    Raises:
        DataError: Another shape or type.
    """
    from PIL import Image

    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or 0 in photo.shape:
        raise DataError(f"a photo is (H, W, 3) uint8; got {photo.shape} {photo.dtype}. Decode it with data.decode")
    return Image.fromarray(np.ascontiguousarray(photo))


def normalize(image: PILImage, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, S, S) float32 of a PIL image: to [0, 1], minus mean, over std."""
    # Not v2: its to_dtype multiplies by 1/255 where ToTensor, hence timm, divides by 255; the last bit differs.
    from torchvision.transforms import functional

    return functional.normalize(functional.to_tensor(image), list(mean), list(std), inplace=True)


def _functional() -> Any:
    """The functions of torchvision; untyped, because its stubs leave out PIL images."""
    from torchvision.transforms.v2 import functional

    return functional


def resize_box(image: PILImage, corner: Sequence[float], extent: Sequence[float], spec: AugmentSpec) -> PILImage:
    """The (S, S) picture of a box with fractional edges, by the filter of the weights' evaluation transform."""
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    (x, y), (width, height) = corner, extent
    inside = (max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height))
    return image.resize((spec.size, spec.size), filters[spec.crop_interpolation], box=inside)


def _crop(image: PILImage, box: NDArray[np.float64], spec: AugmentSpec) -> PILImage:
    from PIL import Image

    functional = _functional()
    x, y, width, height = box.tolist()
    if spec.crop == "weights":
        return resize_box(image, [x, y], [width, height], spec)
    x, y, width, height = int(x), int(y), int(width), int(height)
    if x < 0 or y < 0 or x + width > image.width or y + height > image.height:
        canvas = Image.new("RGB", (width, height), spec.fill)
        canvas.paste(image, (-x, -y))
        image, x, y = canvas, 0, 0
    return functional.resized_crop(image, y, x, height, width, [spec.size, spec.size])


def _jitter(image: PILImage, params: BatchParams, row: int, spec: AugmentSpec) -> PILImage:
    functional = _functional()
    for kind in params.color_order[row].tolist():
        factor = float(params.factors[row, kind])
        if not spec.color_ranges[kind]:
            continue
        if kind == BRIGHTNESS:
            image = functional.adjust_brightness(image, factor)
        elif kind == CONTRAST:
            image = functional.adjust_contrast(image, factor)
        elif kind == SATURATION:
            image = functional.adjust_saturation(image, factor)
        else:
            image = functional.adjust_hue(image, factor)
    return image


def _erase(tensor: Tensor, params: BatchParams, row: int, spec: AugmentSpec) -> Tensor:
    import torch

    functional = _functional()
    x, y, width, height = params.erase[row].tolist()
    if not width:
        return tensor
    if spec.erase_value == "zero":
        return functional.erase(tensor, y, x, height, width, torch.zeros(3, 1, 1))
    values = torch.from_numpy(erase_noise(int(params.noise_offset[row]), x, y, width, height, spec.size))
    return functional.erase(tensor, y, x, height, width, values)


def erase_noise(offset: int, x: int, y: int, width: int, height: int, size: int) -> NDArray[np.float32]:
    """(3, height, width) normal numbers of a rectangle, from the noise bank at `offset`."""
    channel, line, column = np.ogrid[0:3, y : y + height, x : x + width]
    bank = noise_bank()
    return bank[(offset + (channel * size + line) * size + column) % len(bank)]


@dataclass(frozen=True)
class Views:
    """Several evaluation pictures of one photo, made from one decoding.

    They travel as one (3, 1, P) array, pixel after pixel and picture after picture, because their sides differ.

    Args:
        specs: At least two, all different.
    """

    specs: tuple[EvalSpec, ...]


def join_specs(specs: Sequence[EvalSpec]) -> EvalSpec | Views:
    """What has to be made of a photo for all of `specs`: one picture where they agree."""
    distinct = tuple(dict.fromkeys(specs))
    return distinct[0] if len(distinct) == 1 else Views(distinct)


def picture_shape(spec: EvalSpec | Views) -> tuple[int, int, int]:
    """(3, S, S) of one picture; (3, 1, P) of several."""
    if isinstance(spec, Views):
        return 3, 1, sum(one.size**2 for one in spec.specs)
    return 3, spec.size, spec.size


def eval_picture(photo: NDArray[np.uint8], spec: EvalSpec | Views) -> Tensor:
    """The float32 evaluation picture, or pictures, of an upright (H, W, 3) uint8 photo, as `picture_shape` says.

    Raises:
        DataError: The photo is not (H, W, 3) uint8.
    """
    if isinstance(spec, Views):
        return torch.cat([eval_reference(photo, one).reshape(3, 1, -1) for one in spec.specs], dim=2)
    return eval_reference(photo, spec)


def split_views(images: Tensor, spec: EvalSpec | Views) -> dict[EvalSpec, Tensor]:
    """(B, 3, S, S) for each way of looking, of a batch whose pictures `eval_picture` made."""
    if not isinstance(spec, Views):
        return {spec: images}
    parts = images.split([one.size**2 for one in spec.specs], dim=3)
    return {one: part.reshape(len(images), 3, one.size, one.size) for one, part in zip(spec.specs, parts, strict=True)}
