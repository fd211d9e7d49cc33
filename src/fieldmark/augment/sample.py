"""One batch's random parameters from (seed, epoch, photo number), drawn once and executed elsewhere.

The numbers come from a counter-based generator, so a photo's augmentation depends on nothing but those three: neither
on the batch around it, nor on how many workers or processes share the work. The law of each parameter is torchvision's,
and so are the operations of TrivialAugment and RandAugment with their ranges.

Shape letters: B photos of a batch, N draws, n operations of a policy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fieldmark.errors import DataError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of `BatchParams.factors`, values of `color_order`
Floats = NDArray[np.float64]
RGB = tuple[float, float, float]

NOISE_SIZE = 1 << 20  # length of the noise bank
# Streams: each part draws from its own, so switching one off leaves the others' numbers alone.
CROP, FLIP, AFFINE, COLOR, POLICY, ERASE, MIX = range(7)
_ATTEMPTS = 10  # torchvision's RandomResizedCrop and RandomErasing give up after as many
# Their positions are the numbers in `BatchParams.ops`.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
MOVING = range(1, 6)  # those of them that move pixels rather than changing their color
_SIGNED = np.array([1 <= number <= 9 for number in range(len(OPERATIONS))])
_NUM_BINS = 31
_DRAWS = 3  # operation, strength, sign

Policy = Literal["none", "trivial", "rand"]


@dataclass(frozen=True, slots=True)
class AugmentSpec:
    """What is drawn and how it is executed, as plain values; `config.AugmentConfig` says what each field means."""

    size: int  # side of the training image, in pixels
    crop: Literal["random_resized", "zoom", "squash", "weights"]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    crop_fraction: float  # of the `weights` crop: its side over the resized short side, in (0, 1]
    crop_interpolation: Literal["bilinear", "bicubic"]  # of the `weights` crop; all others are bilinear
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
    policy: Policy
    rand_ops: int
    rand_magnitude: int
    erase: float
    erase_scale: tuple[float, float]
    erase_ratio: tuple[float, float]
    erase_value: Literal["random", "zero"]
    mean: RGB  # of normalization, for values in [0, 1]
    std: RGB

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
    """The random numbers of a batch: a structure of arrays with one row per photo."""

    box: NDArray[np.float64]  # (B, 4) x, y, width, height of the crop in source pixels; `zoom` may reach outside
    flip_x: NDArray[np.bool_]  # (B,) mirrored
    flip_y: NDArray[np.bool_]  # (B,) upside down
    angle: NDArray[np.float64]  # (B,) degrees, clockwise positive as in torchvision
    shear: NDArray[np.float64]  # (B,) degrees along x
    shift: NDArray[np.float64]  # (B, 2) x, y in whole output pixels
    factors: NDArray[np.float64]  # (B, 4) of brightness, contrast, saturation (1 = as is), and turns of hue (0 = as is)
    color_order: NDArray[np.int64]  # (B, 4) permutation of `BRIGHTNESS` to `HUE`: first applied first
    ops: NDArray[np.int64]  # (B, n) numbers in `OPERATIONS`
    magnitudes: NDArray[np.float64]  # (B, n) signed strength of each, in the operation's own unit
    erase: NDArray[np.int64]  # (B, 4) x, y, width, height in output pixels; width 0 erases nothing
    noise_offset: NDArray[np.int64]  # (B,) start in the noise bank; (c, y, x) takes the number at + (c S + y) S + x

    def __len__(self) -> int:
        return len(self.box)


def sample_params(spec: AugmentSpec, sizes: ArrayLike, *, seed: int, epoch: int, numbers: ArrayLike) -> BatchParams:
    """Draw the parameters of a batch of (B,) photo numbers with (B, 2) upright widths and heights in pixels."""
    sizes = np.asarray(sizes, dtype=np.float64)
    numbers = np.asarray(numbers, dtype=np.int64)
    attempts = 4 * _ATTEMPTS
    counts = {CROP: attempts, FLIP: 2, AFFINE: 4, COLOR: 8, ERASE: 4 + attempts if spec.erase else 0}
    counts[POLICY] = {"none": 0, "trivial": _DRAWS, "rand": _DRAWS * spec.rand_ops}[spec.policy]
    draws = uniform_streams(seed, epoch, numbers, counts)
    flips = draws[FLIP] < (spec.horizontal_flip, spec.vertical_flip)
    return BatchParams(
        _crop_boxes(spec, sizes, draws[CROP])[0],
        flips[:, 0],
        flips[:, 1],
        *_affine(spec, draws[AFFINE]),
        *_color(spec, draws[COLOR]),
        *sample_policy(spec.policy, draws[POLICY], magnitude=spec.rand_magnitude, size=spec.size),
        *_erase(spec, draws[ERASE]),
    )


def crop_fallback_rate(spec: AugmentSpec, sizes: ArrayLike, *, draws: int) -> float:
    """Share of crops that RandomResizedCrop gives up on and replaces by a fixed center crop, `draws` of each photo.

    `sizes` are (N, 2) widths and heights; the share is 0 unless `crop` is `random_resized`.
    """
    repeated = np.repeat(np.asarray(sizes, dtype=np.float64), draws, axis=0)
    if spec.crop != "random_resized" or not len(repeated):
        return 0.0
    chances = uniforms(0, 0, np.arange(len(repeated)), stream=CROP, count=4 * _ATTEMPTS)
    return float(_crop_boxes(spec, repeated, chances)[1].mean())


def _crop_boxes(spec: AugmentSpec, sizes: Floats, chances: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """(B, 4) boxes and (B,) whether they are the fallback."""
    width, height = sizes[:, 0], sizes[:, 1]
    never = np.zeros(len(sizes), dtype=np.bool_)
    if spec.crop == "squash":
        return np.stack([np.zeros_like(width), np.zeros_like(width), width, height], axis=1), never
    if spec.crop == "weights":
        return _weights_boxes(spec, sizes), never

    w, h = _sides((width * height)[:, None], chances, spec.crop_scale, spec.crop_ratio)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    w, h, u, v, found = _first_fit(w, h, fits | (spec.crop == "zoom"), chances)
    w, h = np.maximum(w, 1), np.maximum(h, 1)
    drawn = np.stack([_start(width, w, u), _start(height, h, v), w, h], axis=1)
    return np.where(found[:, None], drawn, _center_boxes(sizes, spec.crop_ratio)), np.logical_not(found)


def _weights_boxes(spec: AugmentSpec, sizes: Floats) -> Floats:
    """Return what the evaluation transform sees of each photo, in source pixels.

    It resizes the short side to size / crop_fraction and cuts the center; both round to whole pixels as torchvision's
    Resize and CenterCrop do, because half a pixel more or less is a visibly different picture.
    """
    short = sizes.min(axis=1, keepdims=True)
    resized = np.floor(np.floor(spec.size / spec.crop_fraction) * sizes / short)
    corner = np.rint((resized - spec.size) / 2)
    return np.concatenate([corner, np.full_like(corner, spec.size)], axis=1) * np.tile(sizes / resized, 2)


def _sides(
    whole: Floats | int, chances: Floats, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Floats, Floats]:
    """(B, 10) of either side, with a ratio and with a share of the `whole` area that four numbers each draw."""
    area = whole * _between(chances[:, 0::4], scale)
    ratios = np.exp(_between(chances[:, 1::4], np.log(ratio)))
    return np.rint(np.sqrt(area * ratios)), np.rint(np.sqrt(area / ratios))


def _first_fit(
    w: Floats, h: Floats, fits: NDArray[np.bool_], chances: Floats
) -> tuple[Floats, Floats, Floats, Floats, NDArray[np.bool_]]:
    """(B,) sides of the first of ten attempts that fits, two more numbers of it, and whether any did."""
    best = (np.arange(len(fits)), fits.argmax(axis=1))
    return w[best], h[best], chances[:, 2::4][best], chances[:, 3::4][best], fits[best]


def _center_boxes(sizes: Floats, ratio: tuple[float, float]) -> Floats:
    """The fallback of torchvision: as much of the photo's center as the range of ratios lets in."""
    width, height = sizes[:, 0], sizes[:, 1]
    w = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    h = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=1)


