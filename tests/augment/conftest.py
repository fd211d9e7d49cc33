"""Real photographs, and how alike two pictures are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


@pytest.fixture(scope="session")
def birds(shared: Path) -> list[NDArray[np.uint8]]:
    """Eight photos of birds, about 500×375."""
    files = sorted((shared / "data/birds100/val").rglob("*.jpg"))[::40][:8]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@pytest.fixture(scope="session")
def scenes() -> list[NDArray[np.uint8]]:
    """Two photos of scikit-learn, 640×427: they are always there."""
    from sklearn.datasets import load_sample_images

    return [np.ascontiguousarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="session")
def large(scenes) -> list[NDArray[np.uint8]]:
    """Photos of 1600×1200 with detail down to the pixel: tiles of real ones."""
    return [np.ascontiguousarray(np.tile(scene, (3, 3, 1))[:1200, :1600]) for scene in scenes]


@pytest.fixture(scope="session")
def psnr() -> Callable[..., float]:
    """Peak signal to noise ratio in dB of two pictures in the units of 0 to `peak`."""

    def measure(a, b, peak: float = 255.0) -> float:
        error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
        return float(10 * np.log10(peak**2 / max(error, 1e-12)))

    return measure
