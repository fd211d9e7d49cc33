"""Who trains, who judges: stratified splits that no group crosses, repeatable by seed, and remembered on disk.

What the data decide themselves is respected; only what is missing is made.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.index import PhotoIndex, load_split_table, save_split_table
from fieldmark.errors import DataError, ResourceError

if TYPE_CHECKING:
    from fieldmark.data.inspection import PhotoFacts


PARTS = ("train", "val", "test")


def split_index(
    index: PhotoIndex, *, val_fraction: float, test_fraction: float, seed: int, groups: Sequence[str] | None
) -> PhotoIndex:
    """Decide a split for every labelled photo that has none, stratified by class.

    If the data have a val (or test) split, none is made. If all photos are in train, val and test are taken out of it;
    otherwise only undecided photos are touched. A class with two photos or more keeps at least one in train. Without
    groups, each class gives its exact share, rounded down or up so that the totals are right; with groups, the share
    is as near as the groups allow.

    Args:
        index: Photos with or without a split.
        val_fraction: Share of the labelled photos to divide that goes to val, in (0, 1).
        test_fraction: Share that goes to test, in [0, 1).
        seed: Same seed and same photos, same split.
        groups: Group of each photo, "" for none; groups are never divided. None is no groups at all.

    Returns:
        The same photos with every labelled one in train, val or test, and the group that was used.

    Raises:
        DataError: No photo could be set aside for a split that was asked for.
    """
    return _divide(index, {}, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, groups=groups)


def remembered_split(
    index: PhotoIndex,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None,
    settings: Mapping[str, object],
    folder: Path,
) -> PhotoIndex:
    """As `split_index`, but photos keep the split that they were given before.

    The split is a table in `folder`, one for each data root and `settings`. Photos that have joined since are
    assigned so that the fractions come out right over all; a group stays where its first photos went.

    Args:
        index: As in `split_index`.
        val_fraction: As in `split_index`.
        test_fraction: As in `split_index`.
        seed: As in `split_index`.
        groups: As in `split_index`.
        settings: What tells this split from others of the same folder, such as how groups are made; JSON values. The
            fractions and the seed are added to it.
        folder: Where the tables are kept. Made if absent.

    Raises:
        DataError: As in `split_index`, or the remembered table is damaged or cannot be written.
    """
    key = {**settings, "val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed}
    root = str(index.root.resolve())
    text = json.dumps([root, key], sort_keys=True)
    table = folder / f"split-{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"
    kept = load_split_table(table, index.root).photos if table.exists() else ()
    before = {photo.path: photo.split for photo in kept}
    divided = _divide(index, before, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, groups=groups)
    # Photos that are away for now (an unmounted disk, a review) are remembered too.
    now = {photo.path for photo in divided.photos}
    away = (photo for photo in kept if photo.path not in now)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_split_table(replace(divided, photos=(*divided.photos, *away)), table)
    except (OSError, ResourceError) as error:
        if [photo.split for photo in divided.photos] == [photo.split for photo in index.photos]:
            return divided  # the data say it all: there was nothing to remember
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"the split cannot be kept in {folder}: {reason}. Make room or make it writable there, or set "
            "XDG_CACHE_HOME to a folder where both is so"
        ) from None
    return divided


def fold_index(index: PhotoIndex, *, folds: int, fold: int, seed: int, groups: Sequence[str] | None) -> PhotoIndex:
    """One fold of stratified k-fold cross-validation over train, val and undecided photos; test stays apart.

    Over all folds each photo is in val once, except one whose class would be left without training photos: it stays
    in train.

    Args:
        index: Photos with or without a split.
        folds: Number of folds k, at least 2.
        fold: Which of them is val, from 0.
        seed: Same seed and same photos, same folds.
        groups: As in `split_index`.

    Raises:
        DataError: Fewer photos in the largest class, or fewer groups, than folds.

    Source:
        scikit-learn's StratifiedKFold and StratifiedGroupKFold.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    index, members = _with_groups(index, groups)
    labels = index.label_numbers()
    parts = np.array([photo.split for photo in index.photos], dtype=object)
    pool = np.flatnonzero((parts != "test") & (labels >= 0))
    largest = int(np.bincount(labels[pool]).max(initial=0))
    if largest < folds:
        raise DataError(f"{folds} folds need a class of as many photos; the largest has {largest}. Use fewer folds")
    num_groups = len(np.unique(members[pool]))
    if num_groups < folds:
        raise DataError(f"{folds} folds need as many groups; there are {num_groups}. Use fewer folds, or group less")
    kind, grouping = (StratifiedKFold, None) if groups is None else (StratifiedGroupKFold, members[pool])
    with warnings.catch_warnings():
        # A class smaller than k has a photo in as many folds as it can: split_gaps reports the others.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        divided = list(kind(folds, shuffle=True, random_state=seed % 2**32).split(pool, labels[pool], grouping))
    parts[pool] = "train"
    parts[pool[divided[fold][1]]] = "val"
    return_to_train(parts, labels, members, pool)
    return _with_splits(index, parts)


