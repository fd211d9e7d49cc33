"""Numbers of photos become batches: decode or cache, random parameters, execution.

These objects travel to worker processes, so they hold plain values and open nothing before they are called.

Shape letters: B batch, N photos, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.data.decode import decode, decode_reduced
from fieldmark.data.loader import Batch
from fieldmark.errors import PhotoError
from fieldmark.vision.augment import RGB, EvalSpec, augment_reference
from fieldmark.vision.device import augment_device
from fieldmark.vision.sample import AugmentSpec, BatchParams, sample_params
from fieldmark.vision.views import Views, eval_picture, picture_shape
from fieldmark.vision.warp import augment_fast

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache


@dataclass(frozen=True)
class PhotoReader:
    """The pixels of photos by number.

    Args:
        files: N files.
        labels: (N,) int64 class numbers, -1 for unlabelled.
        background: RGB under transparent pixels.
        max_pixels: Limit of a photo's size.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    background: tuple[int, int, int]
    max_pixels: int

    def read(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 upright, whole."""
        return decode(self.files[number], background=self.background, max_pixels=self.max_pixels)

    def read_reduced(self, number: int, min_short_side: float) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 upright; the short side is at least `min_short_side`, or the photo's own."""
        reduced = decode_reduced(
            self.files[number],
            min_short_side=min_short_side,
            background=self.background,
            max_pixels=self.max_pixels,
        )
        return reduced.pixels


@dataclass(frozen=True)
class TrainPhotos:
    """Prepares augmented training batches: `prepare(numbers, epoch)`.

    Args:
        reader: Where pixels come from.
        cache: Reduced photos, or None.
        sizes: (N, 2) upright width and height of the photos.
        spec: What is drawn.
        mean: Per-channel mean of normalisation.
        std: Per-channel standard deviation of normalisation.
        seed: Of the run.
        is_fast: The fast executor; else torchvision's transforms one by one, on whole photos.
    """

    reader: PhotoReader
    cache: PhotoCache | None
    sizes: NDArray[np.int64]
    spec: AugmentSpec
    mean: RGB
    std: RGB
    seed: int
    is_fast: bool

    def __call__(self, numbers: Sequence[int], epoch: int) -> Batch:
        """(B, 3, S, S) float32, normalised and erased; the same whoever calls, in whatever company.

        Raises:
            PhotoError: A photo broke or vanished since it was inspected.
        """
        rows = np.asarray(numbers, np.int64)
        params = self.params(rows, epoch)
        if self.is_fast:
            photos = [self._pixels(int(number), params, row) for row, number in enumerate(rows)]
            array = augment_fast(photos, self.sizes[rows], params, self.spec, self.mean, self.std)
            images = torch.from_numpy(array)
        else:
            images = torch.stack(
                [
                    augment_reference(self.reader.read(int(number)), params, row, self.spec, self.mean, self.std)
                    for row, number in enumerate(rows)
                ]
            )
        return Batch(images, torch.from_numpy(rows), torch.from_numpy(self.reader.labels[rows]), ())

    def raw(self, numbers: Sequence[int], epoch: int) -> Batch:
        """(B, 3, H, W) uint8 photos as decoded or cached, each in the corner of its slot, for `augment_device`."""
        rows = np.asarray(numbers, np.int64)
        params = self.params(rows, epoch)
        photos = [self._pixels(int(number), params, row) for row, number in enumerate(rows)]
        sizes = np.asarray([(photo.shape[1], photo.shape[0]) for photo in photos], np.int64)
        slots = np.zeros((len(photos), 3, sizes[:, 1].max(), sizes[:, 0].max()), np.uint8)
        for slot, photo in zip(slots, photos, strict=True):
            slot[:, : photo.shape[0], : photo.shape[1]] = photo.transpose(2, 0, 1)
        labels = torch.from_numpy(self.reader.labels[rows])
        return Batch(torch.from_numpy(slots), torch.from_numpy(rows), labels, (), torch.from_numpy(sizes))

    def finish(self, batch: Batch, epoch: int, device: torch.device) -> Tensor:
        """(B, 3, S, S) float32 on the device: the photos of `raw`, augmented there as `__call__` would have."""
        assert batch.sizes is not None
        rows = batch.numbers.numpy()
        photos = batch.images.to(device, non_blocking=True)
        return augment_device(
            photos,
            batch.sizes.numpy(),
            self.sizes[rows],
            self.params(rows, epoch),
            self.spec,
            self.mean,
            self.std,
            compiled=device.type == "cuda",
        )

    def params(self, rows: NDArray[np.int64], epoch: int) -> BatchParams:
        """The random numbers of some photos."""
        return sample_params(self.spec, self.sizes[rows], seed=self.seed, epoch=epoch, numbers=rows)

    def _pixels(self, number: int, params: BatchParams, row: int) -> NDArray[np.uint8]:
        cached = self.cache.get(number) if self.cache is not None else None
        if cached is not None:
            return cached
        # Decode no larger than the crop needs: its shorter side becomes `size` pixels.
        _, _, width, height = params.box[row]
        needed = self.spec.size * float(min(self.sizes[number])) / max(float(min(width, height)), 1.0)
        return self.reader.read_reduced(number, needed)


@dataclass(frozen=True)
class EvalPhotos:
    """Prepares evaluation batches: the same picture of a photo every time.

    Args:
        reader: Where pixels come from.
        spec: The evaluation transform, or several.
        keeps_broken: A photo that cannot be read becomes a grey image and a problem, instead of an error.
    """

    reader: PhotoReader
    spec: EvalSpec | Views
    keeps_broken: bool

    def __call__(self, numbers: Sequence[int], epoch: int) -> Batch:
        """(B, 3, S, S) float32, normalised; several views as `vision.views` lays them out.

        Raises:
            PhotoError: A photo cannot be read, and `keeps_broken` is off.
        """
        rows = np.asarray(numbers, np.int64)
        images = torch.zeros((len(rows), *picture_shape(self.spec)))
        problems: list[tuple[int, str]] = []
        for place, number in enumerate(rows):
            try:
                images[place] = eval_picture(self.reader.read(int(number)), self.spec)
            except PhotoError as error:
                if not self.keeps_broken:
                    raise
                problems.append((place, error.reason))
        labels = torch.from_numpy(self.reader.labels[rows])
        return Batch(images, torch.from_numpy(rows), labels, tuple(problems))
