"""TrivialAugment and RandAugment: which operation, how strong, and what it does to a picture.

The operations and their ranges are torchvision's. Geometric ones are also given as a matrix, so that an executor can
compose them with its own warp.

Source:
    Müller and Hutter, "TrivialAugment", arXiv:2103.10158, table 5 (wide); Cubuk et al., "RandAugment",
    arXiv:1909.13719, sec. 3.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode


OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""Names of the operations; their places are the numbers in `BatchParams.ops`."""

_SIGNED = np.array([1 <= number <= 9 for number in range(len(OPERATIONS))])
_NUM_BINS = 31
_DRAWS = 3  # operation, strength, sign

Policy = Literal["none", "trivial", "rand"]


def is_geometric(op: int) -> bool:
    """Whether operation number `op` moves pixels rather than changing their color."""
    return 1 <= op <= 5


def num_policy_uniforms(policy: Policy, num_ops: int) -> int:
    """How many uniform numbers `sample_policy` takes per photo."""
    return {"none": 0, "trivial": _DRAWS, "rand": _DRAWS * num_ops}[policy]


def sample_policy(
    policy: Policy, chances: NDArray[np.float64], *, num_ops: int, magnitude: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Turn uniform numbers into operations and their strengths.

    Args:
        policy: `trivial` draws one operation and its strength; `rand` draws `num_ops` operations of fixed strength.
        chances: (B, num_policy_uniforms) in [0, 1).
        num_ops: RandAugment's N.
        magnitude: RandAugment's M, a bin of 0 to 30.
        size: Side of the image in pixels; RandAugment's shifts are relative to it.

    Returns:
        (B, n) operation numbers and (B, n) signed strengths in the operation's own unit; n is 0 for `none`.
    """
    if policy == "none":
        return np.zeros((len(chances), 0), dtype=np.int64), np.zeros((len(chances), 0))
    draws = chances.reshape(len(chances), -1, _DRAWS)
    ops = (draws[..., 0] * len(OPERATIONS)).astype(np.int64)
    if policy == "trivial":
        bins = (draws[..., 1] * _NUM_BINS).astype(np.int64)
    else:
        bins = np.full(ops.shape, magnitude, dtype=np.int64)
    strengths = _strengths(policy, size)[ops, bins]
    return ops, np.where(_SIGNED[ops] & (draws[..., 2] < 0.5), -strengths, strengths)


@cache
def _strengths(policy: Policy, size: int) -> NDArray[np.float64]:
    """(operations, bins) strengths of torchvision's augmentation space."""
    bins = np.linspace(0.0, 1.0, _NUM_BINS)
    wide = policy == "trivial"
    shear, shift, turn = (0.99, 32.0, 135.0) if wide else (0.3, 150 / 331 * size, 30.0)
    color, bits = (0.99, 6) if wide else (0.9, 4)
    table = np.zeros((len(OPERATIONS), _NUM_BINS))
    table[1:3], table[3:5], table[5], table[6:10] = shear * bins, shift * bins, turn * bins, color * bins
    table[10] = 8 - np.rint(np.arange(_NUM_BINS) / ((_NUM_BINS - 1) / bits))
    table[11] = 255.0 - 255.0 * bins
    return table


def operation_matrix(op: int, magnitude: float, size: int) -> NDArray[np.float64]:
    """Where an operation takes each output point from.

    Args:
        op: Number in `OPERATIONS`; one that changes colors leaves points where they are.
        magnitude: Its signed strength.
        size: Side of the image in pixels.

    Returns:
        (2, 3) matrix from output to input, in pixels with the image spanning [0, size].
    """
    half = size / 2
    match OPERATIONS[op]:
        case "ShearX":
            return np.array([[1.0, magnitude, 0.0], [0.0, 1.0, 0.0]])
        case "ShearY":
            return np.array([[1.0, 0.0, 0.0], [magnitude, 1.0, 0.0]])
        case "TranslateX":
            return np.array([[1.0, 0.0, -int(magnitude)], [0.0, 1.0, 0.0]])
        case "TranslateY":
            return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, -int(magnitude)]])
        case "Rotate":  # counter-clockwise, about the center
            c, s = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
            return np.array([[c, -s, half - c * half + s * half], [s, c, half - s * half - c * half]])
        case _:
            return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def apply_operation(
    image: Any, op: int, magnitude: float, *, interpolation: InterpolationMode, fill: tuple[int, int, int]
) -> Any:
    """One operation by torchvision's functions.

    Args:
        image: A PIL image, or a (..., 3, H, W) uint8 tensor.
        op: Number in `OPERATIONS`.
        magnitude: Its signed strength.
        interpolation: How geometric operations resample.
        fill: RGB outside the picture, 0 to 255.
    """
    from torchvision.transforms.v2 import functional

    if is_geometric(op):
        return _apply_geometric(image, op, magnitude, interpolation=interpolation, fill=fill)
    match OPERATIONS[op]:
        case "Brightness":
            return functional.adjust_brightness(image, 1.0 + magnitude)
        case "Color":
            return functional.adjust_saturation(image, 1.0 + magnitude)
        case "Contrast":
            return functional.adjust_contrast(image, 1.0 + magnitude)
        case "Sharpness":
            return functional.adjust_sharpness(image, 1.0 + magnitude)
        case "Posterize":
            return functional.posterize(image, int(magnitude))
        case "Solarize":
            return functional.solarize(image, magnitude)
        case "AutoContrast":
            return functional.autocontrast(image)
        case "Equalize":
            return functional.equalize(image)
        case _:
            return image


def _apply_geometric(
    image: Any, op: int, magnitude: float, *, interpolation: InterpolationMode, fill: tuple[int, int, int]
) -> Any:
    from torchvision.transforms.v2 import functional

    options: dict[str, Any] = {"interpolation": interpolation, "fill": list(fill)}
    degrees = math.degrees(math.atan(magnitude))
    match OPERATIONS[op]:
        case "ShearX":
            return functional.affine(image, 0.0, [0, 0], 1.0, [degrees, 0.0], center=[0, 0], **options)
        case "ShearY":
            return functional.affine(image, 0.0, [0, 0], 1.0, [0.0, degrees], center=[0, 0], **options)
        case "TranslateX":
            return functional.affine(image, 0.0, [int(magnitude), 0], 1.0, [0.0, 0.0], **options)
        case "TranslateY":
            return functional.affine(image, 0.0, [0, int(magnitude)], 1.0, [0.0, 0.0], **options)
        case _:
            return functional.rotate(image, magnitude, **options)