def split_gaps(index: PhotoIndex) -> list[tuple[str, str]]:
    """(class, split) for each class without photos in a split that has labelled photos of other classes."""
    counts = index.counts()
    splits = [split for split in PARTS if any(count.get(split) for count in counts.values())]
    return [(name, split) for name, count in counts.items() for split in splits if not count[split]]


def groups_by_column(index: PhotoIndex) -> list[str]:
    """The group that the table gave to each photo.

    Raises:
        DataError: No photo has one.
    """
    groups = [photo.group for photo in index.photos]
    if not any(groups):
        raise DataError(f"no photo of {index.root} has a group: the table needs a group column with values in it")
    return groups


def groups_by_pattern(index: PhotoIndex, pattern: str) -> list[str]:
    """What the first parentheses of a regular expression match in each path; "" where it does not match.

    Raises:
        DataError: It matches no photo.
    """
    expression = re.compile(pattern)
    matches = [expression.search(photo.path) for photo in index.photos]
    groups = [(match[1] or "") if match else "" for match in matches]
    if not any(groups):
        example = f", such as {index.photos[0].path!r}" if index.photos else ""
        raise DataError(f"group pattern {pattern!r} matches no path{example}. The path starts below {index.root}")
    return groups


def groups_by_capture_time(index: PhotoIndex, facts: Sequence[PhotoFacts], gap_seconds: float) -> list[str]:
    """Bursts: photos of which each was taken no more than `gap_seconds` after the one before; "" without EXIF time.

    Raises:
        DataError: No photo tells its time.
    """
    times = [(fact.captured_at, number) for number, fact in enumerate(facts) if fact.captured_at is not None]
    if not times:
        raise DataError(f"no photo of {index.root} has an EXIF capture time. Group by pattern or by a column instead")
    groups = [""] * len(index.photos)
    burst, last = 0, float("-inf")
    for captured_at, number in sorted(times):
        burst += captured_at - last > gap_seconds
        last = captured_at
        groups[number] = f"burst {burst}"
    return groups


