from __future__ import annotations

import colorsys

import numba
import numpy as np
import pytest

from fieldmark.augment import kernels


def test_hue_turns_as_in_the_standard_library():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 200)).astype(np.float32)
    pixels[:, :20] = pixels[0, :20]  # grays, whose hue is undefined, stay
    for shift in (-0.5, -0.1, 0.0, 0.3, 0.5):
        red, green, blue = pixels.copy()
        kernels.turn_hue(red, green, blue, np.float32(shift))
        for place in range(200):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, place].astype(float) / 255))
            expected = np.multiply(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), 255)
            assert np.abs(expected - (red[place], green[place], blue[place])).max() < 0.01


@pytest.mark.parametrize(("across", "down"), [(0, 0), (64, 0), (0, 17), (23, 64), (128, 128)])
def test_softening_weighs_the_neighbours_inside_the_part(across, down):
    photo = np.random.default_rng(0).integers(0, 256, (9, 40, 3)).astype(np.uint8)
    words = np.empty((6, 34), np.uint32)
    kernels.soften(photo.reshape(9, -1), 5, 2, across, down, words)
    part = np.pad(photo[2:7, 5:38].astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    part = (part[:-2] + part[2:]) * down / 256 + part[1:-1] * (1 - down / 128)
    part = (part[:, :-2] + part[:, 2:]) * across / 256 + part[:, 1:-1] * (1 - across / 128)
    softened = np.stack([words >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(float)
    assert np.abs(softened[:5, :33] - part).max() <= (1.001 if across and down else 0.501)
    assert np.array_equal(words[5], words[4])
    assert np.array_equal(words[:, 33], words[:, 32])
    assert not (words >> 24).any()


def test_looks_are_bilinear_to_a_256th_and_exact_on_pixels():
    photo = np.random.default_rng(1).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    words = np.empty((31, 31), np.uint32)
    kernels.soften(photo.reshape(30, -1), 0, 0, 0, 0, words)
    out = np.empty((3, 20, 20), np.float32)
    fill, anywhere = np.zeros(3, np.float32), np.array([[-1e9, 1e9, -1e9, 1e9]])

    def look(x: float, y: float) -> None:
        kernels.warp(words, np.array([[[1.0, 0, x], [0, 1, y]]]), anywhere, fill, out)

    look(10, 10)
    assert np.array_equal(out, photo[10:, 10:].transpose(2, 0, 1))
    look(3.3, 4.6)
    corners = [photo[4 + j : 24 + j, 3 + i : 23 + i] for j in (0, 1) for i in (0, 1)]
    expected = np.tensordot([0.7 * 0.4, 0.3 * 0.4, 0.7 * 0.6, 0.3 * 0.6], corners, axes=1)
    assert np.abs(out - expected.transpose(2, 0, 1)).max() < 1.5
    look(-100, -100)
    assert (out == photo[0, 0][:, None, None]).all()


def test_without_a_folder_to_cache_in_kernels_still_compile(monkeypatch):
    njit = numba.njit

    def nowhere(*signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*signature, **options)

    monkeypatch.setattr(kernels.numba, "njit", nowhere)
    assert kernels.compiled()(lambda value: value + 1)(2) == 3
