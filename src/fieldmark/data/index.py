"""The photos of a data set: which files, which class, which split.

Reads folders of class folders, with or without train/ val/ test/ above them, tables, and shards. A class is the
folder's name or the table's text, exactly as written; it is never parsed as a number, and never written as one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.data import folders, shards
from fieldmark.data.folders import Photo, is_photo_path, natural_key, photo_extensions, quote, read_folders, split_of
from fieldmark.data.shards import PhotoFile, Scan, StoredPhoto
from fieldmark.data.storage import Found, absolute, is_url
from fieldmark.data.tables import TABLE_SUFFIXES, Table, cell_text, encoding_problem, read_table, write_csv
from fieldmark.errors import DataError, did_you_mean
from fieldmark.files import require_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
SPLIT_COLUMNS = tuple(field.name for field in fields(Photo))
ARCHIVE_SUFFIXES = frozenset({".zip", ".gz", ".bz2", ".xz", ".7z", ".rar"})


@dataclass(frozen=True)
class PhotoIndex:
    """The photos of a data set. A photo's number is its index in `photos`."""

    root: Path | str  # the folder that paths are relative to; text if it is a URL
    photos: tuple[Photo, ...]  # in natural order of path
    classes: tuple[str, ...]  # in natural order ("2" before "10"), over all splits; a class's number is its index here
    ignored: Mapping[str, int]  # reason -> count of files, folders and rows that were skipped
    layout: str = ""  # how folders, a table or shards were read
    known: Mapping[str, StoredPhoto] = field(default_factory=dict[str, StoredPhoto], repr=False, compare=False)
    """By path, where photos are that are no files of this machine; empty where it is to be looked up."""
    damaged: tuple[tuple[str, str], ...] = ()  # (path, reason) of shards whose photos are not all there

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

    def numbers(self, split: str) -> NDArray[np.int64]:
        """(N,) the labeled photos of a split, rising."""
        import numpy as np

        found = [number for number, photo in enumerate(self.photos) if photo.split == split and photo.label is not None]
        return np.asarray(found, np.int64)

    def files(self) -> list[PhotoFile]:
        """The file of each photo, or its place in a shard or behind a URL."""
        if self.known:
            return [self.known.get(photo.path) or Path(self.root, photo.path) for photo in self.photos]
        return shards.locate_photos(str(self.root), [photo.path for photo in self.photos])

    def counts(self) -> dict[str, dict[str, int]]:
        """Class -> split -> number of photos, with a zero where a class is absent from a split that exists."""
        splits = sorted({photo.split for photo in self.photos}, key=(*SPLITS, "").index)
        counts = {name: dict.fromkeys(splits, 0) for name in self.classes}
        for photo in self.photos:
            if photo.label is not None:
                counts[photo.label][photo.split] += 1
        return counts

    def describe(self) -> str:
        """Say how the data were read, and what was skipped of them."""
        skipped = ", ".join(f"{reason} ({count})" for reason, count in self.ignored.items())
        layout = f"{self.layout}; " if self.layout else ""
        return layout + (f"skipped: {skipped}" if skipped else "nothing skipped")

    def fingerprint(self) -> str:
        """64 hex digits over path, label, split and size in bytes of every photo (-1 where the file is gone)."""
        digest = hashlib.sha256()
        for photo, file in zip(self.photos, self.files(), strict=True):
            try:
                num_bytes = file.num_bytes if isinstance(file, StoredPhoto) else file.stat().st_size
            except OSError:
                num_bytes = -1
            values = (photo.path, repr(photo.label), photo.split, str(num_bytes))
            digest.update("\0".join(values).encode("utf-8", errors="surrogateescape") + b"\0")
        return digest.hexdigest()


_SPLIT_OF_FILE = re.compile(r"-\d{5}-of-\d{5}\.parquet$")  # as Hugging Face names them: train-00000-of-00004.parquet
_Columns = tuple[str, str, str, str | None]  # names of the columns of paths, labels, splits and groups


