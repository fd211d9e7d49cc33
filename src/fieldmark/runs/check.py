"""What `fieldmark check` does: inspect the photos, audit them, lint the recipe on them, estimate the cost."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fieldmark.augment.sample import crop_fallback_rate
from fieldmark.config import Config
from fieldmark.data.audit import Audit, audit
from fieldmark.data.columns import Categories
from fieldmark.data.index import PhotoIndex
from fieldmark.data.inspection import PhotoFacts
from fieldmark.errors import DataError, WeightsError
from fieldmark.files import fill_template, list_findings
from fieldmark.models.catalog import InputConfig, installed_packages, pretrained_file, resolve_name, timm_config
from fieldmark.models.classifier import count_parameters, create_classifier
from fieldmark.progress import Progress, format_seconds
from fieldmark.runs import build
from fieldmark.runs.dataset import divide, find_groups, find_photos, inspect
from fieldmark.runs.environment import usable_cores

PHOTOS_PREPARED = 32
PHOTOS_TRAINED = 8
SECONDS_MEASURED = 2.0
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two averages, in 32 bit


@dataclass(frozen=True)
class Preflight:
    """Holds what was measured, and what follows for the run."""

    prepared_per_second: float  # photos decoded and augmented by one core, without a cache
    trained_per_second: float  # photos, by all of the device
    epoch_seconds: float  # with its validation
    run_hours: float  # all epochs, and the probe
    memory_gigabytes: float  # weights, gradients, optimizer and activations of one update
    parameters_millions: float

    @property
    def bottleneck(self) -> str:
        """Return what the time goes into: "preparing photos" or "training"."""
        one_photo = 1 / (self.prepared_per_second * usable_cores())
        return "preparing photos" if one_photo > 1 / self.trained_per_second else "training"


def measure(config: Config, index: PhotoIndex, sizes: NDArray[np.int64]) -> Preflight:
    """Prepare and train on a few of the photos whose (N, 2) upright width and height are known; 0 stands for others."""
    config, _ = build.guard_computation(config)
    alone = config.train.model_copy(update={"devices": 1, "nodes": 1})
    fabric, _ = build.build_fabric(config.model_copy(update={"train": alone}))
    if fabric.device.type == "cpu":
        torch.set_num_threads(build.choose_threads(config, workers=0).value)
    weights = build.build_input_config(config)
    build.require_sizes(config, weights)
    prepare = build.build_train_photos(config, weights, build.build_reader(config, index), sizes)
    numbers = np.flatnonzero(sizes[:, 0])[:PHOTOS_PREPARED].tolist()
    prepared = measure_rate(lambda: len(prepare(numbers, 0).numbers))
    model = create_classifier(**build.create_arguments(config, num_classes=len(index.classes))).train()
    if build.is_channels_last(config):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fabric.to_device(model)
    size = build.train_size(config, weights)
    images = torch.zeros(PHOTOS_TRAINED, 3, size, size, device=fabric.device)
    plain = build.build_optimizer(config, model, precision=fabric.strategy.precision)
    network, optimizer = fabric.setup(model, plain)

    def loss() -> Tensor:
        return functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long).to(fabric.device))

    def step() -> int:
        fabric.backward(loss())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if fabric.device.type != "cpu":
            torch.accelerator.synchronize()
        return len(images)

    activations = _saved_bytes(loss) / len(images) * (config.train.micro_batch_size or config.train.batch_size)
    trained, parameters = measure_rate(step), count_parameters(model)
    counts = index.count_splits()
    num_train, num_val = counts["train"], counts["val"]
    # A forward pass is a third of a training step.
    compute, preparation = (num_train + num_val / 3) / trained, (num_train + num_val) / (prepared * usable_cores())
    # On the CPU preparing photos takes cores from training.
    epoch = compute + preparation if fabric.device.type == "cpu" else max(compute, preparation)
    probe = num_train / (3 * trained) if config.probe.epochs else 0.0
    return Preflight(
        prepared_per_second=prepared,
        trained_per_second=trained,
        epoch_seconds=epoch,
        run_hours=(config.train.epochs * epoch + probe) / 3600,
        memory_gigabytes=(parameters * BYTES_PER_PARAMETER + activations) / 2**30,
        parameters_millions=parameters / 1e6,
    )


def measure_rate(work: Callable[[], int]) -> float:
    """Units per second of `work`, which says how many it did; the first call warms up (a kernel may be compiled)."""
    work()
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < SECONDS_MEASURED:
        done += work()
    return done / (time.perf_counter() - started)


def _saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(kept.values())


NEAR_DISTANCE_BITS = 6
MOST_CLASSES = 30
MOST_BROKEN = 20


@dataclass(frozen=True)
class Checkup:
    """Holds what was found."""

    audit: Audit  # of the photos
    must_fix: tuple[str, ...]  # the audit's, and what keeps the photos from being divided
    recipe_warnings: tuple[str, ...]
    preflight: Preflight | None  # None where there is nothing to train on
    crop_fallback_rate: float | None  # share of training crops that are a fixed center crop, where it was measured

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self.audit) | {
            "must_fix": list(self.must_fix),
            "recipe_warnings": list(self.recipe_warnings),
            "estimates": asdict(self.preflight) if self.preflight else {},
            "bottleneck": self.preflight.bottleneck if self.preflight else None,
            "crop_fallback_rate": self.crop_fallback_rate,
        }


def check_data(config: Config, *, progress: Progress, with_recipe: bool = True) -> Checkup:
    """Inspect every photo, audit the data set, lint the recipe on it, and measure what a run would cost.

    Without `with_recipe` the photos alone are looked at: a plan chooses model and sizes later.
    """
    found = find_photos(config.data)
    facts, _ = inspect(found, config.data, progress=progress, with_hash=True)
    index, problem = _divide_usable(found, facts, config)
    sizes, trained = np.zeros((len(facts), 2), np.int64), index.numbers("train")
    sizes[trained] = np.reshape([(facts[number].width, facts[number].height) for number in trained.tolist()], (-1, 2))
    counts = index.count_splits()
    no_weights, preflight, warnings, rate = "", None, [], None
    if with_recipe:
        no_weights, weights = _why_no_weights(config), build.build_input_config(config)
        if not no_weights and sizes.any() and len(index.classes) > 1:
            progress.message("measuring a few photos and updates")
            preflight = measure(config, index, sizes)
        rate = fallback_rate(config, weights, sizes) if sizes.any() else None
        warnings = lint_recipe(config, weights, sizes, index.classes, num_train=counts["train"], num_val=counts["val"])
    audited = audit(index, facts, near_distance=NEAR_DISTANCE_BITS, skip_broken=config.data.broken == "skip")
    # Without a split the audit cannot help noticing that nothing is in train; the reason says more.
    must_fix = [problem] if problem else list(audited.must_fix)
    must_fix += [no_weights] if no_weights else []
    return Checkup(audited, tuple(must_fix), tuple(warnings), preflight, rate)


def _why_no_weights(config: Config) -> str:
    """Return why the pre-trained weights that training would fetch cannot be had, or nothing."""
    name = resolve_name(config.model.name, config.model.weights)
    try:
        if config.model.weights == "pretrained":
            pretrained_file(timm_config(name), name, download=False)
    except WeightsError as error:
        return "" if name.partition(".")[0] in installed_packages() else str(error)
    return ""


def _divide_usable(index: PhotoIndex, facts: Sequence[PhotoFacts], config: Config) -> tuple[PhotoIndex, str]:
    """The index with the split that training would make of the usable photos, or why there is none."""
    usable = np.flatnonzero(index.photos.is_labeled() & np.array([not fact.problem for fact in facts], np.bool_))
    try:
        chosen, known = index.select(usable), [facts[number] for number in usable.tolist()]
        divided = divide(chosen, find_groups(chosen, known, config.data), config.data)
    except DataError as error:
        return index, str(error)
    splits, groups = index.photos.splits.copy(), dict(enumerate(index.photos.groups))
    splits[usable] = divided.photos.splits
    groups |= dict(zip(usable.tolist(), divided.photos.groups, strict=True))
    return replace(index, photos=replace(index.photos, splits=splits, groups=Categories.of(groups.values()))), ""


def format_checkup(checkup: Checkup) -> str:
    """A table for people: classes, photos, cost, then what to know and what to fix."""
    shown = dict(islice(checkup.audit.counts.items(), MOST_CLASSES))
    width = min(max(map(len, shown), default=0), 40)
    values = {"checkup": checkup, "audit": checkup.audit, "shown": shown, "width": width, "most_broken": MOST_BROKEN}
    return fill_template("checkup.md", values, filters={"time": format_seconds, "repr": repr})


CROPS_DRAWN = 20_000
DIRECTIONS = {
    "horizontal_flip": ({"left", "links", "gauche", "l"}, {"right", "rechts", "droite", "r"}),
    "vertical_flip": ({"up", "top", "upper", "upright"}, {"down", "bottom", "lower", "inverted"}),
}
"""Words that a flip turns into each other, by its setting."""


def lint_recipe(
    config: Config,
    weights: InputConfig,
    sizes: NDArray[np.int64],
    classes: Sequence[str],
    *,
    num_train: int,
    num_val: int,
) -> list[str]:
    """One sentence per finding, each with the way out; empty where nothing looks wrong.

    `sizes` are the (N, 2) upright width and height of photos, in pixels, 0 where they are not known; a sample will do.
    """
    rate, sizes = fallback_rate(config, weights, sizes), sizes[sizes[:, 0] > 0]
    size = build.train_size(config, weights)
    pairs = {flip: _opposites(classes, words) for flip, words in DIRECTIONS.items()}
    values = {
        **dict(config),  # its sections
        "are_digits": all(len(name) == 1 and name.isdigit() for name in classes),
        "weights": weights,
        "size": size,
        "evaluation": build.build_eval_spec(config, weights),
        "fallback_rate": rate,
        "small": float((sizes.min(axis=1) < size).mean()) if len(sizes) else 0.0,
        "aspect": float(np.median(sizes.max(axis=1) / np.maximum(sizes.min(axis=1), 1))) if len(sizes) else 1.0,
        "opposites": {flip: pair for flip, pair in pairs.items() if pair and getattr(config.augment, flip)},
        "schedule": build.build_schedule_spec(config).warnings(),
        "steps": config.train.epochs * max(-(-num_train // config.train.batch_size), 1),
        "num_val": num_val,
    }
    return list_findings("lint.md", values, filters={"repr": repr})


def fallback_rate(config: Config, weights: InputConfig, sizes: NDArray[np.int64]) -> float:
    """Share of training crops on photos of these sizes, 0 where not known, that are one fixed center crop in fact."""
    sizes = sizes[sizes[:, 0] > 0]
    if not len(sizes):
        return 0.0
    some = sizes[:: len(sizes) // CROPS_DRAWN + 1]
    return crop_fallback_rate(build.build_augment_spec(config, weights), some, draws=CROPS_DRAWN // len(some))


def _opposites(classes: Sequence[str], words: tuple[set[str], set[str]]) -> tuple[str, str] | None:
    """Two classes whose names differ in a pair of opposite words alone."""
    names = {tuple(re.findall(r"[^\W_]+", name.lower())): name for name in classes}
    for parts, name in names.items():
        for position, part in enumerate(parts):
            for opposite in words[1] if part in words[0] else ():
                other = names.get((*parts[:position], opposite, *parts[position + 1 :]))
                if other is not None:
                    return name, other
    return None
