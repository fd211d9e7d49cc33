"""What folders and tables say of their photos: class, split and group of each, and where they contradict themselves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fieldmark.data.folders import close_match, find_photos
from fieldmark.data.tables import Table
from fieldmark.errors import DataError

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
        hint = close_match(name, SPLIT_NAMES) or "."
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
