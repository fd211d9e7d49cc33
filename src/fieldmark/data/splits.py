"""Who trains, who evaluates: stratified splits that no group crosses, repeatable by seed, and remembered on disk.

What the data decide themselves is respected; only what is missing is made.

Shape letters: N photos, M photos that may move.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.columns import PARTS, TEST, TRAIN, UNDECIDED, VAL, Categories, Photos
from fieldmark.data.index import SPLITS, PhotoIndex, find_split_table, load_split_table, save_split_table
from fieldmark.data.inspection import PhotoFacts
from fieldmark.data.storage import resolve
from fieldmark.errors import DataError, ResourceError

Numbers = NDArray[np.int64]
BURST_SECONDS = 60.0


def split_index(
    index: PhotoIndex,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None,
    before: Photos | None = None,
) -> PhotoIndex:
    """Decide a split for every labeled photo that has none, stratified by class; same seed and photos, same split.

    If the data have a val (or test) split, none is made. If all photos are in train, val and test are taken out of it;
    otherwise only undecided photos are touched. A class with two photos or more keeps at least one in train. Without
    groups, each class gives its exact share, rounded down or up so that the totals are right; with groups (one a photo,
    "" for none), which are never divided, the share is as near as they allow. The fractions are of the labeled photos
    to divide. Photos that are among `before` by their path stay in the split that they had. Raises DataError where no
    photo could be kept for a split that was asked for.
    """
    division = _Division.begin(index, groups)
    parts, labeled = division.parts, division.labels >= 0
    fractions = {VAL: val_fraction, TEST: test_fraction}
    wanted = {part: share for part, share in fractions.items() if share > 0 and part not in parts}
    is_train = UNDECIDED not in parts[labeled]
    pool = division.pool = np.flatnonzero((parts == (TRAIN if is_train else UNDECIDED)) & labeled)
    parts[pool] = UNDECIDED
    if before is not None:
        remembered = np.append(before.splits, UNDECIDED)[index.photos.paths.find(before.paths)[pool]]
        parts[pool] = np.where(np.isin(remembered, [TRAIN, *wanted]), remembered, UNDECIDED)
    division.follow_groups(is_train=is_train)
    division.assign(wanted, np.random.default_rng(seed))
    division.return_to_train()
    for part in wanted:
        if part not in parts:
            raise DataError(
                f"no photo of {index.root} can be kept for {PARTS[part]}: of {len(pool)} photos in "
                f"{len(np.unique(division.groups[pool]))} groups, each class keeps one in train. Add photos, or group "
                "less"
            )
    return division.end()


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

    The split is a table in `folder` (made if absent), one for each data root, fractions, seed and `settings`, which say
    how groups are made, in JSON values. Photos that have joined since are assigned so that the fractions are right over
    all; a group stays where its first photos went. A table that is damaged or cannot be written is a DataError.
    """
    key = {**settings, "val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed}
    text = json.dumps([resolve(index.root), key], sort_keys=True)
    table = find_split_table(folder / f"split-{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv")
    kept = load_split_table(table, index.root).photos if table.exists() else Photos.of(())
    divided = split_index(
        index, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, groups=groups, before=kept
    )
    # Photos that are away for now (an unmounted disk, a review) are remembered too.
    away = kept[kept.paths.find(divided.photos.paths) < 0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        everything = replace(divided, photos=divided.photos.append(away)) if len(away) else divided
        save_split_table(everything, find_split_table(table, len(everything)))
    except (OSError, ResourceError) as error:
        if np.array_equal(divided.photos.splits, index.photos.splits):
            return divided  # the data say it all: there was nothing to remember
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"the split cannot be kept in {folder}: {reason}. Make room or make it writable there, or set "
            "XDG_CACHE_HOME to a folder where both is so"
        ) from None
    return divided


def fold_index(index: PhotoIndex, *, folds: int, fold: int, seed: int, groups: Sequence[str] | None) -> PhotoIndex:
    """One of `folds` (at least 2) for stratified cross-validation of train, val and undecided photos; test stays apart.

    Over all folds each photo is in val once, except one whose class would be left without training photos: it stays in
    train. Fewer photos in the largest class, or fewer groups, than folds are a DataError.

    Source:
        scikit-learn's StratifiedKFold and StratifiedGroupKFold.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    division = _Division.begin(index, groups)
    parts, labels = division.parts, division.labels
    pool = division.pool = np.flatnonzero((parts != TEST) & (labels >= 0))
    largest = int(np.bincount(labels[pool]).max(initial=0))
    if largest < folds:
        raise DataError(f"{folds} folds need a class of as many photos; the largest has {largest}. Use fewer folds")
    members = division.groups[pool]
    num_groups = len(np.unique(members))
    if num_groups < folds:
        raise DataError(f"{folds} folds need as many groups; there are {num_groups}. Use fewer folds, or group less")
    kind, grouping = (StratifiedKFold, None) if groups is None else (StratifiedGroupKFold, members)
    with warnings.catch_warnings():
        # A class smaller than k has a photo in as many folds as it can: split_gaps reports the others.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        divided = list(kind(folds, shuffle=True, random_state=seed % 2**32).split(pool, labels[pool], grouping))
    parts[pool] = TRAIN
    parts[pool[divided[fold][1]]] = VAL
    division.return_to_train()
    return division.end()


def split_gaps(index: PhotoIndex) -> list[tuple[str, str]]:
    """(class, split) for each class without photos in a split that has labeled photos of other classes."""
    counts = index.counts()
    splits = [split for split in SPLITS if any(count.get(split) for count in counts.values())]
    return [(name, split) for name, count in counts.items() for split in splits if not count[split]]


def groups_by_column(index: PhotoIndex) -> Categories:
    """The group that the table gave to each photo; raises DataError if no photo has one."""
    groups = index.photos.groups
    if not any(groups):
        raise DataError(f"no photo of {index.root} has a group: the table needs a group column with values in it")
    return groups


def groups_by_pattern(index: PhotoIndex, pattern: str) -> Categories:
    """What the first parentheses of a regular expression match in each path, "" for nothing; DataError for no match."""
    expression = re.compile(pattern)
    matches = map(expression.search, index.photos.paths)
    groups = Categories.of((match[1] or "") if match else "" for match in matches)
    if not any(groups):
        example = f", such as {index.photos[0].path!r}" if index.photos else ""
        raise DataError(f"group pattern {pattern!r} matches no path{example}. The path starts below {index.root}")
    return groups


def groups_by_capture_time(index: PhotoIndex, facts: Sequence[PhotoFacts]) -> list[str]:
    """Bursts: photos of which each was taken within `BURST_SECONDS` of the one before; "" without EXIF time."""
    times = [(fact.captured_at, number) for number, fact in enumerate(facts) if fact.captured_at is not None]
    if not times:
        raise DataError(f"no photo of {index.root} has an EXIF capture time. Group by pattern or by a column instead")
    groups = [""] * len(index.photos)
    burst, last = 0, float("-inf")
    for captured_at, number in sorted(times):
        burst += captured_at - last > BURST_SECONDS
        last = captured_at
        groups[number] = f"burst {burst}"
    return groups


@dataclass
class _Division:
    """Photos while they are divided."""

    index: PhotoIndex
    parts: NDArray[np.int8]  # (N,) split of each photo, by its number
    labels: Numbers  # (N,) class numbers; of the pool at least 0
    groups: Numbers  # (N,) group numbers; a photo without a group is one of its own
    pool: Numbers  # (M,) photos that may move

    @classmethod
    def begin(cls, index: PhotoIndex, groups: Sequence[str] | None) -> _Division:
        members = np.arange(len(index))
        if groups is not None:
            found = Categories.of(groups)
            index = replace(index, photos=replace(index.photos, groups=found))
            members = np.where(found.numbers < 0, members + len(found.words), found.numbers)
        return cls(index, index.photos.splits.copy(), index.label_numbers(), members, np.empty(0, np.int64))

    def end(self) -> PhotoIndex:
        """The photos with their splits."""
        return replace(self.index, photos=replace(self.index.photos, splits=self.parts))

    def count(self, numbers: Numbers) -> Numbers:
        """Photos of each class of the pool among some of it."""
        return np.bincount(self.labels[numbers], minlength=int(self.labels[self.pool].max(initial=-1)) + 1)

    def within(self, part: int) -> Numbers:
        """The photos of the pool that are in a part."""
        return self.pool[self.parts[self.pool] == part]

    def follow_groups(self, *, is_train: bool) -> None:
        """Give each photo of the pool the split of the first photo of its group that has one.

        If the data say that the pool is train, photos outside it hold their group to train, as moving it would go
        against the data.
        """
        homes = self.parts.copy()
        if is_train:
            homes[np.setdiff1d(np.flatnonzero(self.parts != UNDECIDED), self.pool)] = TRAIN
        decided = np.flatnonzero(self.parts != UNDECIDED)[::-1]
        home_of = np.full(int(self.groups.max(initial=-1)) + 1, UNDECIDED, np.int8)
        home_of[self.groups[decided]] = homes[decided]  # of several the last that is written, which is the first photo
        found = home_of[self.groups[self.pool]]
        self.parts[self.pool] = np.where(found == UNDECIDED, self.parts[self.pool], found)

    def assign(self, wanted: Mapping[int, float], rng: np.random.Generator) -> None:
        """Decide the undecided photos of the pool, a group as a whole, by shares of the pool; the rest is train."""
        undecided = self.within(UNDECIDED)
        if np.bincount(self.groups[undecided]).max(initial=0) < 2:
            self._assign_photos(wanted, rng)
        else:
            self._assign_groups(wanted, rng)
        for part in wanted:
            if part not in self.parts[self.pool]:
                self._move_one_group(part)

    def return_to_train(self) -> None:
        """Move the smallest group of each class of the pool that train lacks into train."""
        members = self.groups[self.pool]
        sizes = np.bincount(members)
        for label in np.setdiff1d(self.labels[self.pool], self.labels[self.parts == TRAIN]):
            if label in self.labels[self.parts == TRAIN]:  # came along with the group of another class
                continue
            holders = np.unique(members[self.labels[self.pool] == label])
            smallest = holders[np.argmin(sizes[holders])]
            self.parts[self.pool[members == smallest]] = TRAIN

    def _assign_photos(self, wanted: Mapping[int, float], rng: np.random.Generator) -> None:
        """Exact shares: each class's share rounded down or up, so that the total is right (largest remainders)."""
        sizes = self.count(self.pool)
        undecided = rng.permutation(self.within(UNDECIDED))
        free = self.count(undecided) - (self.count(self.within(TRAIN)) == 0)  # one photo stays in train
        for part, share in wanted.items():
            have = self.count(self.within(part))
            quota = np.clip(np.floor(sizes * share).astype(np.int64) - have, 0, np.maximum(free, 0))
            missing = max(1, round(len(self.pool) * share)) - int((have + quota).sum())
            if missing > 0:
                remainder = np.where(quota < free, sizes * share - have - quota, -np.inf)
                order = rng.permutation(len(sizes))
                order = order[np.argsort(-remainder[order], kind="stable")][:missing]
                quota[order[remainder[order] > 0]] += 1
            by_class = undecided[np.argsort(self.labels[undecided], kind="stable")]
            labels = self.labels[by_class]
            rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
            self.parts[by_class[rank < quota[labels]]] = part
            undecided = undecided[self.parts[undecided] == UNDECIDED]
            free = free - quota
        self.parts[undecided] = TRAIN

    def _assign_groups(self, wanted: Mapping[int, float], rng: np.random.Generator) -> None:
        """Large groups first, each to the split that it brings nearest to its share of every class.

        The distance is squared error over the class's size, so that small classes count as much as large ones, plus
        the same for the total. The idea is that of Sechidis et al., "On the Stratification of Multi-Label Data", ECML
        2011, section 4, and of scikit-learn's StratifiedGroupKFold, here with any shares.
        """
        names = (TRAIN, *wanted)
        shares = np.array([1 - sum(wanted.values()), *wanted.values()])
        # The last column is the total, which is weighed like one more class.
        sizes = np.append(self.count(self.pool), len(self.pool))
        have = np.stack([self.count(self.within(part)) for part in names])
        need = shares[:, None] * sizes - np.column_stack([have, have.sum(axis=1)])
        undecided = self.within(UNDECIDED)
        undecided = undecided[np.argsort(self.groups[undecided], kind="stable")]
        _, starts = np.unique(self.groups[undecided], return_index=True)
        members = np.split(undecided, starts[1:])
        for group in sorted((members[n] for n in rng.permutation(len(members))), key=lambda group: -len(group)):
            present, counts = np.unique(self.labels[group], return_counts=True)
            columns, added = np.append(present, len(sizes) - 1), np.append(counts, len(group))
            cost = (added * (added - 2 * need[:, columns]) / sizes[columns]).sum(axis=1)
            best = int(np.argmin(cost))
            self.parts[group] = names[best]
            need[best, columns] -= added

    def _move_one_group(self, part: int) -> None:
        """Move the smallest group out of train that leaves every class a photo there, if there is such a group."""
        train = self.within(TRAIN)
        left = self.count(train)
        names, counts = np.unique(self.groups[train], return_counts=True)
        for name in names[np.argsort(counts, kind="stable")]:
            group = train[self.groups[train] == name]
            taken = self.count(group)
            if np.all((taken == 0) | (taken < left)):
                self.parts[group] = part
                return