def load_index(
    path: Path | str, *, path_column: str, label_column: str, split_column: str, group_column: str | None
) -> PhotoIndex:
    """Read a data set; what contradicts itself or the disk is a DataError.

    The path is a folder with train/ and perhaps val/ (or valid/, validation/) and test/, each holding class folders
    (test/ may hold photos without labels); a folder of class folders; a CSV or Parquet table, whose paths are
    absolute or relative to its folder, or `SHARD.tar/NAME`, and whose columns of splits and groups may be absent; or
    tar files or Parquet tables that hold the photos. All of these may be here or behind a URL; of shards wildcards and
    braces stand for several. Photos without a split are undecided; only test photos may have no label.
    """
    text, columns = str(path), (path_column, label_column, split_column, group_column)
    if problem := encoding_problem(text):  # recipes and reports name it, and they are text
        raise DataError(f"the data's path {problem}. Rename the folder")
    if is_url(text) or shards.is_pattern(text):
        index = _index_of_source(absolute(text), columns)
    else:
        index = _index_of_path(require_path(Path(path)), columns)
    key = natural_key()
    classes = _list_classes(index.photos)
    _refuse_unreadable_names(index.root, classes)
    return replace(index, photos=tuple(sorted(index.photos, key=lambda photo: key(photo.path))), classes=classes)


def _index_of_path(path: Path, columns: _Columns) -> PhotoIndex:
    if path.is_dir():
        names, ignored = folders.find_photos(path)
        if not names and any(shards.is_shard(file.name) for file in path.rglob("*")):
            return _index_of_source(absolute(path), columns)
        photos, layout = read_folders(path, names, ignored)
        return PhotoIndex(path, tuple(photos), (), dict(+ignored), layout)
    if path.suffix.lower() in photo_extensions():
        raise DataError(f"{path} is one photo. Give the folder that holds the class folders")
    if shards.is_shard(path.name):
        return _index_of_source(absolute(path), columns)
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        raise DataError(f"{path} is an archive. Unpack it, and give the folder that it becomes")
    return _index_of_table(str(path), str(path.parent), columns)


def _index_of_source(text: str, columns: _Columns) -> PhotoIndex:
    """Photos that a path, URL or pattern stands for: in shards, in a list, or files of their own."""
    root, found = shards.list_source(text)
    packed = [file for file in found if file.path.lower().endswith(shards.TAR_SUFFIXES)]
    packed = packed or [file for file in found if shards.is_shard(file.path)]
    if len(found) == 1 and found[0].path.lower().endswith(TABLE_SUFFIXES):
        location = shards.locate(root, found[0].path)
        if not packed or not shards.row_shards(location, location, ""):
            return _index_of_table(location, root, columns)
    if packed:
        return _index_of_shards(root, packed, columns)
    ignored = Counter("not a photo" for file in found if not is_photo_path(file.path))
    names = [file.path for file in found if is_photo_path(file.path)]
    photos, layout = read_folders(text, names, ignored)
    places = (StoredPhoto(file.path, shards.locate(root, file.path), file.version, file.num_bytes) for file in found)
    known = {place.name: place for place in places} if is_url(root) else {}
    return PhotoIndex(root if is_url(root) else Path(root), tuple(photos), (), dict(+ignored), layout, known)


def _index_of_table(location: str, folder: str, columns: _Columns) -> PhotoIndex:
    table, (path_column, label_column, split_column, group_column) = read_table(location), columns
    labels = table.column(label_column, option="--set data.label_column=NAME")
    splits = [_read_split(table.where(row), value) for row, value in enumerate(table.optional_column(split_column))]
    groups = table.optional_column(group_column, is_text=False)
    names = table.column(path_column, option="--set data.path_column=NAME", is_text=False)
    root, known = folder, dict[str, StoredPhoto]()
    if is_url(folder) or any(map(is_url, names)):
        known = {file.name: file for file in shards.locate_photos(folder, names) if isinstance(file, StoredPhoto)}
    else:
        root, names = _Paths(Path(folder), table).resolve(names)
    photos, ignored = _read_rows(table, label_column, zip(names, labels, splits, groups, strict=True))
    has_split = "its splits" if any(splits) else "no splits"
    layout = f"read as a table: path from {path_column!r}, class from {label_column!r}, {has_split}"
    return PhotoIndex(root if is_url(folder) else Path(root), tuple(photos), (), ignored, layout, known)


