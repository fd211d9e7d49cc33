"""What `fieldmark check` reports of a data set: what must be mended before training, and what to know besides."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.folders import quote
from fieldmark.data.index import SPLITS, PhotoIndex
from fieldmark.data.splits import split_gaps

if TYPE_CHECKING:
    from fieldmark.data.index import PhotoIndex
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
    reading: str
    """How the data were read, and what was skipped of them."""

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
        reading=index.describe(),
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


def find_doubts(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> list[str]:
    """Say what a training should mention of its labels: nearly equal class names, and one photo under two of them."""
    lines = [_similar_text(names) for names in _similar_names(index.classes)]
    same = same_values([fact.sha256 for fact in facts])
    if conflicts := [places for places in same if len(_values(index, places, "label")) > 1]:
        lines.append(
            f"{_count(len(conflicts), 'photo has', 'photos have')} more than one label, such as "
            f"{quote(_paths(index, conflicts[0]))}. Keep the right one"
        )
    return lines


def _similar_text(names: Sequence[str]) -> str:
    return f"classes with nearly the same name: {quote(names)}. Are they one?"


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


NUM_BITS = 64
BAND_BITS = 16
NUM_BANDS = NUM_BITS // BAND_BITS
PAIRS_AT_ONCE = 4_000_000

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


def same_values(values: Sequence[str]) -> list[list[int]]:
    """Places of each value that occurs more than once, in order of first occurrence; "" does not count."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if value:
            places[value].append(place)
    return [found for found in places.values() if len(found) > 1]


