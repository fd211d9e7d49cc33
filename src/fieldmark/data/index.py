"""The photos of a data set: which files, which class, which split.

Reads folders of class folders, with or without train/ val/ test/ above them, and tables. A class is the folder's name
or the table's text, exactly as written; it is never parsed as a number, and never written as one.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fieldmark.data.folders import find_photos, natural_key, photo_extensions
from fieldmark.data.tables import Table, read_table, write_csv
from fieldmark.errors import DataError, did_you_mean
from fieldmark.files import require_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SPLITS = ("train", "val", "test")
SPLIT_COLUMNS = ("path", "label", "split", "group")


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo of an index."""

    path: str
    """Relative to the index's root, "/" on every system; the photo's identity in every table."""

    label: str | None
    """Class name; None for unlabelled photos."""

    split: str
    """train, val, test; "" while no split is decided."""

    group: str
    """What must not cross a split; "" for none."""


@dataclass(frozen=True)
class PhotoIndex:
    """The photos of a data set. A photo's number is its place in `photos`."""

    root: Path
    photos: tuple[Photo, ...]
    """In natural order of path."""

    classes: tuple[str, ...]
    """Names in natural order ("2" before "10"), over all splits. A class's number is its place here."""

    ignored: Mapping[str, int]
    """Reason -> count of files, folders and rows left aside."""

    def __len__(self) -> int:
        return len(self.photos)

    def of(self, split: str) -> PhotoIndex:
        """The photos of one split, with the same classes."""
        return replace(self, photos=tuple(photo for photo in self.photos if photo.split == split))

    def label_numbers(self) -> NDArray[np.int64]:
        """(N,) class number of each photo, -1 where it has no label."""
        import numpy as np

        numbers: dict[str | None, int] = {name: number for number, name in enumerate(self.classes)}
        numbers[None] = -1
        return np.array([numbers[photo.label] for photo in self.photos], dtype=np.int64)

    def files(self) -> list[Path]:
        """The file of each photo."""
        return [self.root / photo.path for photo in self.photos]

    def counts(self) -> dict[str, dict[str, int]]:
        """Class -> split -> number of photos, with a zero where a class is absent from a split that exists."""
        splits = sorted({photo.split for photo in self.photos}, key=(*SPLITS, "").index)
        counts = {name: dict.fromkeys(splits, 0) for name in self.classes}
        for photo in self.photos:
            if photo.label is not None:
                counts[photo.label][photo.split] += 1
        return counts

    def fingerprint(self) -> str:
        """64 hex digits over path, label, split and size in bytes of every photo (-1 where the file is gone)."""
        digest = hashlib.sha256()
        for photo, file in zip(self.photos, self.files(), strict=True):
            try:
                num_bytes = file.stat().st_size
            except OSError:
                num_bytes = -1
            fields = (photo.path, repr(photo.label), photo.split, str(num_bytes))
            digest.update("\0".join(fields).encode("utf-8", errors="surrogateescape") + b"\0")
        return digest.hexdigest()


def load_index(
    path: Path, *, path_column: str, label_column: str, split_column: str, group_column: str | None
) -> PhotoIndex:
    """Read a data set.

    Args:
        path: One of: a folder with train/ and perhaps val/ (or valid/, validation/) and test/, each holding class
            folders (test/ may hold photos without labels); a folder of class folders; a CSV or Parquet table.
        path_column: Column of a table that names the photo, relative to the table's folder or absolute.
        label_column: Column that names the class. Only test photos may leave it empty.
        split_column: Column that says train, val or test; photos without it are undecided. May be absent.
        group_column: Column whose value must not cross a split. May be absent.

    Raises:
        DataError: Nothing there, no photos, photos outside class folders, or a table that contradicts itself or the
            disk.
    """
    path = require_path(Path(path))
    if path.is_dir():
        listing = read_folder(path)
    elif path.suffix.lower() in photo_extensions():
        raise DataError(f"{path} is one photo. Give the folder that holds the class folders")
    else:
        listing = read_listing(
            path.parent,
            read_table(path),
            path_column=path_column,
            label_column=label_column,
            split_column=split_column,
            group_column=group_column,
        )
    key = natural_key()
    photos = tuple(Photo(*row) for row in sorted(listing.rows, key=lambda row: key(row.path)))
    return PhotoIndex(listing.root, photos, _classes(photos), listing.ignored)


