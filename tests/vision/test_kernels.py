from __future__ import annotations

import colorsys

import numba
import numpy as np

from fieldmark.vision import kernels


def test_hue_turns_as_in_the_standard_library():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 200)).astype(np.float32)
    pixels[:, :20] = pixels[0, :20]  # greys, whose hue is undefined, stay
    for shift in (-0.5, -0.1, 0.0, 0.3, 0.5):
        red, green, blue = pixels.copy()
        kernels.turn_hue(red, green, blue, np.float32(shift))
        for place in range(200):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, place].astype(float) / 255))
            expected = np.multiply(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), 255)
            assert np.abs(expected - (red[place], green[place], blue[place])).max() < 0.01


def test_without_a_folder_to_cache_in_kernels_still_compile(monkeypatch):
    njit = numba.njit

    def nowhere(*signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*signature, **options)

    monkeypatch.setattr(kernels.numba, "njit", nowhere)
    assert kernels.compiled()(lambda value: value + 1)(2) == 3
