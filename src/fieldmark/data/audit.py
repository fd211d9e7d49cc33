"""What `fieldmark check` reports of a data set: what must be mended before training, and what to know besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldmark.data.findings import Findings, find_out
from fieldmark.data.layouts import listed

if TYPE_CHECKING:
    from fieldmark.data.index import PhotoIndex
    from fieldmark.data.inspection import PhotoFacts

FEW_PHOTOS = 10
"""A class with fewer training photos than this is pointed out."""

IMBALANCE = 10.0
"""So many times more photos in the largest class than in the smallest are pointed out."""

CROP_FALLBACK = 0.05
"""A larger share of fixed centre crops is pointed out."""


@dataclass(frozen=True)
class Audit(Findings):
    """Findings, and what they mean. Plain data: the caller prints it."""

    must_mend: list[str]
    """What keeps training from being right, each with what to do. Empty is good."""

    warnings: list[str]
    """What to know before believing the result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: dicts, lists, text and numbers."""
        plain = dataclasses.asdict(self)
        plain["broken"] = [problem._asdict() for problem in self.broken]
        plain["near_duplicates"] = [pair._asdict() for pair in self.near_duplicates]
        plain["gaps"] = [list(gap) for gap in self.gaps]
        return plain


def audit(
    index: PhotoIndex,
    facts: Sequence[PhotoFacts],
    *,
    near_distance: int,
    skip_broken: bool,
    crop_fallback_rate: float | None,
    estimates: Mapping[str, float],
) -> Audit:
    """Judge a data set.

    Args:
        index: The photos, with their splits decided.
        facts: What `inspect_photos` found, one for each photo, in order.
        near_distance: Photos of different splits whose perceptual hashes differ in no more bits are near-duplicates.
            Of 5,902 photos of 100 bird species, 3 pairs were within 6 bits, 2 of them the same photo treated
            differently, and 17 within 8: 6 is a good value.
        skip_broken: Broken photos are left out of training, so they are a warning and need not be mended.
        crop_fallback_rate: Measured on these photos by whoever knows the recipe, in [0, 1]; None for none.
        estimates: Memory and time, by names with units; passed through.
    """
    found = find_out(
        index,
        facts,
        near_distance=near_distance,
        skip_broken=skip_broken,
        crop_fallback_rate=crop_fallback_rate,
        estimates=estimates,
    )
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    must_mend = [*_class_faults(found), *_photo_faults(found, skip_broken)]
    return Audit(**values, must_mend=must_mend, warnings=[*_doubts(found, skip_broken), *_weaknesses(found)])


def _class_faults(found: Findings) -> list[str]:
    lines: list[str] = []
    if len(found.num_train) < 2:
        only = f"there is only {listed(list(found.num_train))}" if found.num_train else "there is none"
        lines.append(f"A classifier needs at least 2 classes; {only}. Add a class folder with photos")
    untrained = [name for name, count in found.num_train.items() if not count]
    if untrained:
        lines.append(f"{_classes(untrained)} no photo in train: {listed(untrained)}. Add some, or leave the class out")
    if found.crossing_groups:
        name, splits = next(iter(found.crossing_groups.items()))
        lines.append(
            f"{_count(len(found.crossing_groups), 'group lies', 'groups lie')} in more than one split: {name!r} is "
            f"in {' and '.join(splits)}. Move each to one side"
        )
    return lines


def _photo_faults(found: Findings, skip_broken: bool) -> list[str]:
    lines: list[str] = []
    if found.broken and not skip_broken:
        first = found.broken[0]
        lines.append(
            f"{_count(len(found.broken), 'photo', 'photos')} cannot be used, such as {first.path!r}: {first.reason}. "
            'Replace or delete them, or set data.broken = "skip"'
        )
    if found.conflicting_labels:
        lines.append(
            f"{_count(len(found.conflicting_labels), 'photo has', 'photos have')} more than one label, such as "
            f"{listed(found.conflicting_labels[0])}. Keep the right one"
        )
    if found.exact_across_splits:
        lines.append(
            f"{_count(len(found.exact_across_splits), 'photo lies', 'photos lie')} in more than one split, such as "
            f"{listed(found.exact_across_splits[0])}. The result would be too good: delete the copies"
        )
    return lines


def _doubts(found: Findings, skip_broken: bool) -> list[str]:
    """What may make the result better than it is, or other than it seems."""
    lines: list[str] = []
    if found.broken and skip_broken:
        lines.append(f"{_count(len(found.broken), 'photo', 'photos')} cannot be used and will be left out")
    if found.exact_in_unlabelled:
        copies = _count(len(found.exact_in_unlabelled), "photo", "photos")
        lines.append(
            f"{copies} of the unlabelled test also in train or val, such as {listed(found.exact_in_unlabelled[0])}"
        )
    if found.num_near_duplicates:
        pair = found.near_duplicates[0]
        lines.append(
            f"{_count(found.num_near_duplicates, 'pair', 'pairs')} of photos in different splits look alike, such as "
            f"{pair.path!r} and {pair.other_path!r}. If they show the same moment, group them: the result is too good "
            "otherwise"
        )
    repeated = len(found.exact_duplicates) - len(found.exact_across_splits) - len(found.exact_in_unlabelled)
    if repeated:
        lines.append(f"{_count(repeated, 'photo is', 'photos are')} there more than once in a split: each copy counts")
    lines += [f"Classes with nearly the same name: {listed(names)}. Are they one?" for names in found.similar_names]
    return lines


def _weaknesses(found: Findings) -> list[str]:
    """What makes the classifier worse than it could be, or its measure coarse."""
    lines: list[str] = []
    for split in ("val", "test"):
        absent = [name for name, gap in found.gaps if gap == split]
        if absent:
            lines.append(f"{_classes(absent)} no photo in {split}: {listed(absent)}. Nothing is measured there")
    few = sorted((count, name) for name, count in found.num_train.items() if 0 < count < FEW_PHOTOS)
    if few:
        names = [name for _, name in few]
        lines.append(f"{_classes(names)} fewer than {FEW_PHOTOS} photos to train on: {listed(names)}")
    if found.imbalance is not None and found.imbalance > IMBALANCE:
        lines.append(
            f"The largest class has {found.imbalance:.0f} times the training photos of the smallest. Look at macro "
            'recall beside accuracy, or set train.class_weights = "balanced"'
        )
    if found.crop_fallback_rate is not None and found.crop_fallback_rate > CROP_FALLBACK:
        lines.append(
            f"{found.crop_fallback_rate:.0%} of the training crops fall back to one and the same centre crop: a scale "
            'above 1 does not fit into the photo. Lower augment.crop_scale, or set augment.crop = "zoom"'
        )
    return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _classes(names: Sequence[str]) -> str:
    return _count(len(names), "class has", "classes have")