def list_photos(path: Path) -> PhotoIndex:
    """The photos of a folder and its sub-folders, or one file, without labels.

    Raises:
        DataError: The path does not exist, or holds no photo.
    """
    path = require_path(Path(path))
    if not path.is_dir():  # one photo by name, whatever its extension
        return PhotoIndex(path.parent, (Photo(path.name, None, "", ""),), (), {})
    names, ignored = find_photos(path)
    require_photos(path, names, ignored)
    return PhotoIndex(path, tuple(Photo(name, None, "", "") for name in names), (), dict(ignored))


def require_trainable(index: PhotoIndex) -> None:
    """Check that a classifier can be trained on the "train" photos of `index`.

    Raises:
        DataError: Fewer than two classes, or a class without a photo in train.
    """
    if len(index.classes) < 2:
        only = f"only {index.classes[0]!r}" if index.classes else "none"
        raise DataError(f"{index.root}: a classifier needs at least 2 classes, there is {only}. Add a second class")
    trained = {photo.label for photo in index.photos if photo.split == "train"}
    missing = [name for name in index.classes if name not in trained]
    if missing:
        raise DataError(
            f"{index.root}: {len(missing)} of {len(index.classes)} classes have no photo in train: {listed(missing)}. "
            "Add photos to train, or take the class out of the other splits"
        )


def save_split_table(index: PhotoIndex, path: Path) -> None:
    """Write path, label, split and group of every photo as CSV, in index order, whole or not at all.

    Raises:
        ResourceError: The disk is full, or the folder not writable or not there.
    """
    rows = [(photo.path, photo.label or "", photo.split, photo.group) for photo in index.photos]
    write_csv(path, SPLIT_COLUMNS, rows)


def load_split_table(path: Path, root: Path) -> PhotoIndex:
    """Read what `save_split_table` wrote, in the same order. The photos need not exist.

    Raises:
        DataError: Not such a table.
    """
    table = read_table(require_path(path))
    columns = [table.column(name) for name in SPLIT_COLUMNS]
    photos = [Photo(name, label or None, split, group) for name, label, split, group in zip(*columns, strict=True)]
    unknown = sorted({photo.split for photo in photos} - {*SPLITS, ""})
    if unknown:
        raise DataError(f"{path}: {unknown[0]!r} is not a split; use train, val or test")
    return PhotoIndex(root, tuple(photos), _classes(photos), {})


def apply_corrections(index: PhotoIndex, table: Path) -> PhotoIndex:
    """Relabel and drop photos as a review decided.

    Args:
        index: What to correct. Classes keep their place even if a class loses its last photo.
        table: CSV or Parquet with the columns path, action (keep, relabel or drop) and label (for relabel).

    Raises:
        DataError: A photo, action or class that does not exist, or two decisions about one photo.
    """
    content = read_table(require_path(table))
    columns = [content.column(name) for name in ("path", "action", "label")]
    known = {photo.path for photo in index.photos}
    decisions: dict[str, tuple[str, str]] = {}
    for path, action, label in zip(*columns, strict=True):
        if path not in known:
            raise DataError(f"{table}: there is no photo {path!r} in {index.root}{did_you_mean(path, known)}")
        if action not in ("keep", "relabel", "drop"):
            raise DataError(f"{table}: {path!r} has the action {action!r}; use keep, relabel or drop")
        if action == "relabel" and label not in index.classes:
            hint = did_you_mean(label, index.classes)
            raise DataError(f"{table}: {path!r} is relabelled {label!r}, which is not a class{hint}")
        decision = (action, label if action == "relabel" else "")
        if decisions.setdefault(path, decision) != decision:
            raise DataError(f"{table}: two decisions about {path!r}. Keep one of the rows")
    photos: list[Photo] = []
    for photo in index.photos:
        action, label = decisions.get(photo.path, ("keep", ""))
        if action != "drop":
            photos.append(replace(photo, label=label) if action == "relabel" else photo)
    ignored = Counter(index.ignored)
    ignored["dropped by corrections"] += len(index.photos) - len(photos)
    return replace(index, photos=tuple(photos), ignored=dict(+ignored))


