"""Before a training: what the model will be shown, as one picture, and which learning rate suits it.

Shape letters: B photos, K classes, H, W and S pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fieldmark import plots
from fieldmark.augment.mixing import Method, apply_mix, draw_mix, lambda_draws, one_hot
from fieldmark.augment.reference import EvalSpec
from fieldmark.config import Config
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Batch
from fieldmark.errors import DataError, NonFiniteError, TrainingError
from fieldmark.files import write_whole
from fieldmark.progress import Progress
from fieldmark.runs import build
from fieldmark.runs.check import LintInput, lint_recipe
from fieldmark.runs.dataset import find_photos, inspect
from fieldmark.runs.session import Session, open_session
from fieldmark.training.loop import TrainState, UpdateOptions, update
from fieldmark.training.optim import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


SHOWN = 8
SIZES_READ = 1000
LAMBDAS_DRAWN = 20_000


def preview_recipe(config: Config, out: Path, *, progress: Progress) -> list[str]:
    """Draw a recipe at work on a few photos, as a PNG, and give the findings of its lint."""
    index = find_photos(config.data)
    numbers = [number for number, photo in enumerate(index.photos) if photo.label and photo.split in ("train", "")]
    chosen = _spread(numbers, SIZES_READ)
    part = replace(index, photos=tuple(index.photos[number] for number in chosen))
    found, _ = inspect(part, config.data, progress=progress)
    sizes = np.zeros((len(index.photos), 2), np.int64)
    sizes[chosen] = [(fact.width, fact.height) for fact in found]
    if not sizes.any():
        raise DataError(f"{index.root} holds no labeled photo that can be read: `fieldmark check` says why")
    num_train, num_val = len(numbers), sum(photo.split == "val" for photo in index.photos)
    if not num_val:  # its share will be taken out of training
        num_val = round(len(numbers) * config.data.val_fraction)
        num_train = round(len(numbers) * (1 - config.data.val_fraction - config.data.test_fraction))
    given = LintInput.of(config, index, sizes, num_train=num_train, num_val=num_val)
    write_whole(out, plots.figure_png(_draw_preview(given, index, sizes), dpi=110))
    return lint_recipe(given)


def _draw_preview(given: LintInput, index: PhotoIndex, sizes: NDArray[np.int64]) -> Figure:
    """Photos (whose (N, 2) sizes are known, not 0) before and after augmentation, mixed, λ and learning rate."""
    config = given.config
    evaluation = build.build_eval_spec(config, given.weights)
    shown = _spread(np.flatnonzero(sizes[:, 0]).tolist(), SHOWN)
    size = build.train_size(config, given.weights)
    reader = build.build_reader(config, index)
    prepare = build.build_train_photos(config, reader, sizes, size=size, evaluation=evaluation)
    batches = [prepare(shown, epoch) for epoch in (0, 1)]
    # A row of photos is as high in every section, so that one method of mixing leaves no gap where another would be.
    heights = [1, 2, 1.1 * len(build.build_mix_spec(config).methods), 1.6]
    figure = plots.new_figure(14, 2.28 * sum(heights))
    whole, augmented, mixed, curves = list(figure.subfigures(4, 1, squeeze=False, height_ratios=heights).flat)
    photos = [reader.read(number) for number in shown]
    _draw_row(whole, "photos", photos, [index.photos[number].label or "" for number in shown])
    seen = [_pixels(image, evaluation) for batch in batches for image in batch.images.numpy()]
    _draw_row(augmented, "as the model sees them, in two epochs", seen, [""] * len(seen), rows=2)
    _draw_mixed(mixed, given, batches[0], evaluation, index.classes)
    _draw_curves(curves, given)
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


def _draw_mixed(
    part: SubFigure, given: LintInput, batch: Batch, evaluation: EvalSpec, classes: tuple[str, ...]
) -> None:
    """Each method at work on the first photos, every photo from a batch (and so with a λ) of its own."""
    config, num_photos = given.config, len(batch.labels)
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


def _draw_curves(part: SubFigure, given: LintInput) -> None:
    config, steps_per_epoch = given.config, given.steps_per_epoch
    first, second, rate = part.subplots(1, 3)
    size, spec = build.train_size(config, given.weights), build.build_mix_spec(config)
    methods: tuple[tuple[Axes, Method, tuple[float, float]], ...] = (
        (first, "mixup", config.mix.mixup_alpha),
        (second, "cutmix", config.mix.cutmix_alpha),
    )
    for axes, method, alpha in methods:
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


UPDATES = 100
LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9  # weight of the past in the smoothed loss
EXPLOSION = 4.0  # the smoothed loss over its minimum at which to stop
LEAST_POINTS = 8  # fewer rates than this say nothing about a slope


@dataclass(frozen=True, slots=True)
class LrSweep:
    """The outcome of a sweep of rates: one rate and two losses for each update, plain numbers ready to plot."""

    lrs: tuple[float, ...]  # of the group with the highest rate
    losses: tuple[float, ...]  # before that update
    smoothed: tuple[float, ...]  # exponentially
    suggestion: float  # the rate to train with, half way down the longest fall of the smoothed loss


def search_lr(config: Config, *, progress: Progress) -> LrSweep:
    """Train a model that is thrown away, for up to 100 updates with rates of the head from 1e-6 to 1.

    The other groups' rates rise in proportion. The head starts untrained: a recipe that probes first bears the
    suggested rate as well, and often a higher one.
    """
    rates = [LOWEST * (HIGHEST / LOWEST) ** (number / (UPDATES - 1)) for number in range(UPDATES)]
    with (
        tempfile.TemporaryDirectory(prefix="fieldmark-") as scratch,
        open_session(config, Path(scratch) / "run", start="new", progress=progress) as session,
    ):
        state = session.start_training()
        optimizer = state.schedule.optimizer
        highest = max(group["base_lr"] for group in optimizer.param_groups)
        state.schedule = Schedule(optimizer, lambda step: rates[min(step, UPDATES - 1)] / highest)
        progress.start(UPDATES, 0)
        return read_sweep(rates, _losses(session, state, progress))


def _losses(session: Session, state: TrainState, progress: Progress) -> Iterator[float]:
    """Yield the mean loss before each update, until it is not finite."""
    state.model.train()
    for epoch in cycle(range(max(session.plan.epochs, 1))):
        for batch in session.train_batches(epoch, 0):
            try:
                loss, _ = update(session.fabric, state, batch, UpdateOptions())
                state.watch.drain()
            except NonFiniteError:
                return
            yield loss.item() / len(batch.labels)
            progress.advance(1)


def read_sweep(rates: Sequence[float], losses: Iterable[float]) -> LrSweep:
    """Suggest a rate by the losses of updates with rising rates; no more are read once they explode.

    Source:
        Smith, "Cyclical Learning Rates", arXiv:1506.01186, section 3.3; the valley rule is fastai's
        (fastai/callback/schedule.py, `valley`).
    """
    seen: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    for _, value in zip(rates, losses, strict=False):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        seen.append(value)
        smoothed.append(average / (1 - SMOOTHING ** len(seen)))  # corrected for its start at zero
        if smoothed[-1] > EXPLOSION * min(smoothed):
            break
    if len(seen) < LEAST_POINTS:
        raise TrainingError(
            f"the learning-rate sweep saw only {len(seen)} finite losses from {LOWEST:g} on and needs {LEAST_POINTS}. "
            "Look at the photos (`fieldmark check`), or set train.precision=32-true"
        )
    lrs = rates[: len(seen)]
    # As fastai: the first tenth is noise of the start, the last few points are the explosion.
    window = slice(len(lrs) // 10, max(len(lrs) - 5, len(lrs) // 10 + 3))
    return LrSweep(tuple(lrs), tuple(seen), tuple(smoothed), valley_point(lrs[window], smoothed[window]))


def valley_point(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Find the rate half way through the longest decreasing subsequence of the smoothed losses, by rising rates.

    Source:
        fastai, `fastai.callback.schedule.valley`: longest decreasing subsequence by dynamic programming, cut in three
        sections; the point is one section and a half in.
    """
    lengths = [1] * len(losses)
    start = end = 0
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[end] < lengths[i]:
                end = i
                start = end - lengths[end]
    section = (end - start) / 3
    return lrs[start + int(section) + int(section / 2)]


def save_sweep(sweep: LrSweep, path: Path) -> None:
    """Draw loss over rate, with the suggestion, as PNG."""
    figure = plots.new_figure(6, 4)
    axes = figure.subplots()
    axes.plot(sweep.lrs, sweep.losses, color=plots.COLORS[0], alpha=0.3, label="loss")
    axes.plot(sweep.lrs, sweep.smoothed, color=plots.COLORS[0], label="smoothed")
    axes.axvline(sweep.suggestion, color=plots.COLORS[1], label=f"suggested: {sweep.suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(top=float(np.quantile(sweep.smoothed, 0.95)) * 1.2)
    axes.set_xlabel("learning rate of the head")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)
    write_whole(path, plots.figure_png(figure))
