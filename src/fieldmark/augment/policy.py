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


# Their positions are the numbers in `BatchParams.ops`.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_SIGNED = np.array([1 <= number <= 9 for number in range(len(OPERATIONS))])
_NUM_BINS = 31
_DRAWS = 3  # operation, strength, sign

Policy = Literal["none", "trivial", "rand"]


def is_geometric(op: int) -> bool:
    """Whether operation number `op` moves pixels rather than changing their color."""
    return 1 <= op <= 5


def num_policy_uniforms(policy: Policy, num_ops: int) -> int:
    """Return how many uniform numbers `sample_policy` takes per photo."""
    return {"none": 0, "trivial": _DRAWS, "rand": _DRAWS * num_ops}[policy]


def sample_policy(
    policy: Policy, chances: NDArray[np.float64], *, magnitude: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(B, n) operations and their signed strengths, in their own unit, from (B, num_policy_uniforms) numbers.

    `trivial` draws one operation and its strength; `rand` draws operations with the strength of bin `magnitude` of 0 to
    30, shifts relative to the image's side of `size` pixels; `none` draws nothing.
    """
    if policy == "none":
        return np.zeros((len(chances), 0), dtype=np.int64), np.zeros((len(chances), 0))
    draws = chances.reshape(len(chances), -1, _DRAWS)
    ops = (draws[..., 0] * len(OPERATIONS)).astype(np.int64)
    bins = (draws[..., 1] * _NUM_BINS).astype(np.int64) if policy == "trivial" else magnitude
    strengths = _strengths(policy, size)[ops, bins]
    return ops, np.where(_SIGNED[ops] & (draws[..., 2] < 0.5), -strengths, strengths)


@cache
def _strengths(policy: Policy, size: int) -> NDArray[np.float64]:
    """(operations, bins) strengths of torchvision's augmentation space."""
    bins = np.linspace(0.0, 1.0, _NUM_BINS)
    is_wide = policy == "trivial"
    shear, shift, turn = (0.99, 32.0, 135.0) if is_wide else (0.3, 150 / 331 * size, 30.0)
    color, bits = (0.99, 6) if is_wide else (0.9, 4)
    table = np.zeros((len(OPERATIONS), _NUM_BINS))
    table[1:3], table[3:5], table[5], table[6:10] = shear * bins, shift * bins, turn * bins, color * bins
    table[10] = 8 - np.rint(np.arange(_NUM_BINS) / ((_NUM_BINS - 1) / bits))
    table[11] = 255.0 - 255.0 * bins
    return table


def operation_matrix(op: int, magnitude: float, size: int) -> NDArray[np.float64]:
    """(2, 3) matrix from output to input, in pixels with the image spanning [0, size]; colors move nothing."""
    half = size / 2
    cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
    matrices = {
        "ShearX": [[1.0, magnitude, 0.0], [0.0, 1.0, 0.0]],
        "ShearY": [[1.0, 0.0, 0.0], [magnitude, 1.0, 0.0]],
        "TranslateX": [[1.0, 0.0, -int(magnitude)], [0.0, 1.0, 0.0]],
        "TranslateY": [[1.0, 0.0, 0.0], [0.0, 1.0, -int(magnitude)]],
        # counter-clockwise, about the center
        "Rotate": [[cos, -sin, half - cos * half + sin * half], [sin, cos, half - sin * half - cos * half]],
    }
    return np.array(matrices.get(OPERATIONS[op], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def apply_operation(
    image: Any, op: int, magnitude: float, *, interpolation: InterpolationMode, fill: tuple[int, int, int]
) -> Any:
    """Apply one operation to a PIL image, or a (..., 3, H, W) uint8 tensor, as torchvision's policies do."""
    from torchvision.transforms.v2 import TrivialAugmentWide

    name = OPERATIONS[op]
    strength = magnitude / 255 if name == "Solarize" else magnitude  # there a share of the largest value
    apply: Any = TrivialAugmentWide()._apply_image_or_video_transform  # pyright: ignore[reportPrivateUsage]
    return apply(image, name, strength, interpolation, {"others": list(fill)})
