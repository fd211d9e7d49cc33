"""What looks like a mistake in a recipe, for these photos and these weights. Nothing here trains or decodes.

Shape letters: N photos.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fieldmark.config import Config
from fieldmark.experiment.build import build_augment_spec, build_eval_spec, train_size
from fieldmark.optim.schedule import schedule_warnings
from fieldmark.vision.provenance import InputConfig
from fieldmark.vision.sample import crop_fallback_rate

CROPS_DRAWN = 20_000
LEFT_RIGHT = ({"left", "links", "gauche", "l"}, {"right", "rechts", "droite", "r"})
UP_DOWN = ({"up", "top", "upper", "upright"}, {"down", "bottom", "lower", "inverted"})


@dataclass(frozen=True)
class LintInput:
    """What the rules look at.

    Attributes:
        config: The settings.
        weights: The picture that the weights expect.
        sizes: (N, 2) upright width and height of photos, in pixels; a sample will do.
        classes: Class names.
        steps_per_epoch: Updates of one epoch.
        num_val: Photos of validation.
    """

    config: Config
    weights: InputConfig
    sizes: NDArray[np.int64]
    classes: Sequence[str]
    steps_per_epoch: int
    num_val: int


def lint_recipe(given: LintInput) -> list[str]:
    """One sentence per finding, each with the way out; empty where nothing looks wrong."""
    rules = (_crop, _affine, _flips, _mixing, _sizes, _squash, _schedule, _average, _selection)
    return [finding for rule in rules for finding in rule(given)]


def fallback_rate(config: Config, weights: InputConfig, sizes: NDArray[np.int64]) -> float:
    """Share of training crops on photos of these sizes that are a fixed centre crop in truth."""
    if not len(sizes):
        return 0.0
    spec = build_augment_spec(
        config, size=train_size(config, weights), evaluation=build_eval_spec(config, weights), is_fixres=False
    )
    return crop_fallback_rate(spec, sizes, draws=max(CROPS_DRAWN // len(sizes), 1))


def _crop(given: LintInput) -> Iterable[str]:
    augment = given.config.augment
    if augment.crop != "random_resized":
        return
    low, high = augment.crop_scale
    rate = fallback_rate(given.config, given.weights, given.sizes)
    if high > 1:
        yield (
            f"crop_scale reaches {high:g}, but random_resized never zooms out: draws larger than the photo are "
            'rejected. Set augment.crop="zoom" for real zoom-out, or an upper end of 1'
        )
    if rate >= 0.01:
        yield (
            f"{rate:.1%} of the random crops of these photos are a fixed centre crop instead, because ten draws in a "
            f'row did not fit (crop_scale [{low:g}, {high:g}]). Lower crop_scale, or set augment.crop="zoom"'
        )


def _affine(given: LintInput) -> Iterable[str]:
    augment = given.config.augment
    has_affine = bool(augment.degrees or augment.shear or any(augment.translate))
    if not has_affine or augment.executor != "reference":
        return
    yield (
        "the reference executor resamples twice, crop and then affine; "
        'augment.executor="fast" composes both into one filtered warp'
    )
    if augment.affine_interpolation == "nearest":
        yield 'nearest-neighbour affine leaves jagged edges: set augment.affine_interpolation="bilinear"'
    if augment.fill == (0, 0, 0):
        yield "black corners tell the model how far a photo was turned: set augment.fill to the mean colour"


def _flips(given: LintInput) -> Iterable[str]:
    augment = given.config.augment
    for prob, name, words in (
        (augment.horizontal_flip, "horizontal_flip", LEFT_RIGHT),
        (augment.vertical_flip, "vertical_flip", UP_DOWN),
    ):
        pair = _opposites(given.classes, words) if prob else None
        if pair:
            yield (
                f"classes {pair[0]!r} and {pair[1]!r} differ by direction, and {name} turns one into the other with "
                f"probability {prob:g}: set augment.{name}=0"
            )


def _opposites(classes: Sequence[str], words: tuple[set[str], set[str]]) -> tuple[str, str] | None:
    """Two classes whose names differ in a pair of opposite words alone."""
    seen: dict[tuple[str, ...], str] = {}
    first, second = words
    for name in classes:
        parts = tuple(re.findall(r"[^\W_]+", name.lower()))
        for place, part in enumerate(parts):
            if part in first | second:
                key = (*parts[:place], "", *parts[place + 1 :])
                other = seen.setdefault((*key, "1" if part in first else "2"), name)
                opposite = seen.get((*key, "2" if part in first else "1"))
                if opposite is not None:
                    return opposite, other
    return None


def _mixing(given: LintInput) -> Iterable[str]:
    config = given.config
    mix, smoothing = config.mix, config.train.label_smoothing
    share = mix.prob * len(mix.methods)
    if not share:
        return
    if share > 0.95:
        yield (
            f"mix.prob {mix.prob:g} for each of {len(mix.methods)} methods leaves {1 - share:.0%} of the batches as "
            "they are: train accuracy on clean batches cannot be told, and the model hardly sees a whole photo"
        )
    if smoothing:
        yield (
            f"mixing and label smoothing {smoothing:g} both soften the targets: probabilities will be too low, until "
            "`fieldmark calibrate` mends them"
        )
    if not mix.off_epochs and config.train.epochs >= 10:
        yield "mixing goes on to the last epoch: mix.off_epochs=3 or so lets the model end on whole photos"


def _sizes(given: LintInput) -> Iterable[str]:
    weights = given.weights
    size = train_size(given.config, weights)
    evaluation = build_eval_spec(given.config, weights)
    if size != weights.train_size:
        cost = (size / weights.train_size) ** 2
        yield (
            f"training at {size} pixels, while the weights were trained at {weights.train_size}: "
            f"{cost:.2g} times the work per photo, and features at another scale"
        )
    if evaluation.size < size:
        yield (
            f"evaluation at {evaluation.size} pixels is smaller than training at {size}; random crops enlarge objects, "
            f"so evaluate at the same size or more (arXiv:1906.06423): set eval.size={size}"
        )
    small = float((given.sizes.min(axis=1) < size).mean()) if len(given.sizes) else 0.0
    if small > 0.5:
        yield f"{small:.0%} of the photos are smaller than {size} pixels and will be enlarged"


def _squash(given: LintInput) -> Iterable[str]:
    config = given.config
    evaluation = build_eval_spec(config, given.weights)
    if evaluation.transform == "squash":
        ratios = given.sizes.max(axis=1) / np.maximum(given.sizes.min(axis=1), 1) if len(given.sizes) else np.ones(1)
        if float(np.median(ratios)) > 1.05:
            yield (
                f"evaluation squashes photos of median aspect {float(np.median(ratios)):.2f} to a square, while the "
                'weights expect an undistorted centre crop: set eval.transform="weights"'
            )
    if evaluation.interpolation != given.weights.interpolation:
        yield (
            f"evaluation resizes {evaluation.interpolation}, the weights expect {given.weights.interpolation}: "
            "leave eval.interpolation out"
        )


def _schedule(given: LintInput) -> Iterable[str]:
    schedule = given.config.schedule
    return schedule_warnings(
        schedule.name,
        total_epochs=given.config.train.epochs,
        warmup_epochs=schedule.warmup_epochs,
        restart_epochs=schedule.restart_epochs,
        restart_factor=schedule.restart_factor,
        min_factor=schedule.min_factor,
    )


def _average(given: LintInput) -> Iterable[str]:
    train = given.config.train
    steps = train.epochs * given.steps_per_epoch
    if train.ema_decay and steps and 1 / (1 - train.ema_decay) > steps / 3:
        fitting = f"{1 - 10 / steps:.3g} or 0" if steps > 10 else "0"
        yield (
            f"the average of decay {train.ema_decay:g} remembers {1 / (1 - train.ema_decay):.0f} updates, and the run "
            f"has {steps}: much of it will be the start. Set train.ema_decay={fitting}"
        )


def _selection(given: LintInput) -> Iterable[str]:
    train = given.config.train
    if train.select == "best" and train.epochs > 1 and 0 < given.num_val < 500:
        yield (
            f"the best of {train.epochs} epochs is chosen on {given.num_val} photos, where one photo is "
            f'{1 / given.num_val:.2%}: its accuracy will be too high. train.select="last" chooses nothing'
        )