def _index_of_shards(root: str, found: Sequence[Found], columns: _Columns) -> PhotoIndex:
    """Photos in shards, with the labels that stand there, or else those of the folders that the shards unpack to."""
    scans = shards.scan_shards(root, found, [name for name in (*columns[1:], "cls") if name])
    known: dict[str, StoredPhoto] = {}
    inner: list[str] = []
    photos: list[Photo] = []
    for shard, scan in zip(found, scans, strict=True):
        known |= {place.name: place for place in scan.photos}
        rows = _read_notes(scan, columns, split_of(_SPLIT_OF_FILE.sub("", Path(shard.path).name)))
        for place, (label, split, group) in zip(scan.photos, rows, strict=True):
            inner.append(place.name[len(shard.path) + 1 :])
            photos.append(Photo(place.name, (label.strip() and label) or None, split, group))
    ignored = Counter[str]()
    if any(photo.label for photo in photos):
        layout = f"read {len(found)} shards, with a label beside each photo"
        if bare := [photo.path for photo in photos if photo.label is None and photo.split != "test"]:
            raise DataError(
                f"{root}: {len(bare)} of {len(photos)} photos in shards have no label, such as {quote(bare, 1)}. Put a "
                f".cls, or a .json with {columns[1]!r}, beside each"
            )
    else:
        named, layout = read_folders(root, sorted({*inner}, key=natural_key()), ignored)
        by_name = {photo.path: photo for photo in named}
        pairs = [(photo, by_name[name]) for photo, name in zip(photos, inner, strict=True) if name in by_name]
        photos = [replace(photo, label=same.label, split=photo.split or same.split) for photo, same in pairs]
        layout = f"{len(found)} shards {layout}"
    damaged = tuple((shard.path, scan.problem) for shard, scan in zip(found, scans, strict=True) if scan.problem)
    return PhotoIndex(root if is_url(root) else Path(root), tuple(photos), (), dict(+ignored), layout, known, damaged)


def _read_notes(scan: Scan, columns: _Columns, split: str) -> list[tuple[str, str, str]]:
    """Label, split and group of each photo of a shard, "" for what it does not say; `split` for all without one."""
    rows: list[tuple[str, str, str]] = []
    for place, note in zip(scan.photos, scan.notes, strict=True):
        values: Any = {} if isinstance(note, str) else note
        with suppress(ValueError):  # then it has no label, which is told
            values = json.loads(note) if isinstance(note, str) else note
        told = [cell_text(values.get(name)) if isinstance(values, dict) else "" for name in (*columns[1:], "cls")]
        rows.append((told[0] or told[3], _read_split(f"what lies beside {place.name!r}", told[1]) or split, told[2]))
    return rows


def join_indexes(old: PhotoIndex, new: PhotoIndex) -> PhotoIndex:
    """The photos of one data set, then those of another that it lacks, below the folder above both.

    The latter join the split that their group has in the former.
    """
    homes = {photo.group: photo.split for photo in old.photos if photo.group}
    photos: dict[str, Photo] = {}
    for index in (old, new):
        for photo, file in zip(index.photos, index.files(), strict=True):
            if isinstance(file, StoredPhoto):
                raise DataError(f"{index.root}: only photos that are files of this machine can be joined. Unpack them")
            split = homes.get(photo.group, photo.split)
            photos.setdefault(os.path.abspath(file), replace(photo, split=split))  # noqa: PTH100
    try:
        base = os.path.commonpath([os.path.dirname(file) for file in photos])  # noqa: PTH120
    except ValueError:
        raise DataError(f"{old.root} and {new.root} are on different drives. Bring them to one") from None
    named = (replace(one, path=os.path.relpath(file, base).replace(os.sep, "/")) for file, one in photos.items())
    return PhotoIndex(Path(base), tuple(named), _list_classes(photos.values()), new.ignored)


def save_split_table(index: PhotoIndex, path: Path) -> None:
    """Write path, label, split and group of every photo as CSV, in index order, whole or not at all."""
    rows = [(photo.path, photo.label or "", photo.split, photo.group) for photo in index.photos]
    write_csv(path, SPLIT_COLUMNS, rows)


def load_split_table(path: Path, root: Path | str) -> PhotoIndex:
    """Read what `save_split_table` wrote, in the same order. The photos need not exist."""
    table = read_table(require_path(path))
    columns = [table.column(name, is_text=name == "label") for name in SPLIT_COLUMNS]
    photos = [Photo(name, label or None, split, group) for name, label, split, group in zip(*columns, strict=True)]
    unknown = sorted({photo.split for photo in photos} - {*SPLITS, ""})
    if unknown:
        raise DataError(f"{path}: {unknown[0]!r} is not a split; use train, val or test")
    return PhotoIndex(root, tuple(photos), _list_classes(photos), {})


