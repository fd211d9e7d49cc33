"""Before a training: what the model will be shown, as one picture.

Shape letters: B photos, K classes, H, W and S pixels.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from fieldmark import plots
from fieldmark.augment.mixing import Method, apply_mix, draw_mix, lambda_draws, one_hot
from fieldmark.augment.reference import EvalSpec
from fieldmark.config import Config
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Batch
from fieldmark.errors import DataError
from fieldmark.files import write_whole
from fieldmark.models.catalog import InputConfig
from fieldmark.progress import Progress
from fieldmark.runs import build
from fieldmark.runs.check import lint_recipe
from fieldmark.runs.dataset import find_photos, inspect

SHOWN = 8
SIZES_READ = 1000
LAMBDAS_DRAWN = 20_000


def preview_recipe(config: Config, out: Path, *, progress: Progress) -> list[str]:
    """Draw a recipe at work on a few photos, as a PNG, and give the findings of its lint."""
    index = find_photos(config.data)
    numbers = np.sort(np.concatenate([index.numbers("train"), index.numbers("")])).tolist()
    chosen = _spread(numbers, SIZES_READ)
    found, _ = inspect(index.select(np.array(chosen, np.int64)), config.data, progress=progress)
    sizes = np.zeros((len(index.photos), 2), np.int64)
    sizes[chosen] = [(fact.width, fact.height) for fact in found]
    if not sizes.any():
        raise DataError(f"{index.root} holds no labeled photo that can be read: `fieldmark check` says why")
    num_train, num_val = len(numbers), index.count_splits()["val"]
    if not num_val:  # its share will be taken out of training
        num_val = round(len(numbers) * config.data.val_fraction)
        num_train = round(len(numbers) * (1 - config.data.val_fraction - config.data.test_fraction))
    weights = build.build_input_config(config)
    steps_per_epoch = max(-(-num_train // config.train.batch_size), 1)
    figure = _draw_preview(config, weights, index, sizes, steps_per_epoch)
    write_whole(out, plots.figure_png(figure, dpi=110))
    return lint_recipe(config, weights, sizes, index.classes, num_train=num_train, num_val=num_val)


def _draw_preview(
    config: Config, weights: InputConfig, index: PhotoIndex, sizes: NDArray[np.int64], steps_per_epoch: int
) -> Figure:
    """Photos (whose (N, 2) sizes are known, not 0) before and after augmentation, mixed, λ and learning rate."""
    evaluation, size = build.build_eval_spec(config, weights), build.train_size(config, weights)
    shown = _spread(np.flatnonzero(sizes[:, 0]).tolist(), SHOWN)
    reader = build.build_reader(config, index)
    prepare = build.build_train_photos(config, weights, reader, sizes)
    batches = [prepare(shown, epoch) for epoch in (0, 1)]
    # A row of photos is as high in every section, so that one method of mixing leaves no gap where another would be.
    heights = [1, 2, 1.1 * len(build.build_mix_spec(config).methods), 1.6]
    figure = plots.new_figure(14, 2.28 * sum(heights))
    whole, augmented, mixed, curves = list(figure.subfigures(4, 1, squeeze=False, height_ratios=heights).flat)
    photos = [reader.read(number) for number in shown]
    _draw_row(whole, "photos", photos, [index.photos[number].label or "" for number in shown])
    seen = [_pixels(image, evaluation) for batch in batches for image in batch.images.numpy()]
    _draw_row(augmented, "as the model sees them, in two epochs", seen, [""] * len(seen), rows=2)
    _draw_mixed(mixed, config, batches[0], evaluation, index.classes)
    _draw_curves(curves, config, size, steps_per_epoch)
    return figure


def _spread(numbers: list[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spaced, so that many classes are among them."""
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int))
    return [numbers[position] for position in chosen]


def _pixels(image: NDArray[np.float32], evaluation: EvalSpec) -> NDArray[np.uint8]:
    """(S, S, 3) uint8 of a normalized (3, S, S) image."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (evaluation.mean, evaluation.std))
    return np.rint(np.clip(image * std + mean, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def _draw_row(
    part: SubFigure, title: str, photos: list[NDArray[np.uint8]], captions: list[str], *, rows: int = 1
) -> None:
    part.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    plots.fill_grid(part.subplots(rows, SHOWN, squeeze=False), len(photos) // rows, photos, captions)


def _draw_mixed(part: SubFigure, config: Config, batch: Batch, evaluation: EvalSpec, classes: tuple[str, ...]) -> None:
    """Each method at work on the first photos, every photo from a batch (and so with a λ) of its own."""
    num_photos = len(batch.labels)
    targets = one_hot(batch.labels, len(classes), config.train.label_smoothing)
    photos: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    whole = build.build_mix_spec(config)
    for method in whole.methods:
        spec = replace(whole, share=1.0, cutmix_share=float(method == "cutmix"))
        for step in range(num_photos):
            size = batch.images.shape[-1]
            drawn = draw_mix(spec, seed=config.train.seed, epoch=0, step=step, batch_size=num_photos, image_size=size)
            images, labels = apply_mix(batch.images, targets, drawn)
            photos.append(_pixels(images[step].numpy(), evaluation))
            target = labels[step].numpy()
            top = [number for number in np.argsort(-target, kind="stable")[:2] if target[number] > 0.005]
            captions.append("\n".join(f"{target[number]:.2f} {classes[number]}" for number in top))
    title = (
        " and ".join(f"{method} ({share:.0%} of the batches)" for method, share in whole.shares.items() if share)
        if whole.share
        else "mixing is off (mix.share = 0); this is what it would look like"
    )
    _draw_row(part, title, photos, captions, rows=len(whole.methods))


def _draw_curves(part: SubFigure, config: Config, size: int, steps_per_epoch: int) -> None:
    *histograms, rate = part.subplots(1, 3)
    spec = build.build_mix_spec(config)
    methods: dict[Method, tuple[float, float]] = {"mixup": spec.mixup_alpha, "cutmix": spec.cutmix_alpha}
    for axes, (method, alpha) in zip(histograms, methods.items(), strict=True):
        drawn = lambda_draws(spec, method, count=LAMBDAS_DRAWN, seed=0, image_size=size)
        plots.draw_lambda(axes, drawn, alpha, f"λ of {method}, α from {alpha[0]:g} to {alpha[1]:g}")
    total = config.train.epochs * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, 600).astype(int)) if total else np.zeros(0, int)
    schedule = build.build_schedule_spec(config)
    head = config.optim.lr * np.asarray([schedule.factor(int(s), steps_per_epoch=steps_per_epoch) for s in steps])
    rate.plot(steps / steps_per_epoch, head, label="head", color=plots.COLORS[0])
    backbone = head * config.optim.backbone_lr_scale
    rate.plot(steps / steps_per_epoch, backbone, label="backbone's last stage", color=plots.COLORS[1])
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate.legend(frameon=False, fontsize=8)
    plots.dress(rate, "learning rate", "epoch")
