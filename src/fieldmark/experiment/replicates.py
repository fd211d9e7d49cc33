"""Runs made comparable: the folds of one cross-validation are one run on all of its photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError
from fieldmark.experiment.results import RunResults
from fieldmark.experiment.settings import SettingRuns


@dataclass(frozen=True, eq=False)
class Replicate:
    """The runs of one seed, its folds joined: N photos in order of path, with (N,) labels and probabilities."""

    seed: int
    name: str
    photos: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    prior: NDArray[np.float64]


def join_folds(group: SettingRuns) -> list[Replicate]:
    """One replicate per seed, in order of seed.

    Raises:
        RunError: The same settings, seed and fold twice, or folds of different data.
    """
    by_seed: dict[int, list[RunResults]] = {}
    for run in group.runs:
        by_seed.setdefault(run.config.train.seed, []).append(run)
    return [_join(seed, runs) for seed, runs in sorted(by_seed.items())]


def _join(seed: int, runs: Sequence[RunResults]) -> Replicate:
    photos = [photo for run in runs for photo in run.photos]
    name = runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more folds"
    # Without folds a second run of the same recipe and seed is a repetition or was made on other data: never joined.
    if len({run.config.data.fold for run in runs}) < len(runs) or len(set(photos)) < len(photos):
        names = ", ".join(str(run.path) for run in runs)
        raise RunError(f"{names} have the same settings, seed and fold: give one of them, or runs with other seeds")
    if len({run.classes for run in runs}) > 1:
        raise RunError(f"the folds joined in {name} have different classes: they come from different data")
    order = sorted(range(len(photos)), key=photos.__getitem__)
    return Replicate(
        seed,
        name,
        tuple(photos[number] for number in order),
        np.concatenate([run.labels for run in runs])[order],
        runs[0].classes,
        np.concatenate([run.probabilities for run in runs])[order],
        np.mean([run.prior for run in runs], axis=0),
    )


def refuse_different_photos(joined: Sequence[Sequence[Replicate]]) -> None:
    """Check that all replicates judged the same photos under the same labels.

    Raises:
        RunError: They did not; the message says where they differ.
    """
    first, *others = [replicate for replicates in joined for replicate in replicates]
    for other in others:
        if other.classes != first.classes:
            raise RunError(
                f"{first.name} and {other.name} know different classes ({len(first.classes)} and "
                f"{len(other.classes)}): only runs on the same data can be compared"
            )
        if other.photos != first.photos:
            common = len(set(first.photos) & set(other.photos))
            odd = min(set(first.photos) ^ set(other.photos))
            raise RunError(
                f"{first.name} and {other.name} were judged on different photos ({len(first.photos)} and "
                f"{len(other.photos)}, {common} in common; {odd!r} is in one alone), and accuracies on different "
                "photos cannot be compared. Train both on the same split: same data, data.split_seed and folds"
            )
        if not np.array_equal(other.labels, first.labels):
            place = int(np.flatnonzero(other.labels != first.labels)[0])
            raise RunError(
                f"{first.name} and {other.name} disagree on the label of {first.photos[place]!r}: were labels "
                "corrected between them? Train both on the same labels"
            )
