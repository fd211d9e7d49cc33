"""Compiled inner loops of the fast executor: one warp, and color, normalization and erasing after it.

Compiled by Numba on first use and kept on disk, in __pycache__ or, where that is not writable, in the user's cache
folder; where neither is, each process compiles for itself. They hold no interpreter lock.

Written by hand because no library does it in one pass: OpenCV's warp rounds to uint8 and knows no per-stage borders,
and its color conversion, a table and a transpose after it cost more than the warp.

Pixels are blended in whole numbers, with weights in 1/256: a register holds twice as many of them, and the loops are
written so that each is vectorized: addresses, reads and arithmetic apart, counted from 0, and casts that keep 16 and
32 bits from growing to 64.

Shape letters: H, W height and width of the photo; S side of the output; K stages.
"""

from collections.abc import Callable
from math import ceil, floor
from typing import Any

import numba
import numpy as np
from numba import float32, float64, int64, types, uint8, uint16, uint32, void

BYTES = types.Array(uint8, 1, "C", readonly=True)
WORDS = types.Array(uint32, 2, "C")
PICTURE = types.Array(float32, 3, "C")
BANK = types.Array(float32, 1, "C", readonly=True)


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's njit with a fixed signature, cached on disk if any folder for it can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": True}
        try:
            return numba.njit(*signature, cache=True, **options)(function)
        except RuntimeError:  # "no locator available": nowhere to write
            return numba.njit(*signature, **options)(function)

    return decorate


@compiled(void(BYTES, BYTES, BYTES, uint16, types.Array(uint8, 1, "C")))
def average(before: Any, here: Any, after: Any, share: Any, out: Any) -> None:
    """Write the mean of three neighbors, the outer two with a weight of `share` / 256 each, the inner with the rest.

    All in 16 bits, which wrap around and back. The weight is of 16 bits too, since the compiler widens bytes to the
    size of their factor.
    """
    for i in range(len(out)):
        difference = np.uint16(before[i] + after[i] - 2 * here[i])
        out[i] = np.uint16(difference * share + 256 * here[i] + np.uint16(128)) >> 8


@compiled()
def pack(row: Any, words: Any) -> None:
    """Write a row of (3 w,) bytes as (w + 1,) words, the last one twice."""
    width = len(words) - 1
    line = words.view(np.uint8)
    for k in range(width):
        line[4 * k], line[4 * k + 1], line[4 * k + 2] = row[3 * k], row[3 * k + 1], row[3 * k + 2]
        line[4 * k + 3] = 0
    words[width] = words[width - 1]


@compiled(void(types.Array(uint8, 2, "C", readonly=True), int64, int64, uint16, uint16, WORDS))
def soften(photo: Any, left: int, top: int, across: Any, down: Any, words: Any) -> None:
    """Copy a part of a photo (H, 3 W) that begins at `left` and `top`, averaging each pixel with its neighbors in it.

    `across` and `down` are the weights of the pixels on either side, in 1/256, at most 128. Written are (h + 1, w + 1)
    words, red in the lowest byte, then green and blue, the last row and column twice, so that every pixel of the part
    has a neighbor.
    """
    height, width = words.shape[0] - 1, words.shape[1] - 1
    start, count = 3 * left, 3 * width
    padded, done = np.empty(count + 6, np.uint8), np.empty(count, np.uint8)
    middle = padded[3 : 3 + count]
    for row in range(height):
        here = photo[top + row, start : start + count]
        if not (across or down):
            pack(here, words[row])
            continue
        above = photo[top + max(row - 1, 0), start : start + count]
        below = photo[top + min(row + 1, height - 1), start : start + count]
        average(above, here, below, down, middle)
        for i in range(3):
            padded[i], padded[3 + count + i] = middle[i], middle[count - 3 + i]
        average(padded[:count], middle, padded[6:], across, done)
        pack(done, words[row])
    words[height] = words[height - 1]


@compiled()
def visible_span(matrix: Any, limits: Any, row: float, size: int, span: Any) -> None:
    """Narrow `span` to the columns of an output row whose points fall within `limits` (x low, high, y low, high).

    Each coordinate is linear along a row, so the columns are one interval and the inner loop needs no test.
    """
    for axis in range(2):
        step, low, high = matrix[axis, 0], limits[2 * axis], limits[2 * axis + 1]
        start = 0.5 * step + matrix[axis, 1] * row + matrix[axis, 2]
        if abs(step) < 1e-9:
            if not low <= start < high:
                span[1] = span[0]
        elif step > 0:
            span[0] = max(span[0], ceil((low - start) / step))
            span[1] = min(span[1], ceil((high - start) / step))
        else:
            span[0] = max(span[0], floor((high - start) / step) + 1)
            span[1] = min(span[1], floor((low - start) / step) + 1)
    span[1] = max(span[0], span[1])


