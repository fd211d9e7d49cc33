"""The competition's augmentation list in four libraries: files in, (B, 3, 224, 224) float32 batches out.

Crop, flips, affine, color, normalize, erase, in this order, as `recipes/competition.toml` has them. Where a library
cannot say the same, it does the nearest thing, and `DIFFERENCES` says which.

Shape letters: B batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224

Pipeline = Callable[[Sequence[Path]], Any]

DIFFERENCES = (
    "albumentations 2.0.8 refuses a crop scale above 1, so it draws from (0.6, 1.0), and its erasing fills with "
    "uniform noise before normalisation",
    "torchvision v2 decodes by torchvision.io and transforms uint8 tensors photo by photo",
)


def report_transforms(size: int) -> Any:
    """The list in torchvision, on PIL images: the competition's own pipeline."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.6, 1.2), ratio=(0.75, 1.33)),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomVerticalFlip(0.5),
            transforms.RandomAffine(20, translate=(0.1, 0.1), shear=5),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(0.3, scale=(0.02, 0.15), ratio=(0.3, 3.3), value="random"),
        ]
    )


def pil_torchvision() -> Pipeline:
    """What the report ran."""
    import torch
    from PIL import Image

    transform = report_transforms(SIZE)

    def prepare(files: Sequence[Path]) -> Any:
        return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

    return prepare


def torchvision_v2() -> Pipeline:
    """The same list on uint8 tensors."""
    import torch
    from torchvision import io
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.6, 1.2), ratio=(0.75, 1.33), antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.5),
            v2.RandomAffine(20, translate=(0.1, 0.1), shear=5),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.3, scale=(0.02, 0.15), ratio=(0.3, 3.3), value="random"),
        ]
    )

    def prepare(files: Sequence[Path]) -> Any:
        return torch.stack([transform(io.decode_image(str(file), io.ImageReadMode.RGB)) for file in files])

    return prepare


def albumentations() -> Pipeline:
    """The nearest list in albumentations, decoded by OpenCV."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for its newest version
    import albumentations as library
    import cv2
    import torch

    transform = library.Compose(
        [
            library.RandomResizedCrop((SIZE, SIZE), scale=(0.6, 1.0), ratio=(0.75, 1.33)),
            library.HorizontalFlip(p=0.5),
            library.VerticalFlip(p=0.5),
            library.Affine(
                rotate=(-20, 20),
                translate_percent={"x": (-0.1, 0.1), "y": (-0.1, 0.1)},
                shear={"x": (-5, 5), "y": (0, 0)},
                interpolation=cv2.INTER_NEAREST,
                p=1.0,
            ),
            library.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (-0.1, 0.1), p=1.0),
            library.Erasing(scale=(0.02, 0.15), ratio=(0.3, 3.3), fill="random", p=0.3),
            library.Normalize(MEAN, STD),
            library.ToTensorV2(),
        ]
    )

    def prepare(files: Sequence[Path]) -> Any:
        photos = [cv2.imread(str(file), cv2.IMREAD_COLOR_RGB) for file in files]
        return torch.stack([transform(image=photo)["image"] for photo in photos])

    return prepare


def full_decode(files: Sequence[Path]) -> Any:
    """Decoding alone, whole photos, by libjpeg-turbo: the floor of whatever reads the files."""
    import simplejpeg

    return [simplejpeg.decode_jpeg(file.read_bytes()) for file in files]


def scaled_decode(files: Sequence[Path]) -> Any:
    """Decoding alone, scaled in the DCT domain to what a crop of the whole photo needs."""
    from fieldmark.data.decode import DecodeSpec

    return [DecodeSpec((0, 0, 0), 10**9).read(file, min_short_side=SIZE) for file in files]


def _upright_size(file: Path) -> tuple[int, int]:
    """Width and height from the header, so that no pixel is decoded before the clock runs."""
    from PIL import Image

    with Image.open(file) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112, 1) > 4 else (width, height)


class Ours:
    """Fieldmark's own preparation of training photos, without a cache or from one.

    Args:
        files: All photos.
        folder: Where the cache is written.
        mode: `off`, `jpeg` or `uint8`.
        short_side: Of cached photos, in pixels.
        inspection: Of the files, still to be done: it shares what the cache decodes.
    """

    def __init__(
        self, files: Sequence[Path], folder: Path, *, mode: str, short_side: int = 320, inspection: Any = None
    ) -> None:
        import numpy as np

        from fieldmark.config import load_config
        from fieldmark.data.decode import DecodeSpec
        from fieldmark.models.catalog import InputConfig
        from fieldmark.runs.build import build_augment_spec
        from fieldmark.runs.dataset import PhotoReader, TrainPhotos

        config = load_config("competition", ["augment.executor=fast"])
        weights = InputConfig(SIZE, SIZE, 1.0, "bilinear", MEAN, STD, is_size_fixed=False)
        if inspection is None:
            sizes = np.asarray([_upright_size(file) for file in files], np.int64)
        else:
            sizes = inspection.estimate_sizes()
        self._settings = (files, sizes, folder, mode, short_side)
        self.numbers = {file: number for number, file in enumerate(files)}
        reader = PhotoReader(tuple(files), np.zeros(len(files), np.int64), DecodeSpec((0, 0, 0), 10**9))
        self._read = reader.read if inspection is None else inspection.read
        self.prepare = TrainPhotos(
            reader,
            self.open_cache(),
            sizes,
            build_augment_spec(config, weights, size=SIZE),
            seed=0,
            is_fast=True,
        )
        self.epoch = 0

    def open_cache(self) -> Any:
        """Write the cache, or find it written."""
        from fieldmark.data.cache import open_cache
        from fieldmark.data.decode import DecodeSpec
        from fieldmark.progress import Quiet

        files, sizes, folder, mode, short_side = self._settings
        cache, report = open_cache(
            files,
            sizes=sizes,
            mode=mode,
            short_side=short_side,
            folder=folder,
            disk_gigabytes=50.0,
            decoding=DecodeSpec((0, 0, 0), 10**9),
            read=self._read,
            threads=1,
            progress=Quiet(),
        )
        if mode != "off" and report.mode != mode:
            raise RuntimeError(f"no {mode} cache to measure: {report}")
        return cache

    def __call__(self, files: Sequence[Path]) -> Any:
        """(B, 3, 224, 224), with other random numbers at each call."""
        self.epoch += 1
        return self.prepare([self.numbers[file] for file in files], self.epoch).images
