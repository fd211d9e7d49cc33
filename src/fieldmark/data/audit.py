"""What `fieldmark check` reports of a data set: what must be fixed before training, and what to know besides."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.folders import quote
from fieldmark.data.index import SPLITS, PhotoIndex
from fieldmark.data.inspection import PhotoFacts
from fieldmark.data.splits import split_gaps
from fieldmark.files import list_findings

MOST_NEAR_DUPLICATES = 1000  # only so many pairs are listed; all are counted
FEW_PHOTOS = 10  # a class with fewer training photos is pointed out
IMBALANCE = 10.0  # so many times more photos in the largest class than in the smallest are pointed out
PAIRS_AT_ONCE = 1 << 18  # so that they stay in the processor's cache

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """A photo that cannot be used."""

    path: str
    reason: str


@dataclass(frozen=True)
class NearDuplicate:
    """Two photos of different splits that look alike."""

    path: str
    split: str
    other_path: str
    other_split: str
    distance: int  # differing bits of the perceptual hashes, of 64; always even, as half of each hash's bits are set


@dataclass(frozen=True)
class SizeSummary:
    """The sizes of the photos that can be used, in pixels."""

    num_bytes: int
    min_short_side: int
    median_short_side: float
    max_short_side: int
    median_aspect: float  # width over height
    max_pixels: int
    smallest: str  # path of the photo with the shortest short side


@dataclass(frozen=True)
class Audit:
    """Everything that was found out about a data set, and what it means. Plain data: the caller prints it."""

    root: str
    num_photos: int
    counts: dict[str, dict[str, int]]  # class -> split -> photos
    num_unlabeled: int
    ignored: dict[str, int]
    reading: str  # how the data were read, and what was skipped of them
    sizes: SizeSummary | None  # None where no photo can be used
    formats: dict[str, int]
    modes: dict[str, int]
    color_profiles: dict[str, int]  # other than sRGB; decoding ignores them
    broken: list[Problem]
    exact_duplicates: list[list[str]]  # groups of paths with the same bytes
    exact_across_splits: list[list[str]]  # those in more than one split by their labeled photos alone
    exact_in_unlabeled: list[list[str]]  # those in more than one split because of an unlabeled test photo
    conflicting_labels: list[list[str]]  # those with more than one label
    near_duplicates: list[NearDuplicate]  # nearest first; exact duplicates are not among them
    num_near_duplicates: int
    num_train: dict[str, int]  # class -> photos that will be trained on
    imbalance: float | None  # training photos of the largest class over those of the smallest
    gaps: list[tuple[str, str]]  # (class, split) where a class has no photo
    crossing_groups: dict[str, list[str]]  # group -> its splits, where there is more than one
    similar_names: list[list[str]]  # classes whose names differ only in case, spaces or Unicode form
    must_fix: list[str] = field(default_factory=list[str])  # what must be fixed before training, and how
    warnings: list[str] = field(default_factory=list[str])  # what to know before believing the result


def audit(index: PhotoIndex, facts: Sequence[PhotoFacts], *, near_distance: int, skip_broken: bool) -> Audit:
    """Examine a data set whose splits are decided; facts are of an `Inspection`.

    Photos of different splits whose perceptual hashes differ in no more than `near_distance` bits are near-duplicates.
    Of 5,902 photos of 100 bird species, 3 pairs were within 6 bits, 2 of them the same photo treated differently, and
    17 within 8: 6 is a good value. With `skip_broken`, broken photos are a warning and need not be fixed.
    """
    photos = index.photos
    copies = _find_copies(facts)
    across = [numbers for numbers in copies if len({photos[n].split for n in numbers} - {""}) > 1]
    leaks = _find_leaks(index, copies)
    near = _find_near_duplicates(index, facts, near_distance)
    trained = index.select(np.array([not fact.problem for fact in facts], np.bool_)) if skip_broken else index
    num_train = {name: count.get("train", 0) for name, count in trained.counts().items()}
    present = [count for count in num_train.values() if count]
    found = Audit(
        root=str(index.root),
        num_photos=len(photos),
        counts=index.counts(),
        num_unlabeled=int((~photos.is_labeled()).sum()),
        ignored=dict(index.ignored),
        reading=index.describe(),
        sizes=_summarize_sizes(index, facts),
        formats=_tally(fact.format for fact in facts),
        modes=_tally(fact.mode for fact in facts),
        color_profiles=_tally(fact.color_profile for fact in facts),
        broken=[
            *(Problem(*shard) for shard in index.damaged),
            *(Problem(photo.path, fact.problem) for photo, fact in zip(photos, facts, strict=True) if fact.problem),
        ],
        exact_duplicates=_paths(index, copies),
        exact_across_splits=_paths(index, leaks),
        exact_in_unlabeled=_paths(index, [numbers for numbers in across if numbers not in leaks]),
        conflicting_labels=_paths(index, _find_conflicts(index, copies)),
        near_duplicates=near[:MOST_NEAR_DUPLICATES],
        num_near_duplicates=len(near),
        num_train=num_train,
        imbalance=max(present) / min(present) if present else None,
        gaps=split_gaps(trained),
        crossing_groups=_find_crossing_groups(index),
        similar_names=_find_similar_names(index.classes),
    )
    few = [name for _, name in sorted((count, name) for name, count in num_train.items() if 0 < count < FEW_PHOTOS)]
    values = {**vars(found), "found": found, "skip_broken": skip_broken}
    values |= {"few": few, "least": FEW_PHOTOS, "most": IMBALANCE}
    return replace(found, must_fix=_say("faults.md", values), warnings=_say("doubts.md", values))


def find_doubts(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> list[str]:
    """Say what a training should mention of its labels: nearly equal class names, and one photo under two of them."""
    conflicts = _paths(index, _find_conflicts(index, _find_copies(facts)))
    return _say("labels.md", {"similar_names": _find_similar_names(index.classes), "conflicting_labels": conflicts})


def find_leaks(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> list[str]:
    """Say that labeled copies of one photo lie in more than one split."""
    return _say("leaks.md", {"exact_across_splits": _paths(index, _find_leaks(index, _find_copies(facts)))})


def _find_leaks(index: PhotoIndex, copies: Sequence[list[int]]) -> list[list[int]]:
    labeled = index.photos.is_labeled()
    return [numbers for numbers in copies if len({index.photos[n].split for n in numbers if labeled[n]} - {""}) > 1]


def find_gaps_in_training(num_train: Mapping[str, int]) -> list[str]:
    """Say what a classifier lacks to learn, by the number of training photos of each class."""
    return _say("gaps.md", {"num_train": num_train})


def near_pairs(first: Hashes, second: Hashes, *, max_distance: int) -> tuple[Numbers, Numbers, Numbers]:
    """Every pair of one 64-bit hash of `first` and one of `second` that differ in few bits.

    Gives (P,) indices in `first`, (P,) in `second` and (P,) distances; ordered by distance, then by index. All pairs
    are compared, some hundred million a second, which is far less work than to decode the photos.
    """
    found = [np.empty((3, 0), np.int64)]
    rows = max(PAIRS_AT_ONCE // max(len(second), 1), 1)
    for start in range(0, len(first), rows):
        distances = np.bitwise_count(first[start : start + rows, None] ^ second)
        left, right = np.nonzero(distances <= max_distance)
        found.append(np.stack([distances[left, right], left + start, right]).astype(np.int64))
    distances, left, right = np.concatenate(found, axis=1)
    ranked = np.lexsort((right, left, distances))
    return left[ranked], right[ranked], distances[ranked]


def _find_copies(facts: Sequence[PhotoFacts]) -> list[list[int]]:
    """Photos with the same bytes, a group each, in order of first occurrence; empty files are nobody's copies."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, fact in enumerate(facts):
        if fact.sha256 and fact.num_bytes:
            numbers[fact.sha256].append(number)
    return [group for group in numbers.values() if len(group) > 1]


