"""What there is to know about a data set: from an index and the facts of its inspection to plain data.

Nothing is read and nothing is judged here; see `audit` for what must be mended.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fieldmark.data.duplicates import near_pairs, same_values
from fieldmark.data.index import SPLITS, PhotoIndex
from fieldmark.data.splits import split_gaps

if TYPE_CHECKING:
    from fieldmark.data.inspection import PhotoFacts

MOST_NEAR_DUPLICATES = 1000
"""Only so many pairs are listed; all are counted."""


class Problem(NamedTuple):
    """A photo that cannot be used."""

    path: str
    reason: str


class NearDuplicate(NamedTuple):
    """Two photos of different splits that look alike."""

    path: str
    split: str
    other_path: str
    other_split: str
    distance: int
    """Differing bits of the perceptual hashes, of 64. Always even: half of each hash's bits are set."""


@dataclass(frozen=True)
class SizeSummary:
    """The sizes of the photos that can be used; None where there are none."""

    num_bytes: int
    min_short_side: int
    median_short_side: float
    max_short_side: int
    median_aspect: float
    """Width over height."""

    max_pixels: int
    smallest: str
    """Path of the photo with the shortest short side."""


@dataclass(frozen=True)
class Findings:
    """Everything that was found out about a data set, without judgement."""

    root: str
    num_photos: int
    counts: dict[str, dict[str, int]]
    """Class -> split -> photos."""

    num_unlabelled: int
    ignored: dict[str, int]
    sizes: SizeSummary | None
    formats: dict[str, int]
    modes: dict[str, int]
    broken: list[Problem]
    exact_duplicates: list[list[str]]
    """Groups of paths with the same bytes."""

    exact_across_splits: list[list[str]]
    """Those of them that lie in more than one split by their labelled photos alone."""

    exact_in_unlabelled: list[list[str]]
    """Those of them that lie in more than one split because one is an unlabelled test photo."""

    conflicting_labels: list[list[str]]
    """Those of them that carry more than one label."""

    near_duplicates: list[NearDuplicate]
    """Nearest first; at most MOST_NEAR_DUPLICATES. Exact duplicates are not among them."""

    num_near_duplicates: int
    num_train: dict[str, int]
    """Class -> photos in train that will be trained on."""

    imbalance: float | None
    """Photos of the largest class over those of the smallest, in train."""

    gaps: list[tuple[str, str]]
    """(class, split) where a class has no photo."""

    crossing_groups: dict[str, list[str]]
    """Group -> the splits that it lies in, where there is more than one."""

    similar_names: list[list[str]]
    """Classes whose names differ only in case, spaces or Unicode form."""

    crop_fallback_rate: float | None
    """Share of training crops that fall back to a fixed centre crop; None where it was not measured."""

    estimates: dict[str, float]
    """Memory and time of a run, as they were passed in; the names carry the units."""