def _divide(
    index: PhotoIndex,
    before: Mapping[str, str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None,
) -> PhotoIndex:
    index, members = _with_groups(index, groups)
    labels = index.label_numbers()
    parts = np.array([photo.split for photo in index.photos], dtype=object)
    fractions = {"val": val_fraction, "test": test_fraction}
    wanted = {part: share for part, share in fractions.items() if share > 0 and part not in parts}
    is_train = "" not in parts[labels >= 0]
    pool = np.flatnonzero((parts == ("train" if is_train else "")) & (labels >= 0))
    for number in pool:
        remembered = before.get(index.photos[number].path, "")
        parts[number] = remembered if remembered == "train" or remembered in wanted else ""
    follow_groups(parts, members, pool, is_train=is_train)
    assign(parts, labels, members, pool, wanted, np.random.default_rng(seed))
    return_to_train(parts, labels, members, pool)
    for part in wanted:
        if part not in parts:
            raise DataError(
                f"no photo of {index.root} can be set aside for {part}: of {len(pool)} photos in "
                f"{len(np.unique(members[pool]))} groups, each class keeps one in train. Add photos, or group less"
            )
    return _with_splits(index, parts)


def _with_groups(index: PhotoIndex, groups: Sequence[str] | None) -> tuple[PhotoIndex, NDArray[np.int64]]:
    """The index with these groups, and an (N,) array of numbers in which a photo without a group is one of its own."""
    num_photos = len(index.photos)
    if groups is None:
        return index, np.arange(num_photos)
    numbers: dict[str, int] = {}
    members = [numbers.setdefault(group, len(numbers)) if group else -1 for group in groups]
    alone = np.arange(num_photos) + len(numbers)
    photos = tuple(replace(photo, group=group) for photo, group in zip(index.photos, groups, strict=True))
    return replace(index, photos=photos), np.where(np.array(members, dtype=np.int64) < 0, alone, members)


def _with_splits(index: PhotoIndex, parts: NDArray[np.object_]) -> PhotoIndex:
    photos = tuple(replace(photo, split=str(part)) for photo, part in zip(index.photos, parts, strict=True))
    return replace(index, photos=photos)


Parts = NDArray[np.object_]
Numbers = NDArray[np.int64]


def follow_groups(parts: Parts, groups: Numbers, pool: Numbers, *, is_train: bool) -> None:
    """Give each photo of `pool` the split of the first photo of its group that has one; changes `parts` in place.

    Args:
        parts: (N,) split of each photo, "" while undecided.
        groups: (N,) group number of each photo.
        pool: (M,) photos that may move.
        is_train: The data say that the pool is train. Then photos outside it hold their group to train, as moving it
            would go against the data.
    """
    movable = np.zeros(len(parts), dtype=bool)
    movable[pool] = True
    homes: dict[int, str] = {}
    for number in np.flatnonzero(parts != ""):
        homes.setdefault(int(groups[number]), "train" if is_train and not movable[number] else str(parts[number]))
    for number in pool:
        parts[number] = homes.get(int(groups[number]), parts[number])


def assign(
    parts: Parts, labels: Numbers, groups: Numbers, pool: Numbers, wanted: Mapping[str, float], rng: np.random.Generator
) -> None:
    """Decide the undecided photos of `pool`; changes `parts` in place.

    Args:
        parts: (N,) split of each photo, "" while undecided.
        labels: (N,) class numbers; of the pool at least 0.
        groups: (N,) group numbers; a group is decided as a whole or not at all.
        pool: (M,) the photos of which `wanted` gives the shares.
        wanted: Split -> share of the pool, in (0, 1), together below 1. The rest is train.
        rng: Breaks ties and shuffles.
    """
    undecided = pool[parts[pool] == ""]
    if len(np.unique(groups[undecided])) == len(undecided):
        _assign_photos(parts, labels, pool, wanted, rng)
    else:
        _assign_groups(parts, labels, groups, pool, wanted, rng)
    for part in wanted:
        if part not in parts[pool]:
            _move_one_group(parts, labels, groups, pool, part)


def return_to_train(parts: Parts, labels: Numbers, groups: Numbers, pool: Numbers) -> None:
    """Move the smallest group of each class of `pool` that train lacks into train; changes `parts` in place."""
    sizes = np.bincount(groups[pool], minlength=int(groups.max(initial=-1)) + 1)
    for label in np.setdiff1d(labels[pool], labels[parts == "train"]):
        if label in labels[parts == "train"]:  # came along with the group of another class
            continue
        holders = np.unique(groups[pool[labels[pool] == label]])
        smallest = holders[np.argmin(sizes[holders])]
        parts[pool[groups[pool] == smallest]] = "train"


def _assign_photos(
    parts: Parts, labels: Numbers, pool: Numbers, wanted: Mapping[str, float], rng: np.random.Generator
) -> None:
    """Exact shares: of each class its share rounded down or up, so that the total is right (largest remainders)."""
    num_classes = int(labels[pool].max(initial=-1)) + 1
    sizes = np.bincount(labels[pool], minlength=num_classes)
    undecided = rng.permutation(pool[parts[pool] == ""])
    in_train = np.bincount(labels[pool[parts[pool] == "train"]], minlength=num_classes)
    free = np.bincount(labels[undecided], minlength=num_classes) - (in_train == 0)  # one photo stays in train
    for part, share in wanted.items():
        have = np.bincount(labels[pool[parts[pool] == part]], minlength=num_classes)
        quota = np.clip(np.floor(sizes * share).astype(np.int64) - have, 0, np.maximum(free, 0))
        missing = max(1, round(len(pool) * share)) - int((have + quota).sum())
        if missing > 0:
            remainder = np.where(quota < free, sizes * share - have - quota, -np.inf)
            order = rng.permutation(num_classes)
            order = order[np.argsort(-remainder[order], kind="stable")][:missing]
            quota[order[remainder[order] > 0]] += 1
        for label in np.flatnonzero(quota):
            chosen = undecided[labels[undecided] == label][: quota[label]]
            parts[chosen] = part
        undecided = undecided[parts[undecided] == ""]
        free = free - quota
    parts[undecided] = "train"


def _assign_groups(
    parts: Parts, labels: Numbers, groups: Numbers, pool: Numbers, wanted: Mapping[str, float], rng: np.random.Generator
) -> None:
    """Large groups first, each to the split that it brings nearest to its share of every class.

    The distance is squared error over the class's size, so that small classes count as much as large ones, plus the
    same for the total. The idea is that of Sechidis et al., "On the Stratification of Multi-Label Data", ECML 2011,
    section 4, and of scikit-learn's StratifiedGroupKFold, here with any shares.
    """
    num_classes = int(labels[pool].max(initial=-1)) + 1
    names = ("train", *wanted)
    shares = np.array([1 - sum(wanted.values()), *wanted.values()])
    # The last column is the total, which is weighed like one more class.
    sizes = np.append(np.bincount(labels[pool], minlength=num_classes), len(pool))
    need = shares[:, None] * sizes
    for place, part in enumerate(names):
        have = np.bincount(labels[pool[parts[pool] == part]], minlength=num_classes)
        need[place] -= np.append(have, have.sum())
    undecided = pool[parts[pool] == ""]
    undecided = undecided[np.argsort(groups[undecided], kind="stable")]
    _, starts = np.unique(groups[undecided], return_index=True)
    members = np.split(undecided, starts[1:])
    for place in sorted(rng.permutation(len(members)), key=lambda place: -len(members[place])):
        group = members[place]
        present, counts = np.unique(labels[group], return_counts=True)
        columns, added = np.append(present, num_classes), np.append(counts, len(group))
        cost = (added * (added - 2 * need[:, columns]) / sizes[columns]).sum(axis=1)
        best = int(np.argmin(cost))
        parts[group] = names[best]
        need[best, columns] -= added


def _move_one_group(parts: Parts, labels: Numbers, groups: Numbers, pool: Numbers, part: str) -> None:
    """Move the smallest group out of train that leaves every class a photo there, if there is such a group."""
    train = pool[parts[pool] == "train"]
    left = np.bincount(labels[train], minlength=int(labels.max(initial=0)) + 1)
    names, counts = np.unique(groups[train], return_counts=True)
    for name in names[np.argsort(counts, kind="stable")]:
        group = train[groups[train] == name]
        taken = np.bincount(labels[group], minlength=len(left))
        if np.all((taken == 0) | (taken < left)):
            parts[group] = part
            return
