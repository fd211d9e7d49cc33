"""Which runs are one variant: runs that differ in nothing but chance, their folds joined, on the same photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.errors import RunError
from fieldmark.runs.folder import RunResults, flatten, format_value
from fieldmark.study.grid import NO_EFFECT

# Runs that differ in chance alone are runs of one variant. Where the photos are stored is no difference either: whether
# they are the same photos is checked by name.
IGNORED = NO_EFFECT | {"train.seed", "data.fold", "data.path"}
MOST_CHANGES = 6  # variants that differ in more keys are named by their folders: nobody reads a recipe as a name


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one variant, in the order given, folds included."""

    name: str  # the changes in words; a folder's name where there are none, or too many to read
    changes: Mapping[str, Any]  # value of each key in which the compared variants differ
    runs: tuple[RunResults, ...]


def group_runs(results: Sequence[RunResults]) -> list[Group]:
    """Put runs together that differ in nothing but chance, in order of first appearance."""
    if not results:
        raise RunError("no runs to compare: give run folders, or a folder of them")
    groups: dict[str, tuple[dict[str, Any], list[RunResults]]] = {}
    for run in results:
        own = {key: value for key, value in flatten(run.config).items() if key not in IGNORED}
        # What was combined has the recipe of one of its members, but is no further run of it.
        own = {"combined": run.summary.get("combined", "none"), **own}
        groups.setdefault(repr(sorted(own.items())), (own, []))[1].append(run)
    settings = [own for own, _ in groups.values()]
    differing = [key for key in settings[0] if any(other[key] != settings[0][key] for other in settings[1:])]
    # The folder of a single run, or the one that holds a variant's runs.
    paths = [(runs[0].path.resolve(), len(runs)) for _, runs in groups.values()]
    folders = [path.name if count == 1 else path.parent.name for path, count in paths]
    by_folder = len(differing) > MOST_CHANGES and len(set(folders)) == len(folders)
    named: list[Group] = []
    for (own, runs), folder in zip(groups.values(), folders, strict=True):
        changes = {key: own[key] for key in differing}
        name = folder if by_folder else _describe(changes) or runs[0].name
        named.append(Group(name, changes, tuple(runs)))
    return named


def name_against(groups: Sequence[Group], run: Path) -> list[Group]:
    """The variant of one run first, under that run's name; the others named by what they change of it."""
    wanted = run.resolve()
    base = next((group for group in groups if any(one.path.resolve() == wanted for one in group.runs)), None)
    if base is None:
        raise RunError(f"{run} is not among the runs that are compared: name one of them, or add it")
    named = [base if len(base.changes) > MOST_CHANGES else replace(base, name=wanted.name)]
    for group in groups:
        if group is not base:
            changes = {key: value for key, value in group.changes.items() if value != base.changes[key]}
            named.append(replace(group, name=_describe(changes)) if len(changes) <= MOST_CHANGES else group)
    return named


def _describe(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={format_value(value)}" for key, value in changes.items())


def join_folds(group: Group) -> list[RunResults]:
    """One run per seed, its folds joined, in order of seed."""
    by_seed: dict[int, list[RunResults]] = {}
    for run in group.runs:
        by_seed.setdefault(run.config.train.seed, []).append(run)
    return [_join(runs) for _, runs in sorted(by_seed.items())]


def _join(runs: Sequence[RunResults]) -> RunResults:
    """The first run with the photos of all."""
    joined, photos = copy(runs[0]), [photo for run in runs for photo in run.photos]
    # Without folds a second run of the same recipe and seed is a repetition or was made on other data: never joined.
    if len({run.config.data.fold for run in runs}) < len(runs) or len(set(photos)) < len(photos):
        names = ", ".join(str(run.path) for run in runs)
        raise RunError(f"{names} have the same settings, seed and fold: give one of them, or runs with other seeds")
    if len({run.classes for run in runs}) > 1:
        raise RunError(f"the folds of {joined.path} have different classes: they come from different data")
    order = sorted(range(len(photos)), key=photos.__getitem__)
    joined.photos = tuple(photos[index] for index in order)
    joined.labels = np.concatenate([run.labels for run in runs])[order]
    joined.probabilities = np.concatenate([run.probabilities for run in runs])[order]
    joined.prior = np.mean([run.prior for run in runs], axis=0)
    return joined


def check_same_photos(runs: Sequence[RunResults]) -> None:
    """Check that all runs scored the same photos under the same labels, or say where they differ."""
    first, *others = runs
    for other in others:
        names = f"{first.name} and {other.name}"
        if other.classes != first.classes:
            raise RunError(
                f"{names} know different classes ({len(first.classes)} and {len(other.classes)}): only runs on the "
                "same data can be compared"
            )
        if other.photos != first.photos:
            common = len(set(first.photos) & set(other.photos))
            odd = min(set(first.photos) ^ set(other.photos))
            raise RunError(
                f"{names} were scored on different photos ({len(first.photos)} and {len(other.photos)}, {common} in "
                f"common; {odd!r} is in one alone), and accuracies on different photos cannot be compared. Train both "
                "on the same split: same data, data.split_seed and folds"
            )
        if not np.array_equal(other.labels, first.labels):
            index = int(np.flatnonzero(other.labels != first.labels)[0])
            raise RunError(
                f"{names} disagree on the label of {first.photos[index]!r}: were labels corrected between them? Train "
                "both on the same labels"
            )
