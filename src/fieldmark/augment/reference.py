"""The reference executor: parameters and a photo to a tensor, by torchvision's functions one after another.

Also the evaluation transforms. Every faster executor is tested against this module.

Shape letters: H, W height and width of a photo; S side of the square output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, FiniteFloat
from torch import Tensor

from fieldmark.augment.sample import RGB, AugmentSpec, BatchParams, apply_operation, noise_bank
from fieldmark.errors import DataError
from fieldmark.files import Positive


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """The picture that a photo is evaluated on; the ranges hold for specs that are read from files.

    `weights` resizes the short side to `size / crop_fraction` and cuts the center; `squash` resizes to a square.
    """

    transform: Literal["weights", "squash"]
    size: Annotated[int, Field(gt=0, le=8192)]  # side of the output, in pixels
    crop_fraction: Annotated[float, Field(gt=0, le=1)]  # `size` over the resized short side; unused by `squash`
    interpolation: Literal["bilinear", "bicubic"]  # filter of the resize, always antialiased
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]  # of normalization, for values in [0, 1]
    std: tuple[Positive, Positive, Positive]


@dataclass(frozen=True)
class Views:
    """Several evaluation pictures of one photo, made from one decoding; at least two, all different.

    They travel as one (3, 1, P) array, pixel after pixel and picture after picture, because their sides differ.
    """

    specs: tuple[EvalSpec, ...]


def augment_reference(photo: NDArray[np.uint8], params: BatchParams, row: int, spec: AugmentSpec) -> Tensor:
    """Execute one row of the parameters on an upright (H, W, 3) photo of full size as torchvision would: (3, S, S).

    The order is the competition's: crop and resize, flips, policy, affine, color, normalize, erase.
    """
    functional = _functional()
    image = _crop(to_pil(photo), params.box[row].tolist(), spec)
    if params.flip_x[row]:
        image = functional.horizontal_flip(image)
    if params.flip_y[row]:
        image = functional.vertical_flip(image)
    for op, magnitude in zip(params.ops[row].tolist(), params.magnitudes[row].tolist(), strict=True):
        image = apply_operation(image, op, magnitude, interpolation=spec.affine_interpolation, fill=spec.fill)
    if spec.has_affine:
        image = functional.affine(
            image,
            angle=float(params.angle[row]),
            translate=[int(pixels) for pixels in params.shift[row]],
            scale=1.0,
            shear=[float(params.shear[row]), 0.0],
            interpolation=functional.InterpolationMode(spec.affine_interpolation),
            fill=list(spec.fill),
        )
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for kind in params.color_order[row].tolist():
        if spec.color_ranges[kind]:
            image = getattr(functional, names[kind])(image, float(params.factors[row, kind]))
    tensor = _normalize(image, spec.mean, spec.std)
    x, y, width, height = params.erase[row].tolist()
    if not width:
        return tensor
    values = torch.zeros(3, 1, 1)
    if spec.erase_value == "random":
        values = torch.from_numpy(erase_noise(int(params.noise_offset[row]), x, y, width, height, spec.size))
    return functional.erase(tensor, y, x, height, width, values)


def _functional() -> Any:
    """The functions of torchvision; untyped, because its stubs leave out PIL images."""
    from torchvision.transforms.v2 import functional

    return functional


def to_pil(photo: NDArray[np.uint8]) -> Image.Image:
    """A PIL image of a photo; raises DataError unless it is (H, W, 3) uint8."""
    require_photo(photo)
    return Image.fromarray(np.ascontiguousarray(photo))


def require_photo(photo: NDArray[Any]) -> None:
    """Raise DataError unless the photo is (H, W, 3) uint8."""
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or 0 in photo.shape:
        raise DataError(f"a photo is (H, W, 3) uint8; got {photo.shape} {photo.dtype}. Decode it with data.decode")


def _crop(image: Image.Image, box: Sequence[float], spec: AugmentSpec) -> Image.Image:
    if spec.crop == "weights":
        return resize_box(image, box, spec)
    x, y, width, height = map(int, box)
    if x < 0 or y < 0 or x + width > image.width or y + height > image.height:
        canvas = Image.new("RGB", (width, height), spec.fill)
        canvas.paste(image, (-x, -y))
        image, x, y = canvas, 0, 0
    return _functional().resized_crop(image, y, x, height, width, [spec.size, spec.size])


def resize_box(image: Image.Image, box: Sequence[float], spec: AugmentSpec) -> Image.Image:
    """The (S, S) picture of a box (x, y, width, height), by the filter of the weights' evaluation transform."""
    x, y, width, height = box
    inside = (max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height))
    return image.resize((spec.size, spec.size), Image.Resampling[spec.crop_interpolation.upper()], box=inside)


def erase_noise(offset: int, x: int, y: int, width: int, height: int, size: int) -> NDArray[np.float32]:
    """(3, height, width) normal numbers of a rectangle, from the noise bank at `offset`."""
    channel, line, column = np.ogrid[0:3, y : y + height, x : x + width]
    bank = noise_bank()
    return bank[(offset + (channel * size + line) * size + column) % len(bank)]


def _normalize(image: Image.Image, mean: RGB, std: RGB) -> Tensor:
    # Not v2: its to_dtype multiplies by 1/255 where ToTensor, hence timm, divides by 255; the last bit differs.
    from torchvision.transforms import functional

    return functional.normalize(functional.to_tensor(image), list(mean), list(std), inplace=True)


def eval_reference(photo: NDArray[np.uint8], spec: EvalSpec) -> Tensor:
    """(3, S, S) evaluation picture of an upright (H, W, 3) photo: the same numbers as timm's own transform."""
    functional, image, square = _functional(), to_pil(photo), [spec.size, spec.size]
    interpolation = functional.InterpolationMode(spec.interpolation)
    if spec.transform == "squash":
        image = functional.resize(image, square, interpolation)
    else:
        short_side = int(spec.size / spec.crop_fraction)  # rounded down, as in timm
        image = functional.center_crop(functional.resize(image, [short_side], interpolation), square)
    return _normalize(image, spec.mean, spec.std)


def join_specs(specs: Sequence[EvalSpec]) -> EvalSpec | Views:
    """Return what has to be made of a photo for all of `specs`: one picture where they agree."""
    distinct = tuple(dict.fromkeys(specs))
    return distinct[0] if len(distinct) == 1 else Views(distinct)


def picture_shape(spec: EvalSpec | Views) -> tuple[int, int, int]:
    """(3, S, S) of one picture; (3, 1, P) of several."""
    if isinstance(spec, Views):
        return 3, 1, sum(one.size**2 for one in spec.specs)
    return 3, spec.size, spec.size


def eval_picture(photo: NDArray[np.uint8], spec: EvalSpec | Views) -> Tensor:
    """The evaluation picture, or pictures, of an upright (H, W, 3) photo, as `picture_shape` says."""
    if isinstance(spec, Views):
        return torch.cat([eval_reference(photo, one).reshape(3, 1, -1) for one in spec.specs], dim=2)
    return eval_reference(photo, spec)


def split_views(images: Tensor, spec: EvalSpec | Views) -> dict[EvalSpec, Tensor]:
    """(B, 3, S, S) for each way of looking, of a batch whose pictures `eval_picture` made."""
    if not isinstance(spec, Views):
        return {spec: images}
    parts = images.split([one.size**2 for one in spec.specs], dim=3)
    return {one: part.reshape(len(images), 3, one.size, one.size) for one, part in zip(spec.specs, parts, strict=True)}