def _classes(photos: Iterable[Photo]) -> tuple[str, ...]:
    return tuple(sorted({photo.label for photo in photos if photo.label is not None}, key=natural_key()))


SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Row(NamedTuple):
    """What is said about one photo."""

    path: str
    label: str | None
    split: str
    group: str


class Listing(NamedTuple):
    """Everything that is said about photos below one folder, in no stated order."""

    root: Path
    rows: list[Row]
    ignored: dict[str, int]


def read_folder(root: Path) -> Listing:
    """Class and split of the photos in a folder, by the names of the folders that they lie in.

    Raises:
        DataError: No photos, or none of them in class folders.
    """
    names, ignored = find_photos(root)
    require_photos(root, names, ignored)
    folders = {name: split for name in _folders(names) if (split := SPLIT_NAMES.get(name.lower()))}
    if _has_splits(names, folders):
        rows = _rows_of_splits(root, names, folders, ignored)
    else:
        rows = _rows_of_classes(root, names, "", ignored)
        _refuse_wrapped(root, names)
    return Listing(root, rows, dict(+ignored))


def read_listing(
    folder: Path, table: Table, *, path_column: str, label_column: str, split_column: str, group_column: str | None
) -> Listing:
    """Class, split and group of the photos that a table names.

    Raises:
        DataError: A column is missing, a row says too little, two rows contradict each other, or files are missing.
    """
    labels = table.column(label_column, setting="data.label_column")
    splits = [_split_of(table, value) for value in table.optional_column(split_column)]
    groups = table.optional_column(group_column)
    root, names = _resolve(folder, table, table.column(path_column, setting="data.path_column"))
    rows: dict[str, Row] = {}
    for name, label, split, group in zip(names, labels, splits, groups, strict=True):
        if not label.strip() and split != "test":
            raise DataError(
                f"{table.name}: {name!r} has an empty {label_column!r}. Name its class; only test photos may have none"
            )
        row = Row(name, label if label.strip() else None, split, group)
        _refuse_contradiction(table, rows.setdefault(name, row), row)
    _require_files(table, root, list(rows))
    ignored = {"row that repeats another": len(names) - len(rows)} if len(rows) < len(names) else {}
    return Listing(root, list(rows.values()), ignored)


