"""What `fieldmark check` does: inspect the photos, audit them, lint the recipe on them, estimate the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fieldmark.config import Config
from fieldmark.console import format_seconds
from fieldmark.data.audit import Audit, audit
from fieldmark.data.index import PhotoIndex
from fieldmark.data.inspection import PhotoFacts
from fieldmark.errors import DataError
from fieldmark.experiment.dataset import Progress, divide, find_photos, inspect
from fieldmark.experiment.preflight import Preflight, measure
from fieldmark.outputs.lint import LintInput, fallback_rate, lint_recipe
from fieldmark.vision.names import resolve_name
from fieldmark.vision.weights import data_config

NEAR_DISTANCE_BITS = 6
MOST_CLASSES_TOLD = 30
MOST_BROKEN_TOLD = 20


@dataclass(frozen=True)
class Checkup:
    """Everything that was found.

    Attributes:
        audit: Of the photos.
        must_mend: What keeps training from being right: the audit's, and what keeps the photos from being divided.
        recipe_warnings: What looks like a mistake in the recipe for these photos.
        preflight: Time and memory of the run; None where there is nothing to train on.
    """

    audit: Audit
    must_mend: tuple[str, ...]
    recipe_warnings: tuple[str, ...]
    preflight: Preflight | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = self.audit.to_dict()
        bottleneck = self.preflight.bottleneck if self.preflight else None
        return content | {
            "must_mend": list(self.must_mend),
            "recipe_warnings": list(self.recipe_warnings),
            "bottleneck": bottleneck,
        }


def check_data(config: Config, *, progress: Progress) -> Checkup:
    """Inspect every photo, judge the data set, lint the recipe on it, and measure what a run would cost.

    Raises:
        ConfigError: No path, or no such model.
        DataError: There is no data set at all.
    """
    found = find_photos(config.data)
    facts = inspect(found, config.data, progress=progress, with_hash=True)
    index, problem = _divided(found, facts, config)
    weights = data_config(resolve_name(config.model.name, config.model.weights), config.model.weights)
    sizes = {
        place: (fact.width, fact.height)
        for place, (photo, fact) in enumerate(zip(index.photos, facts, strict=True))
        if photo.split == "train" and photo.label is not None and not fact.problem
    }
    counts = {split: sum(photo.split == split for photo in index.photos) for split in ("train", "val")}
    given = LintInput(
        config=config,
        weights=weights,
        sizes=np.asarray(list(sizes.values()), np.int64).reshape(-1, 2),
        classes=index.classes,
        steps_per_epoch=max(-(-counts["train"] // config.train.batch_size), 1),
        num_val=counts["val"],
    )
    preflight = None
    if sizes and len(index.classes) > 1:
        progress.message("measuring a few photos and updates")
        preflight = measure(config, index, sizes)
    audited = audit(
        index,
        facts,
        near_distance=NEAR_DISTANCE_BITS,
        skip_broken=config.data.broken == "skip",
        crop_fallback_rate=fallback_rate(config, weights, given.sizes) if sizes else None,
        estimates=preflight.estimates() if preflight else {},
    )
    # Without a split the audit cannot help noticing that nothing is in train; the reason says more.
    must_mend = (problem,) if problem else tuple(audited.must_mend)
    return Checkup(audited, must_mend, tuple(lint_recipe(given)), preflight)


def _divided(index: PhotoIndex, facts: Sequence[PhotoFacts], config: Config) -> tuple[PhotoIndex, str]:
    """The index with the split that training would make of the usable photos, or why there is none."""
    usable = [
        place
        for place, (photo, fact) in enumerate(zip(index.photos, facts, strict=True))
        if photo.label is not None and not fact.problem
    ]
    part = replace(index, photos=tuple(index.photos[place] for place in usable))
    try:
        divided = divide(part, [facts[place] for place in usable], config.data)
    except DataError as error:
        return index, str(error)
    photos = list(index.photos)
    for place, photo in zip(usable, divided.photos, strict=True):
        photos[place] = photo
    return replace(index, photos=tuple(photos)), ""


def format_checkup(checkup: Checkup) -> str:
    """A table for people: classes, photos, cost, then what to know and what to mend."""
    found = checkup.audit
    classes = f"{len(found.counts)} class" + "es" * (len(found.counts) != 1)
    lines = [f"{found.root}: {found.num_photos} photos, {classes}", *_class_table(found.counts)]
    if found.num_unlabelled:
        lines.append(f"without a label: {found.num_unlabelled}")
    if found.ignored:
        lines.append("left aside: " + ", ".join(f"{reason} ({count})" for reason, count in found.ignored.items()))
    if found.sizes is not None:
        sizes = found.sizes
        lines.append(
            f"sizes: short side {sizes.min_short_side} to {sizes.max_short_side}, median "
            f"{sizes.median_short_side:.0f} pixels; aspect {sizes.median_aspect:.2f}; {sizes.num_bytes / 1e6:.0f} MB"
        )
    lines.append("formats: " + ", ".join(f"{name} {count}" for name, count in found.formats.items()))
    if found.crop_fallback_rate is not None:
        lines.append(f"random crops that are a fixed centre crop in truth: {found.crop_fallback_rate:.1%}")
    if checkup.preflight is not None:
        lines.append(_cost(checkup.preflight))
    broken = [f"broken: {path!r} {reason}" for path, reason in found.broken[:MOST_BROKEN_TOLD]]
    if len(found.broken) > MOST_BROKEN_TOLD:
        broken.append(f"broken: ... and {len(found.broken) - MOST_BROKEN_TOLD} more (--json lists all)")
    lines += broken
    lines += [f"note: {text}" for text in found.warnings]
    lines += [f"recipe: {text}" for text in checkup.recipe_warnings]
    lines += [f"mend: {text}" for text in checkup.must_mend]
    lines.append("not ready to train" if checkup.must_mend else "ready to train")
    return "\n".join(lines)


def _class_table(counts: dict[str, dict[str, int]]) -> list[str]:
    if not counts:
        return []
    splits = list(next(iter(counts.values())))
    shown = dict(list(counts.items())[:MOST_CLASSES_TOLD])
    width = min(max(map(len, shown)), 40)
    lines = [f"{'class':{width}}" + "".join(f"{split or 'photos':>8}" for split in splits)]
    for name, by_split in shown.items():
        lines.append(f"{name[:width]:{width}}" + "".join(f"{by_split[split]:8d}" for split in splits))
    if len(counts) > len(shown):
        lines.append(f"... and {len(counts) - len(shown)} more classes")
    totals = [sum(by_split[split] for by_split in counts.values()) for split in splits]
    lines.append(f"{'all':{width}}" + "".join(f"{total:8d}" for total in totals))
    return lines


def _cost(preflight: Preflight) -> str:
    whole, epoch = (format_seconds(seconds) for seconds in (preflight.run_hours * 3600, preflight.epoch_seconds))
    return (
        f"cost: about {whole} in all, {epoch} an epoch, {preflight.memory_gigabytes:.1f} GB of memory, "
        f"{preflight.parameters_millions:.1f} M parameters; "
        f"most of the time goes into {preflight.bottleneck}"
    )
