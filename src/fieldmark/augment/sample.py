"""One batch's random parameters from (seed, epoch, photo number), drawn in one place and executed in others.

The numbers come from a counter-based generator, so a photo's augmentation depends on nothing but those three: neither
on the batch around it, nor on how many workers or processes share the work. The law of each parameter is torchvision's.

Shape letters: B photos of a batch, N draws, n operations of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fieldmark.augment.policy import num_policy_uniforms, sample_policy
from fieldmark.errors import DataError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of `BatchParams.factors` and values of `BatchParams.color_order`."""

_ATTEMPTS = 10  # torchvision's RandomResizedCrop and RandomErasing give up after as many
_CHUNK = 1 << 15

Rows = NDArray[np.intp]
Draw = Callable[[Rows, int], NDArray[np.float64]]  # (rows, count) -> their first (len(rows), count) numbers


@dataclass(frozen=True, slots=True)
class AugmentSpec:
    """What is drawn and how it is executed, as plain values. `config.AugmentConfig` says what each field means.

    Args:
        size: Side of the training image, in pixels.
        crop_fraction: For `crop = "weights"`: side of the crop over the resized short side, in (0, 1].
        crop_interpolation: For `crop = "weights"`: the filter of the weights' evaluation transform. All other crops are
            bilinear, as torchvision's are by default.
    """

    size: int
    crop: Literal["random_resized", "zoom", "squash", "weights"]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    crop_fraction: float
    crop_interpolation: Literal["bilinear", "bicubic"]
    horizontal_flip: float
    vertical_flip: float
    degrees: float
    translate: tuple[float, float]
    shear: float
    affine_interpolation: Literal["nearest", "bilinear"]
    fill: tuple[int, int, int]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    policy: Literal["none", "trivial", "rand"]
    rand_ops: int
    rand_magnitude: int
    erase: float
    erase_scale: tuple[float, float]
    erase_ratio: tuple[float, float]
    erase_value: Literal["random", "zero"]

    @property
    def has_affine(self) -> bool:
        """Whether rotation, shift or shear can be drawn."""
        return bool(self.degrees or self.shear or any(self.translate))

    @property
    def color_ranges(self) -> tuple[float, float, float, float]:
        """Half widths of the ranges of brightness, contrast, saturation and hue; 0 is off."""
        return (self.brightness, self.contrast, self.saturation, self.hue)