def require_photos(path: Path, names: Sequence[str], ignored: Mapping[str, int]) -> None:
    """Check that a walk found photos.

    Raises:
        DataError: It did not; says what there is instead.
    """
    if names:
        return
    if not ignored:
        raise DataError(f"{path} is empty: there are no photos in it or in its folders. Check the path")
    listed = ", ".join(f"{reason}: {count}" for reason, count in ignored.items())
    raise DataError(f"{path} holds no photos ({listed}). Give the folder that holds the class folders")


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    text = ", ".join(repr(name) for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def _folders(names: Iterable[str]) -> list[str]:
    """First folder of each path that has one, in order, each once."""
    return list(dict.fromkeys(name.split("/", 1)[0] for name in names if "/" in name))


def _has_splits(names: Sequence[str], folders: Mapping[str, str]) -> bool:
    """Whether the folders named train, val and test are splits rather than classes that happen to be called so."""
    if folders and set(folders) == set(_folders(names)):
        return True
    train = [name for name in names if folders.get(name.split("/", 1)[0]) == "train"]
    return bool(train) and all(name.count("/") >= 2 for name in train)


def _rows_of_splits(root: Path, names: Sequence[str], folders: Mapping[str, str], ignored: Counter[str]) -> list[Row]:
    by_split: dict[str, str] = {}
    for folder, split in folders.items():
        if by_split.setdefault(split, folder) != folder:
            raise DataError(f"{root} has both {by_split[split]}/ and {folder}/ with photos: keep one of them")
    rows: list[Row] = []
    for folder, split in folders.items():
        inside = [name for name in names if name.startswith(f"{folder}/")]
        if split == "test":
            rows += [Row(name, None, split, "") for name in inside if name.count("/") == 1]
            inside = [name for name in inside if name.count("/") > 1]
        rows += _rows_of_classes(root, inside, split, ignored) if inside else []
    ignored["photo beside the split folders"] += sum(name.split("/", 1)[0] not in folders for name in names)
    return rows


def _rows_of_classes(root: Path, names: Sequence[str], split: str, ignored: Counter[str]) -> list[Row]:
    """Photos labelled by the folder below `root`, or below the split's folder; strays beside them are counted."""
    depth = 1 if split else 0
    rows = [Row(name, name.split("/")[depth], split, "") for name in names if name.count("/") > depth]
    strays = [name for name in names if name.count("/") <= depth]
    if not rows:
        raise DataError(
            f"{root}: no class folders{f' in the {split} folder' if split else ''}, only photos, such as "
            f"{listed(strays, 1)}. Put each photo into a folder named for its class, as in robin/1.jpg"
        )
    ignored["photo beside the class folders"] += len(strays)
    return rows


def _refuse_wrapped(root: Path, names: Sequence[str]) -> None:
    """A download that unpacks to one folder around the data set is not a data set of one class."""
    folders = _folders(names)
    if len(folders) == 1:
        inner = [name.split("/", 1)[1] for name in names if "/" in name]
        within = _folders(inner)
        if any(SPLIT_NAMES.get(folder.lower()) == "train" for folder in within):
            raise DataError(f"{root} holds only {folders[0]!r}, with a train folder in it: give {root / folders[0]}")
        if len(within) > 1:
            raise DataError(
                f"{root} holds only {folders[0]!r}, with {len(within)} folders in it: {listed(within)}. If those are "
                f"the classes, give {root / folders[0]}; else add a second class beside it"
            )


def _split_of(table: Table, value: str) -> str:
    name = value.strip().lower()
    if name and name not in SPLIT_NAMES:
        hint = did_you_mean(name, SPLIT_NAMES) or "."
        raise DataError(f"{table.name}: {value!r} is not a split{hint} Use train, val or test, or leave it empty")
    return SPLIT_NAMES.get(name, "")


def _resolve(folder: Path, table: Table, paths: Sequence[str]) -> tuple[Path, list[str]]:
    """Root and relative names of a table's photos. The root is the table's folder unless a photo lies elsewhere."""
    if not paths:
        raise DataError(f"{table.name} has no rows. Each row names one photo")
    base = os.path.normpath(folder.absolute())
    full = [_resolve_one(base, table, path) for path in paths]
    if all(_is_inside(path, base) for path in full):
        root = folder
    else:
        try:
            base = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
        except ValueError:
            raise DataError(f"{table.name}: the photos lie on more than one drive. Bring them to one") from None
        root = Path(base)
    return root, [os.path.relpath(path, base).replace(os.sep, "/") for path in full]


def _resolve_one(base: str, table: Table, path: str) -> str:
    if not path.strip():
        raise DataError(f"{table.name}: a row names no photo. Fill in its path, or delete the row")
    if "\0" in path:
        raise DataError(f"{table.name}: {path!r} holds a zero byte, which no path can. Mend the row")
    whole = os.path.normpath(os.path.join(base, path))  # noqa: PTH118, text: Path would tidy what is to be checked
    if not os.path.isabs(path) and not _is_inside(whole, base):  # noqa: PTH117
        raise DataError(
            f"{table.name}: {path!r} leads out of the table's folder. Write the absolute path, or move the table"
        )
    return whole


def _is_inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def _refuse_contradiction(table: Table, first: Row, second: Row) -> None:
    for what, one, other in zip(Row._fields, first, second, strict=True):
        if one != other:
            raise DataError(
                f"{table.name}: {first.path!r} has two {what}s, {one!r} and {other!r}. Keep one of the rows"
            )


def _require_files(table: Table, root: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not _is_file(root / name)]
    if missing:
        raise DataError(
            f"{table.name}: {len(missing)} of {len(names)} photos not found in {root}: {listed(missing)}. "
            "Relative paths start at the table's folder"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False