def find_out(
    index: PhotoIndex,
    facts: Sequence[PhotoFacts],
    *,
    near_distance: int,
    skip_broken: bool,
    crop_fallback_rate: float | None,
    estimates: Mapping[str, float],
) -> Findings:
    """Gather the findings. Arguments are those of `audit`."""
    broken = [
        Problem(photo.path, fact.problem) for photo, fact in zip(index.photos, facts, strict=True) if fact.problem
    ]
    same = same_values([fact.sha256 if fact.num_bytes else "" for fact in facts])
    across = [places for places in same if len({index.photos[place].split for place in places} - {""}) > 1]
    leaks = [places for places in across if len(_values(index, _labelled(index, places), "split")) > 1]
    near = _near_duplicates(index, facts, near_distance)
    usable = tuple(photo for photo, fact in zip(index.photos, facts, strict=True) if not fact.problem)
    trained = replace(index, photos=usable) if skip_broken else index
    num_train = {name: count.get("train", 0) for name, count in trained.counts().items()}
    present = [count for count in num_train.values() if count]
    return Findings(
        root=str(index.root),
        num_photos=len(index.photos),
        counts=index.counts(),
        num_unlabelled=sum(photo.label is None for photo in index.photos),
        ignored=dict(index.ignored),
        sizes=_sizes(index, facts),
        formats=_tally(fact.format for fact in facts),
        modes=_tally(fact.mode for fact in facts),
        broken=broken,
        exact_duplicates=[_paths(index, places) for places in same],
        exact_across_splits=[_paths(index, places) for places in leaks],
        exact_in_unlabelled=[_paths(index, places) for places in across if places not in leaks],
        conflicting_labels=[_paths(index, places) for places in same if len(_values(index, places, "label")) > 1],
        near_duplicates=near[:MOST_NEAR_DUPLICATES],
        num_near_duplicates=len(near),
        num_train=num_train,
        imbalance=max(present) / min(present) if present else None,
        gaps=split_gaps(trained),
        crossing_groups=_crossing_groups(index),
        similar_names=_similar_names(index.classes),
        crop_fallback_rate=crop_fallback_rate,
        estimates=dict(estimates),
    )


def _near_duplicates(index: PhotoIndex, facts: Sequence[PhotoFacts], max_distance: int) -> list[NearDuplicate]:
    pairs: list[NearDuplicate] = []
    places = {
        split: [n for n, photo in enumerate(index.photos) if photo.split == split and facts[n].perceptual_hash]
        for split in SPLITS
    }
    hashes = {
        split: np.array([int(facts[n].perceptual_hash, 16) for n in numbers], dtype=np.uint64)
        for split, numbers in places.items()
    }
    for one, other in combinations(SPLITS, 2):
        found = near_pairs(hashes[one], hashes[other], max_distance=max_distance)
        for left, right, distance in zip(*(values.tolist() for values in found), strict=True):
            first, second = places[one][left], places[other][right]
            if facts[first].sha256 != facts[second].sha256:
                paths = index.photos[first].path, index.photos[second].path
                pairs.append(NearDuplicate(paths[0], one, paths[1], other, distance))
    return sorted(pairs, key=lambda pair: pair.distance)


def _sizes(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> SizeSummary | None:
    usable = [(min(fact.width, fact.height), n) for n, fact in enumerate(facts) if not fact.problem]
    if not usable:
        return None
    short_sides = [short_side for short_side, _ in usable]
    good = [facts[n] for _, n in usable]
    return SizeSummary(
        num_bytes=sum(fact.num_bytes for fact in good),
        min_short_side=min(short_sides),
        median_short_side=float(median(short_sides)),
        max_short_side=max(short_sides),
        median_aspect=float(median(fact.width / fact.height for fact in good)),
        max_pixels=max(fact.width * fact.height for fact in good),
        smallest=index.photos[min(usable)[1]].path,
    )


def _crossing_groups(index: PhotoIndex) -> dict[str, list[str]]:
    sides: defaultdict[str, set[str]] = defaultdict(set)
    for photo in index.photos:
        if photo.group and photo.split:
            sides[photo.group].add(photo.split)
    return {group: sorted(found, key=SPLITS.index) for group, found in sides.items() if len(found) > 1}


def _similar_names(classes: Sequence[str]) -> list[list[str]]:
    by_form: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        by_form[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    return [names for names in by_form.values() if len(names) > 1]


def _values(index: PhotoIndex, places: Sequence[int], field: str) -> set[str]:
    """The different splits or labels of some photos; undecided and unlabelled ones do not count."""
    return {value for place in places if (value := getattr(index.photos[place], field))}


def _labelled(index: PhotoIndex, places: Sequence[int]) -> list[int]:
    return [place for place in places if index.photos[place].label is not None]


def _paths(index: PhotoIndex, places: Sequence[int]) -> list[str]:
    return [index.photos[place].path for place in places]


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(value for value in values if value).most_common())