@compiled()
def blend(a: Any, b: Any, c: Any, d: Any, at_a: Any, at_b: Any, at_c: Any, at_d: Any) -> Any:
    """Sum of four words, each times its weight: of one byte, or of two that are 16 bits apart."""
    return np.uint32(np.uint32(a * at_a) + np.uint32(b * at_b)) + np.uint32(np.uint32(c * at_c) + np.uint32(d * at_d))


@compiled(void(WORDS, float64[:, :, ::1], float64[:, ::1], float32[::1], PICTURE))
def warp(pixels: Any, matrices: Any, limits: Any, fill: Any, out: Any) -> None:
    """Write (3, S, S) values of 0 to 255, each looked up bilinearly; beyond the picture's edges its last pixels go on.

    The (H + 1, W + 1) pixels are whole words, as `soften` writes them: four cost less to read than twelve bytes. The
    (K, 2, 3) matrices are each from the output, and the last ends in these pixels; a point outside of the (K, 4) limits
    (x low, high, y low, high) after any of them shows the fill.
    """
    size = out.shape[1]
    stride = pixels.shape[1]
    words = pixels.reshape(-1)
    zero, right, bottom = np.float32(0), np.float32(pixels.shape[1] - 2), np.float32(pixels.shape[0] - 2)
    last = matrices[len(matrices) - 1]
    step_x, step_y = np.float32(last[0, 0]), np.float32(last[1, 0])
    indices, part_x, part_y = np.empty(size, np.int32), np.empty(size, np.uint32), np.empty(size, np.uint32)
    upper_left, upper_right = np.empty(size, np.uint32), np.empty(size, np.uint32)
    lower_left, lower_right = np.empty(size, np.uint32), np.empty(size, np.uint32)
    span = np.empty(2, np.int64)
    fine, half, one, below = np.float32(256), np.float32(0.5), np.uint64(1), np.uint64(stride)
    red_and_blue, byte, eight, whole = np.uint32(0xFF00FF), np.uint32(0xFF), np.uint32(8), np.uint32(256)
    for row in range(size):
        span[0], span[1] = 0, size
        for stage in range(len(matrices)):
            visible_span(matrices[stage], limits[stage], row + 0.5, size, span)
        first, end = min(max(span[0], 0), size), min(max(span[1], 0), size)
        count = end - first
        for channel in range(3):
            out[channel, row, :first] = fill[channel]
            out[channel, row, end:] = fill[channel]
        start_x = np.float32(last[0, 0] * (first + 0.5) + last[0, 1] * (row + 0.5) + last[0, 2] - 0.5)
        start_y = np.float32(last[1, 0] * (first + 0.5) + last[1, 1] * (row + 0.5) + last[1, 2] - 0.5)
        for k in range(count):
            x = np.int32(min(max(start_x + step_x * np.float32(k), zero), right) * fine + half)
            y = np.int32(min(max(start_y + step_y * np.float32(k), zero), bottom) * fine + half)
            part_x[k], part_y[k] = np.uint32(x) & byte, np.uint32(y) & byte
            indices[k] = np.int32((y >> np.int32(8)) * np.int32(stride)) + (x >> np.int32(8))
        for k in range(count):
            index = np.uint64(indices[k])
            upper_left[k], upper_right[k] = words[index], words[index + one]
            lower_left[k], lower_right[k] = words[index + below], words[index + below + one]
        reds, greens, blues = out[0, row, first:end], out[1, row, first:end], out[2, row, first:end]
        for k in range(count):
            at_d = np.uint32(part_x[k] * part_y[k] + np.uint32(128)) >> eight
            at_b, at_c = np.uint32(part_x[k] - at_d), np.uint32(part_y[k] - at_d)
            at_a = np.uint32(whole - part_x[k] - at_c)
            a, b, c, d = upper_left[k], upper_right[k], lower_left[k], lower_right[k]
            pair = blend(a & red_and_blue, b & red_and_blue, c & red_and_blue, d & red_and_blue, at_a, at_b, at_c, at_d)
            green = blend(
                a >> eight & byte, b >> eight & byte, c >> eight & byte, d >> eight & byte, at_a, at_b, at_c, at_d
            )
            reds[k] = np.float32(np.int32(pair & np.uint32(0xFFFF))) / fine
            greens[k] = np.float32(np.int32(green)) / fine
            blues[k] = np.float32(np.int32(np.uint32(pair) >> np.uint32(16))) / fine


@compiled()
def gray(r: Any, g: Any, b: Any) -> Any:
    """Luma of ITU-R BT.601, as in Pillow."""
    return np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b


