"""Where each output point of an augmented picture comes from: crop, flips, policy and affine as matrices.

Points are continuous: a picture of side S spans [0, S] and the centre of pixel i is i + 0.5, as in Pillow. A matrix is
(..., 2, 3) and takes a point of the output to a point of the input, so that a warp can look each output pixel up.

Shape letters: B photos; S side of the output; K steps in the order in which an output point passes them.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fieldmark.vision.policy import operation_matrix
from fieldmark.vision.sample import AugmentSpec, BatchParams

Matrix = NDArray[np.float64]


def compose(outer: Matrix, inner: Matrix) -> Matrix:
    """The matrix that applies `inner` to a point first, then `outer`."""
    linear = outer[..., :2]
    return np.concatenate([linear @ inner[..., :2], linear @ inner[..., 2:] + outer[..., 2:]], axis=-1)


def affine_matrices(params: BatchParams, size: int) -> Matrix:
    """(B, 2, 3) inverse affine matrices of torchvision: rotation and x-shear about the centre, shift in pixels."""
    turn, tangent, half = np.radians(params.angle), np.tan(np.radians(params.shear)), size / 2
    cos, sin = np.cos(turn), np.sin(turn)
    linear = np.stack([cos - sin * tangent, cos * tangent + sin, -sin, cos], axis=1).reshape(-1, 2, 2)
    offset = half - linear @ (half + params.shift)[:, :, None]
    return np.concatenate([linear, offset], axis=2)


def picture_matrices(params: BatchParams, spec: AugmentSpec) -> list[Matrix]:
    """From the output back to the crop resized to S×S, step by step.

    A point that leaves [0, S]² after any of them shows the fill, because the stages one after another would have lost
    it there.

    Returns:
        K arrays (B, 2, 3), each from the output: cumulative. K is 0 if nothing moves after the crop and the flips.
    """
    steps: list[Matrix] = []
    if spec.has_affine:
        steps.append(affine_matrices(params, spec.size))
    for column in reversed(range(params.ops.shape[1])):
        pairs = zip(params.ops[:, column].tolist(), params.magnitudes[:, column].tolist(), strict=True)
        steps.append(np.stack([operation_matrix(op, magnitude, spec.size) for op, magnitude in pairs]))
    return [*accumulate(steps, lambda first, then: compose(then, first))]


def crop_matrices(params: BatchParams, size: int) -> Matrix:
    """(B, 2, 3) from the S×S crop, flipped, to upright source pixels."""
    corner, extent = params.box[:, :2], params.box[:, 2:]
    flips = np.stack([params.flip_x, params.flip_y], axis=1)
    scale = np.where(flips, -extent, extent) / size
    matrices = np.zeros((len(corner), 2, 3))
    matrices[:, 0, 0], matrices[:, 1, 1] = scale[:, 0], scale[:, 1]
    matrices[:, :, 2] = corner + np.where(flips, extent, 0.0)
    return matrices
