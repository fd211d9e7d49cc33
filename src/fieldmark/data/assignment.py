"""Which photo goes to which split: the arithmetic behind `splits`, on plain arrays.

scikit-learn's stratified shuffles refuse classes of one photo, validation sets smaller than the number of classes, and
shares other than 1/k with groups; a folder of photos may have all three, so the assignment is written here.

Array letters: N photos, C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

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
