from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_striped():
    """Write a folder of two classes, plain and striped, of so many photos each."""

    def write(folder, count):
        for number, name in enumerate(("plain", "striped")):
            for place in range(count):
                path = folder / name / f"{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(place).integers(0, 120, (40, 40, 3))
                pixels[:: 2 + 6 * number] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(path)
        return folder

    return write
