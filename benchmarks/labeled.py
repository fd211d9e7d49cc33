"""Labeled photos to learn from, and test photos whose names say nothing: what every contender for a budget is given.

Test photos take part in no choice: they lie in a folder of their own, in an order of chance, and their classes stay
with the benchmark.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("birds100", "clothing10", "signs10", "elpv")
SUFFIXES = (".jpg", ".jpeg", ".png")
QUICK_CLASSES = 10

Split = dict[str, list[Path]]
"""Photos by class."""


class DataError(Exception):
    """A data set is not at hand; the message says which, and where it was looked for."""


@dataclass(frozen=True)
class DataSet:
    """One data set as contenders see it.

    Attributes:
        name: What results call it.
        folder: Holds train/ and val/, each with a folder of photos for each class.
        photos: Test photos in one folder.
        truth: Class of each test photo, by file name.
        note: How it was split, for readers.
    """

    name: str
    folder: Path
    photos: Path
    truth: dict[str, str]
    note: str

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(path.name for path in (self.folder / "train").iterdir())

    def count(self, split: str) -> int:
        """Photos of `train` or `val`."""
        return sum(1 for path in (self.folder / split).rglob("*") if path.suffix.lower() in SUFFIXES)


def open_data(name: str, source: Path, folder: Path, *, classes: int = 0, most: int = 0) -> DataSet:
    """Lay out a data set as links in `folder`.

    Args:
        name: One of `NAMES`.
        source: The folder in which birds100, clothing10 and signs10 lie; elpv comes from its package.
        folder: A folder that is not there yet.
        classes: Take the first so many; 0 takes all.
        most: Photos of a class in each split; 0 takes all.

    Raises:
        DataError: It is not at hand.
    """
    splits, how = _split_birds(source / name) if name == "birds100" else _split_other(name, source)
    if classes:
        splits = {split: dict(sorted(found.items())[:classes]) for split, found in splits.items()}
        name = f"{name}, {classes} classes"
    if most:
        splits = {split: {label: files[:most] for label, files in found.items()} for split, found in splits.items()}
        name = f"{name}, {most} photos of each"
    for split in ("train", "val"):
        for label, files in splits[split].items():
            for number, file in enumerate(files):
                _link(file, folder / "labeled" / split / label / f"{number:05d}{file.suffix.lower()}")
    tests = [(file, label) for label, files in sorted(splits["test"].items()) for file in files]
    random.Random(0).shuffle(tests)
    truth: dict[str, str] = {}
    for number, (file, label) in enumerate(tests):
        link = folder / "test" / f"{number:05d}{file.suffix.lower()}"
        _link(file, link)
        truth[link.name] = label
    data = DataSet(name, folder / "labeled", folder / "test", truth, "")
    counts = f"{data.count('train')} photos to train on, {data.count('val')} to validate, {len(truth)} to test"
    note = f"{name}: {how}; {counts}"
    return DataSet(name, data.folder, data.photos, truth, note)


def score(data: DataSet, prediction_file: Path) -> int:
    """How many test photos a prediction file names rightly; one without a row is wrong.

    Args:
        data: Whose test photos were predicted.
        prediction_file: CSV with columns `path` and `label`.
    """
    with prediction_file.open(encoding="utf-8", newline="") as file:
        said = {Path(row["path"]).name: row["label"] for row in csv.DictReader(file)}
    return sum(said.get(name) == label for name, label in data.truth.items())


def split_by_chance(photos: Split) -> dict[str, Split]:
    """80 of 100 photos of each class to train on, 10 to validate and 10 to test, the same at every call."""
    splits: dict[str, Split] = {"train": {}, "val": {}, "test": {}}
    for label, files in sorted(photos.items()):
        order = random.Random(f"0 {label}").sample(sorted(files), len(files))
        held = max(round(len(order) / 10), 1)
        splits["test"][label], splits["val"][label] = order[:held], order[held : 2 * held]
        splits["train"][label] = order[2 * held :]
    return splits


def hold_out(photos: Split, *, parts: int) -> tuple[Split, Split]:
    """Training photos, and one of `parts` parts of each class to validate on, the same at every call."""
    train: Split = {}
    val: Split = {}
    for label, files in sorted(photos.items()):
        order = random.Random(f"0 {label}").sample(sorted(files), len(files))
        held = max(round(len(order) / parts), 1)
        val[label], train[label] = order[:held], order[held:]
    return train, val


def _split_birds(folder: Path) -> tuple[dict[str, Split], str]:
    """The leaderboard's photos have no labels here, so val is the test, and a ninth of train takes its place."""
    train, val = hold_out(_read(folder / "train"), parts=9)
    how = "its val photos are the test, and a ninth of train, by a fixed draw, validates"
    return {"train": train, "val": val, "test": _read(folder / "val")}, how


def _split_other(name: str, source: Path) -> tuple[dict[str, Split], str]:
    if name == "clothing10":
        return {split: _read(source / name / split) for split in ("train", "val", "test")}, "its own split"
    photos = _read_solar_cells() if name == "elpv" else _read(source / name)
    return split_by_chance(photos), "a fixed draw of 80, 10 and 10 of 100 photos of each class"


def _read(folder: Path) -> Split:
    found: Split = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.suffix.lower() in SUFFIXES:
            found.setdefault(file.parent.name, []).append(file)
    if not found:
        raise DataError(f"no photos in {folder.parent.name}/{folder.name}: give the folder they lie in with --photos")
    return found


def _read_solar_cells() -> Split:
    """The demo's photos, labeled as the demo does."""
    import tempfile

    from fieldmark.demo import write_table
    from fieldmark.errors import MissingExtraError

    found: Split = {}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "photos.csv"
        try:
            write_table(table)
        except MissingExtraError as error:
            raise DataError(f"elpv: {error}") from None
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["label"], []).append(Path(row["path"]))
    return found


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(file.resolve())


def list_photos(folder: Path, labels: Sequence[str] = ()) -> list[Path]:
    """Photos in a folder, or in its folders of these classes, in the order of their names."""
    folders = [folder / label for label in labels] or [folder]
    return [file for place in folders for file in sorted(place.iterdir()) if file.suffix.lower() in SUFFIXES]