@compiled()
def blend_with_gray(r: Any, g: Any, b: Any, factor: Any, mean: Any, is_own: bool) -> None:
    """Blend with each pixel's own gray (saturation), or with one `mean`: the picture's (contrast) or 0 (brightness)."""
    low, high = np.float32(0), np.float32(255)
    for i in range(len(r)):
        level = gray(r[i], g[i], b[i]) if is_own else mean
        r[i] = min(max(level + factor * (r[i] - level), low), high)
        g[i] = min(max(level + factor * (g[i] - level), low), high)
        b[i] = min(max(level + factor * (b[i] - level), low), high)


@compiled()
def sixth(hue: Any, offset: Any) -> Any:
    """Return how far from its maximum a channel is, 0 to 1, at a hue in sixths of the circle."""
    six = np.float32(6)
    k = hue + offset
    k -= six * np.floor(k * np.float32(1 / 6))  # not math.floor, which makes integers and stops vectorization
    return max(min(min(k, np.float32(4) - k), np.float32(1)), np.float32(0))


@compiled()
def turn_hue(r: Any, g: Any, b: Any, shift: Any) -> None:
    """True HSV hue turned by `shift` of the circle, in place, without branches so that it is vectorized.

    Source:
        Smith, "Color gamut transform pairs", SIGGRAPH 1978 (the hexcone model).
    """
    turn = np.float32(6) * shift
    tiny = np.float32(1e-6)
    for i in range(len(r)):
        red, green, blue = r[i], g[i], b[i]
        value = max(max(red, green), blue)
        chroma = value - min(min(red, green), blue)
        scale = np.float32(1) / max(chroma, tiny)
        from_red, from_green, from_blue = (green - blue) * scale, (blue - red) * scale, (red - green) * scale
        hue = from_blue + np.float32(4)
        hue = from_green + np.float32(2) if green == value else hue
        hue = from_red if red == value else hue
        hue += turn
        r[i] = value - chroma * sixth(hue, np.float32(5))
        g[i] = value - chroma * sixth(hue, np.float32(3))
        b[i] = value - chroma * sixth(hue, np.float32(1))


@compiled()
def recolor(r: Any, g: Any, b: Any, kind: int, factor: Any, mean: Any) -> None:
    """One color operation on a row of pixels: `kind` as in `sample.BRIGHTNESS` and its neighbors."""
    if kind <= 2:
        blend_with_gray(r, g, b, factor, mean if kind else np.float32(0), kind == 2)
    else:
        turn_hue(r, g, b, factor)


@compiled()
def gray_mean(out: Any, kinds: Any, factors: Any) -> Any:
    """Apply operations in place, then the mean gray of the picture, rounded as Pillow does."""
    size = out.shape[1]
    total = 0.0
    for row in range(size):
        r, g, b = out[0, row], out[1, row], out[2, row]
        for position in range(len(kinds)):
            recolor(r, g, b, kinds[position], factors[position], np.float32(0))
        part = np.float32(0)
        for i in range(size):
            part += gray(r[i], g[i], b[i])
        total += part
    return np.float32(floor(total / (size * size) + 0.5))


@compiled()
def cover(out: Any, erase: Any, bank: Any, noise_offset: int) -> None:
    """Write noise from the bank, or zero where it is empty, over a rectangle."""
    size = out.shape[1]
    x, y, width, height = erase[0], erase[1], erase[2], erase[3]
    for channel in range(3):
        for row in range(y, y + height):
            start = noise_offset + (channel * size + row) * size
            for i in range(x, x + width):
                out[channel, row, i] = bank[(start + i) % len(bank)] if len(bank) else np.float32(0)


@compiled(void(PICTURE, int64[::1], float32[::1], float32[::1], float32[::1], int64[::1], BANK, int64))
def finish(
    out: Any, kinds: Any, factors: Any, scale: Any, offset: Any, erase: Any, bank: Any, noise_offset: int
) -> None:
    """Color in the drawn order, normalize and erase (3, S, S), row by row so that it stays in the nearest cache.

    The n kinds of operations are in order, at most one of them contrast, with n factors. A value v becomes
    v · scale + offset. The rectangle `erase` (x, y, width, height) gets zeros if the bank of noise is empty.
    """
    size, count = out.shape[1], len(kinds)
    before = 0  # operations ahead of contrast, which needs the mean of the whole picture
    while before < count and kinds[before] != 1:
        before += 1
    mean = np.float32(0)
    if before < count:
        mean = gray_mean(out, kinds[:before], factors[:before])
    else:
        before = 0
    for row in range(size):
        r, g, b = out[0, row], out[1, row], out[2, row]
        for position in range(before, count):
            recolor(r, g, b, kinds[position], factors[position], mean)
        for channel in range(3):
            line, times, plus = out[channel, row], scale[channel], offset[channel]
            for i in range(size):
                line[i] = line[i] * times + plus
    if erase[2]:
        cover(out, erase, bank, noise_offset)