def apply_corrections(index: PhotoIndex, table: Path) -> PhotoIndex:
    """Relabel and drop photos as a review decided; classes keep their number even if a class loses its last photo.

    The table has the columns path, action (keep, relabel or drop) and label (for relabel). A photo, action or class
    that does not exist, or two decisions about one photo, are a DataError.
    """
    content = read_table(require_path(table))
    columns = [content.column(name, is_text=name != "path") for name in ("path", "action", "label")]
    rows = enumerate(zip(*columns, strict=True))
    decisions = check_decisions(index, ((content.where(row), *values) for row, values in rows))
    kept = [photo for photo in index.photos if decisions.get(photo.path) != ("drop", "")]
    photos = [replace(photo, label=decisions.get(photo.path, ("", ""))[1] or photo.label) for photo in kept]
    ignored = Counter(index.ignored)
    ignored["dropped by corrections"] += len(index.photos) - len(photos)
    return replace(index, photos=tuple(photos), ignored=dict(+ignored))


def check_decisions(index: PhotoIndex, rows: Iterable[tuple[str, str, str, str]]) -> dict[str, tuple[str, str]]:
    """The decisions (action, label) by path of rows (where, path, action, label), as `apply_corrections` takes them."""
    known = {photo.path for photo in index.photos}
    composed = {_compose(path): path for path in known}
    decisions: dict[str, tuple[str, str]] = {}
    for where, given, action, label in rows:
        path = given if given in known else composed.get(_compose(given.replace("\\", "/")), given)
        if path not in known:
            raise DataError(f"{where}: there is no photo {path!r} in {index.root}{did_you_mean(str(path), known)}")
        if action not in ("keep", "relabel", "drop"):
            raise DataError(f"{where}: {path!r} has the action {action!r}; use keep, relabel or drop")
        if action == "relabel" and label not in index.classes:
            hint = did_you_mean(label, index.classes)
            raise DataError(f"{where}: {path!r} is relabeled {label!r}, which is not a class{hint}")
        decision = (action, label if action == "relabel" else "")
        if decisions.setdefault(path, decision) != decision:
            raise DataError(f"{where}: there are two decisions about {path!r}. Keep one of the rows")
    return decisions


def _list_classes(photos: Iterable[Photo]) -> tuple[str, ...]:
    return tuple(sorted({photo.label for photo in photos if photo.label is not None}, key=natural_key()))


def _read_split(where: str, value: str) -> str:
    split = split_of(value.strip())
    if value.strip() and not split:
        hint = did_you_mean(value.strip(), SPLITS) or "."
        raise DataError(f"{where}: {value!r} is not a split{hint} Use train, val or test, or leave it empty")
    return split


def _read_rows(
    table: Table, label_column: str, rows: Iterable[tuple[str, str, str, str]]
) -> tuple[list[Photo], dict[str, int]]:
    """The photos of rows of path, label, split and group, each once, and what was skipped."""
    photos: dict[str, Photo] = {}
    for number, (name, label, split, group) in enumerate(rows):
        if not label.strip() and split != "test":
            raise DataError(
                f"{table.where(number)}: {name!r} has an empty {label_column!r}. Name its class; only test photos may "
                "have none"
            )
        photo = Photo(name, label if label.strip() else None, split, group)
        first = photos.setdefault(name, photo)
        for what, one, other in zip(SPLIT_COLUMNS, astuple(first), astuple(photo), strict=True):
            if one != other:
                raise DataError(f"{table.where(number)}: {name!r} has two {what}s, {one!r} and {other!r}. Keep one row")
    num_repeated = table.num_rows - len(photos)
    return list(photos.values()), {"row that repeats another": num_repeated} if num_repeated else {}


