"""Settings and a path become photos that can be trained on: found, divided, inspected."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fieldmark.config import DataConfig
from fieldmark.data import splits
from fieldmark.data.index import PhotoIndex, apply_corrections, load_index, require_trainable
from fieldmark.data.inspection import PhotoFacts, inspect_photos
from fieldmark.errors import ConfigError, DataError
from fieldmark.experiment.environment import usable_cores


class Progress(Protocol):
    """Where long work tells how far it is."""

    def start(self, total: int, done: int) -> None:
        """Work of `total` units begins, `done` of which were finished before."""

    def advance(self, n: int) -> None:
        """`n` more units are finished."""

    def message(self, text: str) -> None:
        """One line that stays."""


class Quiet:
    """Progress that nobody watches."""

    def start(self, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, n: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


class Logged:
    """Progress whose messages are kept in a file too, with the time.

    Args:
        inner: Who watches.
        path: The file; lines are added to it.
    """

    def __init__(self, inner: Progress, path: Path) -> None:
        self._inner = inner
        self._path = path

    def start(self, total: int, done: int) -> None:
        """As `Progress`."""
        self._inner.start(total, done)

    def advance(self, n: int) -> None:
        """As `Progress`."""
        self._inner.advance(n)

    def message(self, text: str) -> None:
        """As `Progress`, and into the file."""
        self.write(text)
        self._inner.message(text)

    def write(self, text: str) -> None:
        """Into the file alone."""
        with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@dataclass(frozen=True)
class Dataset:
    """Photos that a run may use.

    Attributes:
        index: Usable photos, each in a split.
        facts: One for each photo of `index`, in its order.
        broken: (path, reason) of photos that were left out.
    """

    index: PhotoIndex
    facts: tuple[PhotoFacts, ...]
    broken: tuple[tuple[str, str], ...]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N, 2) upright width and height in pixels."""
        return np.asarray([(fact.width, fact.height) for fact in self.facts], np.int64).reshape(-1, 2)


def known_sizes(index: PhotoIndex, sizes: Mapping[int, tuple[int, int]]) -> NDArray[np.int64]:
    """(N, 2) upright width and height of an index's photos of which some were measured; 1 x 1 for the others."""
    table = np.ones((len(index.photos), 2), np.int64)
    table[list(sizes)] = list(sizes.values())
    return table


def user_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder, for what can be made again."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("fieldmark", appauthor=False)) / name


def find_photos(config: DataConfig) -> PhotoIndex:
    """The photos as they lie there, before splits.

    Raises:
        ConfigError: No path is set.
        DataError: The folder or table is not what it should be.
    """
    if not config.path:
        raise ConfigError("no data: give a folder of class folders, or a table, as DATA or with --set data.path=...")
    index = load_index(
        Path(config.path),
        path_column=config.path_column,
        label_column=config.label_column,
        split_column=config.split_column,
        group_column=config.group_column if config.group_by == "column" else None,
    )
    return apply_corrections(index, Path(config.corrections)) if config.corrections else index


def prepare_dataset(config: DataConfig, *, progress: Progress) -> Dataset:
    """Find, inspect and divide the photos.

    Raises:
        DataError: Nothing to train on, or broken photos under `broken = "refuse"`.
    """
    everything = find_photos(config)
    # Photos without labels have no part in training: `check` and `predict` look at them.
    found = replace(everything, photos=tuple(photo for photo in everything.photos if photo.label is not None))
    facts = inspect(found, config, progress=progress)
    broken = [(photo.path, fact.problem) for photo, fact in zip(found.photos, facts, strict=True) if fact.problem]
    if broken and config.broken == "refuse":
        raise DataError(refusal(broken, len(found.photos)))
    usable = [place for place, fact in enumerate(facts) if not fact.problem]
    index = replace(found, photos=tuple(found.photos[place] for place in usable))
    kept = [facts[place] for place in usable]
    index = divide(index, kept, config)
    require_trainable(index)
    return Dataset(index, tuple(kept), tuple(broken))


def inspect(index: PhotoIndex, config: DataConfig, *, progress: Progress, with_hash: bool = False) -> list[PhotoFacts]:
    """Decode every photo once, or remember that it was done; `with_hash` for finding near-duplicates."""
    progress.start(len(index.photos), 0)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        progress.advance(count - done)
        done = count

    return inspect_photos(
        index,
        background=config.background,
        max_pixels=config.max_pixels,
        with_hash=with_hash,
        threads=usable_cores(),
        cache_folder=user_folder("inspections"),
        progress=advance,
    )


def divide(index: PhotoIndex, facts: Sequence[PhotoFacts], config: DataConfig) -> PhotoIndex:
    """Give every labelled photo a split, as the settings say."""
    groups = _groups(index, facts, config)
    if config.folds:
        index = splits.fold_index(index, folds=config.folds, fold=config.fold, seed=config.split_seed, groups=groups)
    else:
        index = splits.remembered_split(
            index,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
            groups=groups,
            settings={"group_by": config.group_by, "pattern": config.group_pattern, "gap": config.group_gap_seconds},
            folder=user_folder("splits"),
        )
    if config.train_on == "train+val":
        photos = (replace(photo, split="train") if photo.split == "val" else photo for photo in index.photos)
        index = replace(index, photos=tuple(photos))
    return index


def refusal(broken: Sequence[tuple[str, str]], total: int, *, most: int = 10) -> str:
    """What to tell a user whose photos are broken."""
    lines = [f"  {path!r} {reason}" for path, reason in broken[:most]]
    more = [f"  ... and {len(broken) - most} more (`fieldmark check` lists all)"] if len(broken) > most else []
    way_out = "Mend or remove them, or train without them: --set data.broken=skip"
    return "\n".join([f"{len(broken)} of {total} photos cannot be used:", *lines, *more, way_out])


def _groups(index: PhotoIndex, facts: Sequence[PhotoFacts], config: DataConfig) -> list[str] | None:
    if config.group_by == "none":
        return None
    if config.group_by == "pattern":
        return splits.groups_by_pattern(index, config.group_pattern)
    if config.group_by == "capture_time":
        return splits.groups_by_capture_time(index, facts, config.group_gap_seconds)
    return splits.groups_by_column(index)
