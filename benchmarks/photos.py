"""Photographs to measure on: real pictures laid out at the sizes asked for, and folders of links to few photos."""

from __future__ import annotations

import importlib.util
import io
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.record import PHOTOS

SMALL = (500, 375, 126_000)
LARGE = (1600, 1200, 437_000)
"""Width, height, and mean bytes of a file, as in data sets of photographs found on the web."""


def find_pictures(most: int) -> tuple[list[Image.Image], str]:
    """Real pictures to lay out, and where they are from: scikit-learn's two, and birds100 where it is there."""
    package = importlib.util.find_spec("sklearn")  # found, not imported: that takes seconds
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "datasets" / "images"
    pictures = [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
    birds = sorted((PHOTOS / "train").rglob("*.jpg"))
    chosen = birds[:: max(len(birds) // most, 1)][:most]
    pictures += [Image.open(file).convert("RGB") for file in chosen]
    source = "china.jpg and flower.jpg of scikit-learn (640x427)"
    return pictures, source + (f" and {len(chosen)} photos of birds100 (227x227)" if chosen else "")


def make_photos(
    pictures: Sequence[Image.Image], folder: Path, *, count: int, shape: tuple[int, int, int]
) -> tuple[list[Path], str]:
    """Write `count` JPEGs of one size, at the quality whose files have the mean size asked for.

    Each is a mosaic of pictures at their own resolution: nothing is enlarged, so there is as much detail in a pixel,
    and as much work for the decoder, as in a photograph.

    Returns:
        The files, and how they were made.
    """
    width, height, num_bytes = shape
    rng = random.Random(0)
    photos = [_mosaic(pictures, width, height, rng) for _ in range(count)]
    low, high = 30, 100
    while low < high:  # the quality whose mean size is nearest from below
        middle = (low + high + 1) // 2
        sizes = [len(_encode(photo, middle)) for photo in photos[:8]]
        low, high = (middle, high) if np.mean(sizes) <= num_bytes else (low, middle - 1)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, photo in enumerate(photos):
        files.append(folder / f"{number:04d}.jpg")
        files[-1].write_bytes(_encode(photo, low))
    mean = np.mean([file.stat().st_size for file in files]) / 1000
    made = f"{count} photos of {width}x{height}, JPEG 4:2:0 of quality {low}, {mean:.0f} KB in the mean"
    return files, made


def link_photos(files: Sequence[Path], folder: Path, *, count: int, classes: int) -> None:
    """A folder of `count` hard links to the files, in `classes` class folders; the files are on the same disk."""
    for number in range(classes):
        (folder / f"class{number:03d}").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        os.link(files[number % len(files)], folder / f"class{number % classes:03d}" / f"{number:07d}.jpg")


def birds_subset(folder: Path, *, train: int, val: int) -> str:
    """Copies of some of birds100's photos under `folder`/train and `folder`/val, spread over its classes.

    Copies, since the data may be on another disk and caches are named after it.

    Returns:
        What the folder holds.

    Raises:
        FileNotFoundError: birds100 is absent.
    """
    if not PHOTOS.is_dir():
        raise FileNotFoundError(
            f"{PHOTOS} is absent: this benchmark trains on birds100, which lies beside the repository"
        )
    total: dict[str, int] = {}
    for split, count in (("train", train), ("val", val)):
        files = sorted((PHOTOS / split).rglob("*.jpg"))
        places = np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int))
        for place in places:
            copy = folder / split / files[place].parent.name / files[place].name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(files[place].read_bytes())
        total[split] = len(places)
    return f"birds100 (227x227): {total['train']} of its training photos"


def _mosaic(pictures: Sequence[Image.Image], width: int, height: int, rng: random.Random) -> Image.Image:
    """Lay pictures beside each other from a random place above and left of the canvas, so that few give many."""
    canvas = Image.new("RGB", (width, height))
    top = -rng.randrange(min(picture.height for picture in pictures))
    while top < height:
        left, shelf = -rng.randrange(min(picture.width for picture in pictures)), height
        while left < width:
            picture = rng.choice(pictures)
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            canvas.paste(picture, (left, top))
            left, shelf = left + picture.width, min(shelf, picture.height)
        top += shelf
    return canvas


def _encode(photo: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()