def near_pairs(first: Hashes, second: Hashes, *, max_distance: int) -> tuple[Places, Places, Places]:
    """Every pair of one hash of `first` and one of `second` that differ in few bits. Exact, not approximate.

    Args:
        first: (N,) 64-bit hashes.
        second: (M,) 64-bit hashes.
        max_distance: Largest Hamming distance, 0 to 64. Up to 7 a search takes about a second for 50,000 x 50,000;
            above 11 it nears a comparison of everything with everything.

    Returns:
        (P,) places in `first`, (P,) places in `second`, (P,) distances; ordered by distance, then by place.

    Source:
        Norouzi, Punjani, Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing", arXiv:1307.2982,
        section 3: of four bands of 16 bits, at least one differs in no more than a quarter of the distance.
    """
    # Equal hashes are searched once: a thousand black photos would otherwise be a million pairs in every band.
    unique_first, inverse_first = np.unique(first, return_inverse=True)
    unique_second, inverse_second = np.unique(second, return_inverse=True)
    found = [
        np.stack([left, right])
        for band in range(NUM_BANDS)
        for left, right in _candidates(unique_first, unique_second, band, max_distance // NUM_BANDS)
        for left, right in [_keep_near(unique_first, unique_second, left, right, max_distance)]
    ]
    if not found:
        return _expand(np.empty((2, 0), dtype=np.int64), inverse_first, inverse_second, first, second)
    pairs = np.unique(np.concatenate(found, axis=1), axis=1)  # a pair is found in every band that is close
    return _expand(pairs, inverse_first, inverse_second, first, second)


def _candidates(first: Hashes, second: Hashes, band: int, radius: int) -> Iterator[tuple[Places, Places]]:
    """Pairs whose band differs in at most `radius` bits, a portion at a time."""
    shift = np.uint64(band * BAND_BITS)
    bands_first = ((first >> shift) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
    bands_second = ((second >> shift) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
    order = np.argsort(bands_second, kind="stable")
    # starts[v] : starts[v + 1] are the places in `order` of the hashes whose band is v.
    starts = np.concatenate([[0], np.cumsum(np.bincount(bands_second, minlength=2**BAND_BITS))])
    for flipped in _masks(radius):
        wanted = bands_first ^ flipped
        counts = starts[wanted + 1] - starts[wanted]
        for chunk in _chunks(counts):
            repeats = counts[chunk]
            left = np.repeat(np.arange(len(first))[chunk], repeats)
            ends = np.cumsum(repeats)
            within = np.arange(len(left)) - np.repeat(ends - repeats, repeats)
            yield left, order[np.repeat(starts[wanted[chunk]], repeats) + within]


def _masks(radius: int) -> list[int]:
    """Every number of BAND_BITS bits with at most `radius` of them set."""
    sizes = range(min(radius, BAND_BITS) + 1)
    return [sum(1 << bit for bit in bits) for size in sizes for bits in combinations(range(BAND_BITS), size)]


def _chunks(counts: Places) -> Iterator[slice]:
    """Slices over `counts`, each of about PAIRS_AT_ONCE pairs, so that memory stays bounded."""
    portion = np.cumsum(counts) // PAIRS_AT_ONCE
    borders = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(counts)]
    for start, stop in pairwise(borders):
        if counts[start:stop].any():
            yield slice(start, stop)


def _keep_near(first: Hashes, second: Hashes, left: Places, right: Places, max_distance: int) -> tuple[Places, Places]:
    near = np.bitwise_count(first[left] ^ second[right]) <= max_distance
    return left[near], right[near]


def _expand(
    pairs: Places, inverse_first: Places, inverse_second: Places, first: Hashes, second: Hashes
) -> tuple[Places, Places, Places]:
    """Pairs of unique hashes back to pairs of all that have them."""
    members_first = np.split(np.argsort(inverse_first, kind="stable"), np.cumsum(np.bincount(inverse_first))[:-1])
    members_second = np.split(np.argsort(inverse_second, kind="stable"), np.cumsum(np.bincount(inverse_second))[:-1])
    lefts: list[Places] = [np.empty(0, dtype=np.int64)]
    rights: list[Places] = [np.empty(0, dtype=np.int64)]
    for one, other in pairs.T:
        ours, theirs = members_first[one], members_second[other]
        lefts.append(np.repeat(ours, len(theirs)))
        rights.append(np.tile(theirs, len(ours)))
    left, right = np.concatenate(lefts), np.concatenate(rights)
    distances = np.bitwise_count(first[left] ^ second[right]).astype(np.int64)
    order = np.lexsort((right, left, distances))
    return left[order], right[order], distances[order]


FEW_PHOTOS = 10
"""A class with fewer training photos than this is pointed out."""

IMBALANCE = 10.0
"""So many times more photos in the largest class than in the smallest are pointed out."""


CROP_FALLBACK = 0.05
"""A larger share of fixed center crops is pointed out."""


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
        only = f"there is only {quote(list(found.num_train))}" if found.num_train else "there is none"
        lines.append(f"A classifier needs at least 2 classes; {only}. Add a class folder with photos")
    untrained = [name for name, count in found.num_train.items() if not count]
    if untrained:
        lines.append(f"{_classes(untrained)} no photo in train: {quote(untrained)}. Add some, or leave the class out")
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
            f"{quote(found.conflicting_labels[0])}. Keep the right one"
        )
    if found.exact_across_splits:
        lines.append(
            f"{_count(len(found.exact_across_splits), 'photo lies', 'photos lie')} in more than one split, such as "
            f"{quote(found.exact_across_splits[0])}. The result would be too good: delete the copies"
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
            f"{copies} of the unlabelled test also in train or val, such as {quote(found.exact_in_unlabelled[0])}"
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
    return [*lines, *map(_similar_text, found.similar_names)]


def _weaknesses(found: Findings) -> list[str]:
    """What makes the classifier worse than it could be, or its measure coarse."""
    lines: list[str] = []
    for split in ("val", "test"):
        absent = [name for name, gap in found.gaps if gap == split]
        if absent:
            lines.append(f"{_classes(absent)} no photo in {split}: {quote(absent)}. Nothing is measured there")
    few = sorted((count, name) for name, count in found.num_train.items() if 0 < count < FEW_PHOTOS)
    if few:
        names = [name for _, name in few]
        lines.append(f"{_classes(names)} fewer than {FEW_PHOTOS} photos to train on: {quote(names)}")
    if found.imbalance is not None and found.imbalance > IMBALANCE:
        lines.append(
            f"The largest class has {found.imbalance:.0f} times the training photos of the smallest. Look at macro "
            'recall beside accuracy, or set train.class_weights = "balanced"'
        )
    if found.crop_fallback_rate is not None and found.crop_fallback_rate > CROP_FALLBACK:
        lines.append(
            f"{found.crop_fallback_rate:.0%} of the training crops fall back to one and the same center crop, because "
            'ten draws in a row do not fit into the photo. Lower augment.crop_scale, or set augment.crop = "zoom"'
        )
    return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _classes(names: Sequence[str]) -> str:
    return _count(len(names), "class has", "classes have")