def _start(whole: Floats | int, part: Floats, u: Floats) -> Floats:
    """Start of `part` in `whole`, each whole pixel equally likely; a larger part starts at or before 0."""
    return np.sign(whole - part) * np.floor(u * (np.abs(whole - part) + 1))


def _affine(spec: AugmentSpec, chances: Floats) -> tuple[Floats, Floats, Floats]:
    """(B,) angle, (B,) shear and (B, 2) shift; torchvision rounds the shift to whole pixels."""
    centered = 2 * chances - 1
    shift = np.rint(centered[:, 2:] * np.multiply(spec.translate, spec.size))
    return centered[:, 0] * spec.degrees, centered[:, 1] * spec.shear, shift + 0.0  # + 0.0 turns -0 into 0


def _color(spec: AugmentSpec, chances: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """(B, 4) factors and (B, 4) order of ColorJitter."""
    widths = np.array(spec.color_ranges)
    low = np.array([*np.maximum(0, 1 - widths[:3]), -widths[3]])
    high = np.array([*(1 + widths[:3]), widths[3]])
    order = np.argsort(chances[:, 4:], axis=1, kind="stable")
    return low + chances[:, :4] * (high - low), order.astype(np.int64)


def _erase(spec: AugmentSpec, chances: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(B, 4) rectangle and (B,) start in the noise bank of RandomErasing."""
    if not spec.erase:
        return np.zeros((len(chances), 4), dtype=np.int64), np.zeros(len(chances), dtype=np.int64)
    # The first four numbers decide whether and where in the noise; the ratio of the sides is height over width.
    first, chances = chances[:, :4], chances[:, 4:]
    h, w = _sides(spec.size**2, chances, spec.erase_scale, spec.erase_ratio)
    w, h, u, v, found = _first_fit(w, h, (w < spec.size) & (h < spec.size), chances)
    drawn = np.stack([_start(spec.size, w, u), _start(spec.size, h, v), w, h], axis=1)
    happens = (first[:, 0] < spec.erase) & found & (w > 0) & (h > 0)
    return np.where(happens[:, None], drawn, 0).astype(np.int64), (first[:, 1] * NOISE_SIZE).astype(np.int64)


def _between(u: Floats, ends: ArrayLike) -> Floats:
    low, high = np.asarray(ends, dtype=np.float64)
    return low + u * (high - low)


def sample_policy(policy: Policy, chances: Floats, *, magnitude: int, size: int) -> tuple[NDArray[np.int64], Floats]:
    """(B, n) operations and their signed strengths, in their own unit, from (B, draws) uniform numbers.

    `trivial` draws one operation and its strength; `rand` draws operations with the strength of bin `magnitude` of 0 to
    30, shifts relative to the image's side of `size` pixels; `none` draws nothing.

    Source:
        Müller and Hutter, "TrivialAugment", arXiv:2103.10158, table 5 (wide); Cubuk et al., "RandAugment",
        arXiv:1909.13719, sec. 3.
    """
    if policy == "none":
        return np.zeros((len(chances), 0), dtype=np.int64), np.zeros((len(chances), 0))
    draws = chances.reshape(len(chances), -1, _DRAWS)
    ops = (draws[..., 0] * len(OPERATIONS)).astype(np.int64)
    bins = (draws[..., 1] * _NUM_BINS).astype(np.int64) if policy == "trivial" else magnitude
    strengths = _strengths(policy, size)[ops, bins]
    return ops, np.where(_SIGNED[ops] & (draws[..., 2] < 0.5), -strengths, strengths)


@cache
def _strengths(policy: Policy, size: int) -> Floats:
    """(operations, bins) strengths of torchvision's augmentation space."""
    bins = np.linspace(0.0, 1.0, _NUM_BINS)
    is_wide = policy == "trivial"
    shear, shift, turn = (0.99, 32.0, 135.0) if is_wide else (0.3, 150 / 331 * size, 30.0)
    color, bits = (0.99, 6) if is_wide else (0.9, 4)
    table = np.zeros((len(OPERATIONS), _NUM_BINS))
    table[1:3], table[3:5], table[5], table[6:10] = shear * bins, shift * bins, turn * bins, color * bins
    table[10] = 8 - np.rint(np.arange(_NUM_BINS) / ((_NUM_BINS - 1) / bits))
    table[11] = 255.0 - 255.0 * bins
    return table


def operation_matrix(op: int, magnitude: float, size: int) -> Floats:
    """(2, 3) matrix from output to input, in pixels with the image spanning [0, size]; colors move nothing."""
    half = size / 2
    cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
    matrices = {
        "ShearX": [[1.0, magnitude, 0.0], [0.0, 1.0, 0.0]],
        "ShearY": [[1.0, 0.0, 0.0], [magnitude, 1.0, 0.0]],
        "TranslateX": [[1.0, 0.0, -int(magnitude)], [0.0, 1.0, 0.0]],
        "TranslateY": [[1.0, 0.0, 0.0], [0.0, 1.0, -int(magnitude)]],
        # counter-clockwise, about the center
        "Rotate": [[cos, -sin, half - cos * half + sin * half], [sin, cos, half - sin * half - cos * half]],
    }
    return np.array(matrices.get(OPERATIONS[op], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def apply_operation(
    image: Any, op: int, magnitude: float, *, interpolation: Literal["nearest", "bilinear"], fill: tuple[int, int, int]
) -> Any:
    """Apply one operation to a PIL image, or a (..., 3, H, W) uint8 tensor, as torchvision's policies do."""
    from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

    name = OPERATIONS[op]
    strength = magnitude / 255 if name == "Solarize" else magnitude  # there a share of the largest value
    apply: Any = TrivialAugmentWide()._apply_image_or_video_transform  # pyright: ignore[reportPrivateUsage]
    return apply(image, name, strength, InterpolationMode(interpolation), {"others": list(fill)})


def uniforms(seed: int, epoch: int, numbers: ArrayLike, *, stream: int, count: int) -> Floats:
    """(B, count) numbers in [0, 1), multiples of 2**-32, that are a pure function of the arguments.

    The (B,) numbers are those of photos, or steps. Numbers of two streams are independent.
    """
    return uniform_streams(seed, epoch, numbers, {stream: count})[stream]


def uniform_streams(seed: int, epoch: int, numbers: ArrayLike, counts: Mapping[int, int]) -> dict[int, Floats]:
    """`uniforms` of several streams in one go, which saves most of the time of small batches.

    `counts` are draws per number, by stream. Raises DataError for a seed, epoch or number out of range.
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

    From counters (..., 4) and a key, all 32-bit words, to (..., 4) words, held in 64 bits. Written here because NumPy's
    own Philox (4x64) is a sequential stream: it can't be evaluated at many counters at once.

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
