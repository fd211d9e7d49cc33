"""One evaluation picture of a photo, or several for models that look at it differently.

Shape letters: B batch, S side in pixels, P pixels of all pictures of a photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.vision.augment import EvalSpec, eval_reference


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