@dataclass(frozen=True, slots=True)
class BatchParams:
    """The random numbers of a batch: a structure of arrays with one row per photo.

    Args:
        numbers: (B,) int64 photo numbers that the rows belong to.
        box: (B, 4) float64 x, y, width, height of the crop in upright source pixels. May reach outside the photo
            with `crop = "zoom"`.
        is_fallback: (B,) bool, ten attempts failed and the crop is the fixed center one.
        flip_x: (B,) bool, mirrored.
        flip_y: (B,) bool, upside down.
        angle: (B,) float64 rotation in degrees, clockwise positive as in torchvision.
        shear: (B,) float64 degrees along x.
        shift: (B, 2) float64 x, y in whole output pixels.
        factors: (B, 4) float64 factors of brightness, contrast and saturation (1 = as is) and shift of hue in turns
            of the color circle (0 = as is).
        color_order: (B, 4) int64 permutation of `BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`: first applied first.
        ops: (B, n) int64 numbers in `policy.OPERATIONS`.
        magnitudes: (B, n) float64 signed strength of each, in the operation's own unit.
        erase: (B, 4) int64 x, y, width, height in output pixels; width 0 erases nothing.
        noise_offset: (B,) int64 start in the noise bank. Channel c, row y, column x of an image of side S takes the
            number at (offset + (c S + y) S + x) mod `NOISE_SIZE`.
    """

    numbers: NDArray[np.int64]
    box: NDArray[np.float64]
    is_fallback: NDArray[np.bool_]
    flip_x: NDArray[np.bool_]
    flip_y: NDArray[np.bool_]
    angle: NDArray[np.float64]
    shear: NDArray[np.float64]
    shift: NDArray[np.float64]
    factors: NDArray[np.float64]
    color_order: NDArray[np.int64]
    ops: NDArray[np.int64]
    magnitudes: NDArray[np.float64]
    erase: NDArray[np.int64]
    noise_offset: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, places: Any) -> BatchParams:
        """The rows at `places`: anything that indexes the first axis of an array and keeps it."""
        return BatchParams(**{field.name: getattr(self, field.name)[places] for field in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[BatchParams]) -> BatchParams:
        """Rows of all parts, in order."""
        names = [field.name for field in fields(BatchParams)]
        return BatchParams(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def sample_params(spec: AugmentSpec, sizes: ArrayLike, *, seed: int, epoch: int, numbers: ArrayLike) -> BatchParams:
    """Draw the parameters of a batch.

    Args:
        spec: What is drawn.
        sizes: (B, 2) width and height of the upright source photos, in pixels.
        seed: Seed of the run.
        epoch: 0-based epoch.
        numbers: (B,) photo numbers in the index.

    Raises:
        DataError: Sizes that are not positive, or not one pair per number.
    """
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    places = np.asarray(numbers, dtype=np.int64).reshape(-1)
    if len(sizes) != len(places) or not np.all(sizes >= 1):
        raise DataError(
            f"need one positive width and height per photo; got {len(sizes)} sizes for {len(places)} photos"
        )

    counts = {
        CROP: 4,
        FLIP: 2,
        AFFINE: 4,
        COLOR: 8,
        POLICY: num_policy_uniforms(spec.policy, spec.rand_ops),
        ERASE: 8 if spec.erase else 0,
    }
    draws = uniform_streams(seed, epoch, places, counts)
    box, is_fallback = _crop_boxes(spec, sizes, draws[CROP], _later(seed, epoch, places, CROP))
    flips = draws[FLIP] < (spec.horizontal_flip, spec.vertical_flip)
    angle, shear, shift = _affine(spec, draws[AFFINE])
    factors, color_order = _color(spec, draws[COLOR])
    ops, magnitudes = sample_policy(
        spec.policy, draws[POLICY], num_ops=spec.rand_ops, magnitude=spec.rand_magnitude, size=spec.size
    )
    erase, noise_offset = _erase(spec, draws[ERASE], _later(seed, epoch, places, ERASE))
    return BatchParams(
        numbers=places,
        box=box,
        is_fallback=is_fallback,
        flip_x=flips[:, 0],
        flip_y=flips[:, 1],
        angle=angle,
        shear=shear,
        shift=shift,
        factors=factors,
        color_order=color_order,
        ops=ops,
        magnitudes=magnitudes,
        erase=erase,
        noise_offset=noise_offset,
    )


def crop_fallback_rate(spec: AugmentSpec, sizes: ArrayLike, *, draws: int) -> float:
    """Share of crops that RandomResizedCrop gives up on and replaces by a fixed center crop.

    Args:
        spec: Whose `crop`, `crop_scale` and `crop_ratio` are used; 0.0 unless `crop` is `random_resized`.
        sizes: (N, 2) width and height of the photos.
        draws: Crops drawn per photo.
    """
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    total = len(sizes) * draws
    if spec.crop != "random_resized" or not total:
        return 0.0
    failed = 0
    for start in range(0, total, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, total))
        part = sizes[numbers // draws]
        first = uniforms(0, 0, numbers, stream=CROP, count=4)
        failed += int(_crop_boxes(spec, part, first, _later(0, 0, numbers, CROP))[1].sum())
    return failed / total


def _later(seed: int, epoch: int, numbers: NDArray[np.int64], stream: int) -> Draw:
    return lambda rows, count: uniforms(seed, epoch, numbers[rows], stream=stream, count=count)


def _crop_boxes(
    spec: AugmentSpec, sizes: NDArray[np.float64], first: NDArray[np.float64], draw: Draw
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(B, 4) boxes and (B,) whether they are the fallback."""
    width, height = sizes[:, 0], sizes[:, 1]
    never = np.zeros(len(sizes), dtype=np.bool_)
    if spec.crop == "squash":
        return np.stack([np.zeros_like(width), np.zeros_like(width), width, height], axis=1), never
    if spec.crop == "weights":
        return _weights_boxes(spec, sizes), never

    def shapes(rows: Rows, chances: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        area = (width * height)[rows, None] * _between(chances[..., 0], spec.crop_scale)
        ratio = np.exp(_between(chances[..., 1], np.log(spec.crop_ratio)))
        return np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))

    def fits(rows: Rows, w: NDArray[np.float64], h: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (spec.crop == "zoom") | ((w > 0) & (w <= width[rows, None]) & (h > 0) & (h <= height[rows, None]))

    (w, h, u, v), found = _first_fit(first, draw, shapes, fits)
    w, h = np.maximum(w, 1), np.maximum(h, 1)
    drawn = np.stack([_place(width, w, u), _place(height, h, v), w, h], axis=1)
    return np.where(found[:, None], drawn, _center_boxes(sizes, spec.crop_ratio)), np.logical_not(found)


def _weights_boxes(spec: AugmentSpec, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the evaluation transform sees of each photo, in source pixels.

    It resizes the short side to size / crop_fraction and cuts the center; both round to whole pixels as torchvision's
    Resize and CenterCrop do, because half a pixel more or less is a visibly different picture.
    """
    short = sizes.min(axis=1, keepdims=True)
    resized = np.floor(np.floor(spec.size / spec.crop_fraction) * sizes / short)
    corner = np.rint((resized - spec.size) / 2)
    return np.concatenate([corner, np.full_like(corner, spec.size)], axis=1) * np.tile(sizes / resized, 2)


def _first_fit(
    first: NDArray[np.float64],
    draw: Draw,
    shapes: Callable[[Rows, NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]],
    fits: Callable[[Rows, NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Torchvision's ten attempts: (4, count) w, h and two more uniform numbers, and (count,) whether one fitted.

    Most rows fit at once, so only the others draw all ten.
    """
    result, found = np.zeros((len(first), 4)), np.zeros(len(first), dtype=np.bool_)
    for tries in (1, _ATTEMPTS):
        rows = np.flatnonzero(~found)
        if not len(rows):
            break
        chances = (first if tries == 1 else draw(rows, 4 * tries)).reshape(len(rows), tries, 4)
        w, h = shapes(rows, chances)
        good = fits(rows, w, h)
        best = (np.arange(len(rows)), good.argmax(axis=1))
        result[rows] = np.stack([w[best], h[best], chances[..., 2][best], chances[..., 3][best]], axis=1)
        found[rows] = good.any(axis=1)
    return result.T, found


def _center_boxes(sizes: NDArray[np.float64], ratio: tuple[float, float]) -> NDArray[np.float64]:
    """The fallback of torchvision: as much of the photo's center as the range of ratios lets in."""
    width, height = sizes[:, 0], sizes[:, 1]
    w = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    h = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1)


def _place(whole: NDArray[np.float64], part: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Start of `part` in `whole`, each whole pixel equally likely; a larger part starts at or before 0."""
    return np.sign(whole - part) * np.floor(u * (np.abs(whole - part) + 1))


def _affine(
    spec: AugmentSpec, chances: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(B,) angle, (B,) shear and (B, 2) shift; torchvision rounds the shift to whole pixels."""
    centered = 2 * chances - 1
    shift = np.rint(centered[:, 2:] * np.multiply(spec.translate, spec.size))
    return centered[:, 0] * spec.degrees, centered[:, 1] * spec.shear, shift + 0.0  # + 0.0 turns -0 into 0


def _color(spec: AugmentSpec, chances: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(B, 4) factors and (B, 4) order of ColorJitter."""
    widths = np.array(spec.color_ranges)
    low = np.array([*np.maximum(0, 1 - widths[:3]), -widths[3]])
    high = np.array([*(1 + widths[:3]), widths[3]])
    order = np.argsort(chances[:, 4:], axis=1, kind="stable")
    return low + chances[:, :4] * (high - low), order.astype(np.int64)


def _erase(spec: AugmentSpec, chances: NDArray[np.float64], draw: Draw) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(B, 4) rectangle and (B,) start in the noise bank of RandomErasing."""
    box, offset = np.zeros((len(chances), 4), dtype=np.int64), np.zeros(len(chances), dtype=np.int64)
    if not spec.erase:
        return box, offset
    happens = np.flatnonzero(chances[:, 0] < spec.erase)

    def shapes(rows: Rows, chances: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        area = spec.size**2 * _between(chances[..., 0], spec.erase_scale)
        ratio = np.exp(_between(chances[..., 1], np.log(spec.erase_ratio)))
        return np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))

    def fits(rows: Rows, w: NDArray[np.float64], h: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (w < spec.size) & (h < spec.size)

    # The first four numbers decided whether and where in the noise.
    def later(rows: Rows, count: int) -> NDArray[np.float64]:
        return draw(happens[rows], count + 4)[:, 4:]

    (w, h, u, v), found = _first_fit(chances[happens, 4:], later, shapes, fits)
    drawn = np.stack([_place(np.full_like(w, spec.size), w, u), _place(np.full_like(h, spec.size), h, v), w, h], axis=1)
    box[happens] = np.where((found & (w > 0) & (h > 0))[:, None], drawn, 0)
    offset[:] = chances[:, 1] * NOISE_SIZE
    return box, offset


def _between(u: NDArray[np.float64], ends: ArrayLike) -> NDArray[np.float64]:
    low, high = np.asarray(ends, dtype=np.float64)
    return low + u * (high - low)


NOISE_SIZE = 1 << 20
"""Length of the noise bank."""

CROP, FLIP, AFFINE, COLOR, POLICY, ERASE, MIX = range(7)
"""Streams: each part draws from its own, so switching one off leaves the others' numbers alone."""


def uniforms(seed: int, epoch: int, numbers: ArrayLike, *, stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers that are a pure function of their arguments.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        numbers: (B,) photo numbers (or steps), each 0 to 2**32 - 1.
        stream: Which part draws; numbers of two streams are independent.
        count: Draws per number.

    Returns:
        (B, count) in [0, 1), multiples of 2**-32.

    Raises:
        DataError: A seed, epoch or number outside its range.
    """
    return uniform_streams(seed, epoch, numbers, {stream: count})[stream]


def uniform_streams(
    seed: int, epoch: int, numbers: ArrayLike, counts: Mapping[int, int]
) -> dict[int, NDArray[np.float64]]:
    """`uniforms` of several streams in one go, which saves most of the time of small batches.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        numbers: (B,) photo numbers (or steps), each 0 to 2**32 - 1.
        counts: Draws per number, by stream.

    Returns:
        By stream, (B, count) in [0, 1).

    Raises:
        DataError: A seed, epoch or number outside its range.
    """
    array = np.asarray(numbers, dtype=np.int64).reshape(-1)
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 32 and np.all((array >= 0) & (array < 1 << 32))):
        raise DataError(
            "random numbers need a seed of 0 to 2**64 - 1 and epochs and photo numbers of 0 to 2**32 - 1; "
            f"got seed {seed}, epoch {epoch}, numbers {array.min(initial=0)} to {array.max(initial=0)}"
        )
    blocks = {stream: -(-count // 4) for stream, count in counts.items()}
    counter = np.empty((len(array), sum(blocks.values()), 4), dtype=np.uint64)
    counter[..., 0] = np.concatenate([np.arange(0), *map(np.arange, blocks.values())])
    counter[..., 1] = array.astype(np.uint64)[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = np.repeat(np.array(list(blocks), dtype=np.uint64), list(blocks.values()))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(array), -1).astype(np.float64) * 2.0**-32
    starts = 4 * np.cumsum([0, *blocks.values()])
    return {stream: words[:, start : start + counts[stream]] for stream, start in zip(blocks, starts, strict=False)}


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox-4x32-10, a counter-based generator: ten rounds of multiply and exchange.

    Written here because NumPy's own Philox (4x64) is a sequential stream: it can't be evaluated at many counters at
    once.

    Args:
        counter: (..., 4) 32-bit words, held in 64 bits.
        key: Two 32-bit words.

    Returns:
        (..., 4) 32-bit words, held in 64 bits.

    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, sec. 3.3 and table 2.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    # Words 0 and 2 are multiplied, words 3 and 1 are mixed in: two arrays of pairs halve the calls.
    factors = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for number in range(10):
        keys = [(key[1] + number * 0xBB67AE85) & 0xFFFFFFFF, (key[0] + number * 0x9E3779B9) & 0xFFFFFFFF]
        product = even * factors
        mixed = (product >> half) ^ odd[..., ::-1] ^ np.array(keys, dtype=np.uint64)
        even, odd = mixed[..., ::-1], (product & mask)[..., ::-1]
    return np.stack([even, odd], axis=-1).reshape(counter.shape)


@cache
def noise_bank() -> NDArray[np.float32]:
    """(2**20,) float32 numbers of N(0, 1), the same on every machine; read-only.

    RandomErasing's noise is read from it by every executor, because drawing 3 S² normal numbers per photo costs more
    than the rest of the augmentation.
    """
    bank = np.random.Generator(np.random.Philox(0)).standard_normal(NOISE_SIZE, dtype=np.float32)
    bank.setflags(write=False)
    return bank