def _find_conflicts(index: PhotoIndex, copies: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    return [numbers for numbers in copies if len({index.photos[n].label for n in numbers} - {None}) > 1]


def _find_near_duplicates(index: PhotoIndex, facts: Sequence[PhotoFacts], max_distance: int) -> list[NearDuplicate]:
    pairs: list[NearDuplicate] = []
    # Of copies one for each split: thousands of one placeholder would make millions of pairs.
    places = (
        (fact.sha256, index.photos[number].split, number) for number, fact in enumerate(facts) if fact.perceptual_hash
    )
    numbers = sorted({(sha256, split): number for sha256, split, number in places}.values())
    hashes = np.array([int(facts[number].perceptual_hash, 16) for number in numbers], np.uint64)
    splits = index.photos.splits[numbers]
    for one, other in combinations(SPLITS, 2):
        ours, theirs = (np.flatnonzero(splits == SPLITS.index(split)) for split in (one, other))
        found = near_pairs(hashes[ours], hashes[theirs], max_distance=max_distance)
        for left, right, distance in zip(*(values.tolist() for values in found), strict=True):
            first, second = numbers[ours[left]], numbers[theirs[right]]
            if facts[first].sha256 != facts[second].sha256:
                pairs.append(NearDuplicate(index.photos[first].path, one, index.photos[second].path, other, distance))
    return sorted(pairs, key=lambda pair: pair.distance)


def _summarize_sizes(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> SizeSummary | None:
    usable = [(min(fact.width, fact.height), n) for n, fact in enumerate(facts) if not fact.problem]
    if not usable:
        return None
    good = [facts[n] for _, n in usable]
    return SizeSummary(
        num_bytes=sum(fact.num_bytes for fact in good),
        min_short_side=min(usable)[0],
        median_short_side=float(median(short_side for short_side, _ in usable)),
        max_short_side=max(usable)[0],
        median_aspect=float(median(fact.width / fact.height for fact in good)),
        max_pixels=max(fact.width * fact.height for fact in good),
        smallest=index.photos[min(usable)[1]].path,
    )


def _find_crossing_groups(index: PhotoIndex) -> dict[str, list[str]]:
    sides: defaultdict[str, set[str]] = defaultdict(set)
    for photo in index.photos:
        if photo.group and photo.split:
            sides[photo.group].add(photo.split)
    return {group: sorted(found, key=SPLITS.index) for group, found in sides.items() if len(found) > 1}


def _find_similar_names(classes: Sequence[str]) -> list[list[str]]:
    by_form: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        by_form[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    return [names for names in by_form.values() if len(names) > 1]


def _paths(index: PhotoIndex, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[index.photos[number].path for number in group] for group in groups]


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(value for value in values if value).most_common())


def _say(template: str, values: Mapping[str, object]) -> list[str]:
    """The sentences of a template, one for each line of it that has a reason."""
    return list_findings(template, values, filters={"quote": quote, "repr": repr, "count": _count})


def _count(things: int | Sequence[object] | Mapping[str, object], one: str, many: str) -> str:
    number = things if isinstance(things, int) else len(things)
    return f"{number} {one if number == 1 else many}"