class _Paths:
    """The paths of a table in a folder, found on disk."""

    def __init__(self, folder: Path, table: Table) -> None:
        self._folder = folder
        self._table = table
        self._base = os.path.normpath(folder.absolute())
        self._names_in = functools.cache(list_names)

    def resolve(self, paths: Sequence[str]) -> tuple[Path, list[str]]:
        """Root and relative names of the photos. The root is the table's folder unless a photo is elsewhere."""
        if not paths:
            raise DataError(f"{self._table.name} has no rows. Each row names one photo")
        whole = [self._check(row, path) for row, path in enumerate(paths)]
        full = [
            path if os.path.isfile(path) or shards.split_path("", path) else find_spelling(path, self._names_in)  # noqa: PTH113
            for path in whole
        ]
        missing = [row for row, path in enumerate(full) if not path]
        if missing:
            raise DataError(self._explain_missing(paths, whole, missing))
        root, base = self._folder, self._base
        here = [(shards.split_path("", path) or (path, ""))[0] for path in full]
        if not all(_is_inside(path, base) for path in here):
            try:
                base = os.path.commonpath([os.path.dirname(path) for path in here])  # noqa: PTH120
            except ValueError:
                raise DataError(f"{self._table.name}: photos are on more than one drive. Bring them to one") from None
            root = Path(base)
        return root, [os.path.relpath(path, base).replace(os.sep, "/") for path in full]

    def _check(self, row: int, path: str) -> str:
        """The absolute path that a row names, which may not exist."""
        where = self._table.where(row)
        if not path.strip():
            raise DataError(f"{where}: this row names no photo. Fill in its path, or delete the row")
        if "\0" in path:
            raise DataError(f"{where}: {path!r} holds a zero byte, which no path can. Correct the row")
        whole = os.path.normpath(os.path.join(self._base, path))  # noqa: PTH118, Path would tidy what is to be checked
        if not os.path.isabs(path) and not _is_inside(whole, self._base):  # noqa: PTH117
            raise DataError(f"{where}: {path!r} leads out of the table's folder. Write an absolute path, or move it")
        return whole

    def _explain_missing(self, paths: Sequence[str], whole: Sequence[str], missing: Sequence[int]) -> str:
        first = missing[0]
        text = (
            f"{self._table.name}: {len(missing)} of {len(paths)} photos not found in {self._folder}: "
            f"{quote([paths[row] for row in missing])}, the first in line {self._table.lines[first]}"
        )
        if problem := path_problem(paths[first]):
            return f"{text}. {problem}"
        where, name = os.path.split(whole[first])
        hint = did_you_mean(name, self._names_in(where).values())
        if not paths[first].isascii() and sys.getfilesystemencoding() != "utf-8":
            hint = "; this Python reads file names as ASCII: set PYTHONUTF8=1"
        return f"{text}{hint or '.'} Relative paths start at the table's folder"


def path_problem(path: str) -> str:
    """Say why a table's path cannot be found here, where its text shows it, and what to do; else ""."""
    if os.sep == "/" and re.match(r"[A-Za-z]:[\\/]", path):
        return f"{path!r} is a path of a Windows drive. Write paths relative to the table's folder"
    problem = encoding_problem(path)
    return f"{problem}. Save the table as UTF-8" if problem else ""


def find_spelling(path: str, names_in: Callable[[str], Mapping[str, str]]) -> str:
    """Find a file that is there under another spelling (a backslash, another Unicode form of its letters); else "".

    `names_in` is `list_names`, which the caller may let remember.
    """
    found = ""
    for part in re.split(r"[/\\]", path) if os.sep == "/" else []:
        is_there = not part or os.path.lexists(f"{found}/{part}")
        name = part if is_there else names_in(found or "/").get(_compose(part))
        if name is None:
            return ""
        found = f"{found}/{name}" if part else found
    return found if found and os.path.isfile(found) else ""  # noqa: PTH113


def list_names(folder: str) -> dict[str, str]:
    """List the names in a folder by their composed form; none where it cannot be read."""
    try:
        return {_compose(name): name for name in os.listdir(folder)}  # noqa: PTH208, names suffice
    except (OSError, ValueError):
        return {}


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _is_inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def _refuse_unreadable_names(root: Path | str, classes: Sequence[str]) -> None:
    """Class names stand in tables and models: one that is not text is refused before it costs a training."""
    for name in classes:
        if problem := encoding_problem(name):
            try:
                os.fsencode(name).decode()
            except UnicodeDecodeError:
                raise DataError(f"{root}: the class folder {problem}. Rename the folder") from None
            raise DataError(f"{root}: this Python reads the folder {name!r} as ASCII. Set PYTHONUTF8=1") from None
