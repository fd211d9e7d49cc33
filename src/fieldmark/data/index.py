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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.data import folders, shards
from fieldmark.data.columns import PARTS, TEST, UNDECIDED, Categories, Photos, Texts, arrow, natural_order, to_bytes
from fieldmark.data.folders import Photo, is_photo_path, natural_key, photo_extensions, quote, read_folders, split_of
from fieldmark.data.shards import PhotoFiles, Scan, StoredPhoto
from fieldmark.data.storage import Found, absolute, is_url
from fieldmark.data.tables import TABLE_SUFFIXES, Table, cell_text, encoding_problem, read_table, write_table
from fieldmark.errors import DataError, did_you_mean
from fieldmark.files import require_path

SPLITS = PARTS[:UNDECIDED]
SPLIT_COLUMNS = tuple(field.name for field in fields(Photo))
MOST_CSV_ROWS = 1_000_000  # a larger split table is written as Parquet, which is read in seconds
ARCHIVE_SUFFIXES = frozenset({".zip", ".gz", ".bz2", ".xz", ".7z", ".rar"})


@dataclass(frozen=True)
class PhotoIndex:
    """The photos of a data set. A photo's number is its index in `photos`."""

    root: Path | str  # the folder that paths are relative to; text if it is a URL
    photos: Photos  # in natural order of path; any sequence of `Photo` becomes one
    classes: tuple[str, ...]  # in natural order ("2" before "10"), over all splits; a class's number is its index here
    ignored: Mapping[str, int]  # reason -> count of files, folders and rows that were skipped
    layout: str = ""  # how folders, a table or shards were read
    known: Mapping[str, StoredPhoto] = field(default_factory=dict[str, StoredPhoto], repr=False, compare=False)
    """By path, where photos are that are no files of this machine; empty where it is to be looked up."""
    damaged: tuple[tuple[str, str], ...] = ()  # (path, reason) of shards whose photos are not all there

    def __post_init__(self) -> None:
        object.__setattr__(self, "photos", Photos.of(self.photos))
        object.__setattr__(self, "root", self.root if is_url(str(self.root)) else Path(self.root))

    def __len__(self) -> int:
        return len(self.photos)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> PhotoIndex:
        """Some photos by number, or where a mask is true, with the same classes."""
        return replace(self, photos=self.photos[rows])

    def of(self, split: str) -> PhotoIndex:
        """The photos of one split, with the same classes."""
        return self.select(self.photos.splits == PARTS.index(split))

    def label_numbers(self) -> NDArray[np.int64]:
        """(N,) class number of each photo, -1 where it has no label."""
        return self.photos.labels.find(self.classes)

    def numbers(self, split: str) -> NDArray[np.int64]:
        """(N,) the labeled photos of a split, rising."""
        return np.flatnonzero((self.photos.splits == PARTS.index(split)) & self.photos.is_labeled())

    def files(self) -> PhotoFiles:
        """The file of each photo, or its place in a shard or behind a URL."""
        if self.known:
            return PhotoFiles(str(self.root), self.photos.paths, self.known)
        return shards.locate_photos(str(self.root), self.photos.paths)

    def count_splits(self) -> Counter[str]:
        """Split -> number of photos, of those that exist."""
        parts, counts = np.unique(self.photos.splits, return_counts=True)
        return Counter({PARTS[part]: count for part, count in zip(parts, counts.tolist(), strict=True)})

    def counts(self) -> dict[str, dict[str, int]]:
        """Class -> split -> number of photos, with a zero where a class is absent from a split that exists."""
        table = np.zeros((len(self.classes) + 1, len(PARTS)), np.int64)  # whose last row is that of -1
        np.add.at(table, (self.label_numbers(), self.photos.splits), 1)
        rows, parts = zip(self.classes, table[:-1].tolist(), strict=True), self.count_splits()
        return {name: {part: row[PARTS.index(part)] for part in parts} for name, row in rows}

    def describe(self) -> str:
        """Say how the data were read, and what was skipped of them."""
        skipped = ", ".join(f"{reason} ({count})" for reason, count in self.ignored.items())
        layout = f"{self.layout}; " if self.layout else ""
        return layout + (f"skipped: {skipped}" if skipped else "nothing skipped")

    def fingerprint(self) -> str:
        """64 hex digits over path, label, split and size in bytes of every photo (-1 where the file is gone)."""
        photos, files, digest = self.photos, self.files(), hashlib.sha256()
        for path, label, split in zip(photos.paths, photos.labels, photos.splits, strict=True):
            values = (path, repr(label or None), PARTS[split], str(files.count_bytes(path)), "")
            digest.update(to_bytes("\0".join(values)))
        return digest.hexdigest()


# Behind a split's name: train-00000-of-00004.parquet by Hugging Face; with a hash; val-000012.tar, test/0000.parquet.
_SPLIT_OF_FILE, _NUMBER_OF_FILE = (
    re.compile(r"-\d{5}-of-\d{5}\.parquet$"),
    re.compile(r"[-_]?\d+(-of-\d+)?(-[0-9a-f]+)?$"),
)
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
    arrow()[0].default_memory_pool().release_unused()  # it would keep what the table took
    classes = _list_classes(index.photos)
    _refuse_unreadable_names(index, classes)
    return replace(index, classes=classes)


def _index_of_path(path: Path, columns: _Columns) -> PhotoIndex:
    if path.is_dir():
        names, ignored = folders.find_photos(path)
        if not names and any(shards.is_shard(file.name) for file in path.rglob("*")):
            return _index_of_source(absolute(path), columns)
        photos, layout = read_folders(path, names, ignored)
        return PhotoIndex(path, Photos.of(photos).sort(), (), dict(+ignored), layout)
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
        return _index_of_shards(
            root, packed, columns, Counter("photo beside the shards" for file in found if is_photo_path(file.path))
        )
    ignored = Counter("not a photo" for file in found if not is_photo_path(file.path))
    names = [file.path for file in found if is_photo_path(file.path)]
    photos, layout = read_folders(text, names, ignored)
    places = (StoredPhoto(file.path, shards.locate(root, file.path), file.version, file.num_bytes) for file in found)
    known = {place.name: place for place in places} if is_url(root) else {}
    return PhotoIndex(root, Photos.of(photos).sort(), (), dict(+ignored), layout, known)


def _index_of_table(location: str, folder: str, columns: _Columns) -> PhotoIndex:
    table, (path_column, label_column, split_column, group_column) = read_table(location, columns), columns
    texts = table.column(label_column, option="--set data.label_column=NAME")
    labels = Categories.of(text if text.strip() else "" for text in texts)
    splits = _read_splits(table, Categories.of(table.optional_column(split_column)))
    groups = Categories.of(table.optional_column(group_column, is_text=False))
    names = Texts.of(table.column(path_column, option="--set data.path_column=NAME", is_text=False))
    root, known = folder, dict[str, StoredPhoto]()
    if is_url(folder) or len(names.matching("://")):
        known = shards.locate_photos(folder, names).known
    else:
        root, names = _find_files(table, Path(folder), names)
    photos = Photos(names, labels, splits, groups)
    for row in np.flatnonzero(~photos.is_labeled() & (splits != TEST))[:1]:
        raise DataError(
            f"{table.where(row)}: {names[row]!r} has an empty {label_column!r}. Name its class; only test photos may "
            "have none"
        )
    photos, ignored = _drop_repeats(photos, table)
    has_split = "its splits" if (splits != UNDECIDED).any() else "no splits"
    layout = f"read as a table: path from {path_column!r}, class from {label_column!r}, {has_split}"
    return PhotoIndex(root, photos, (), ignored, layout, known)


def _split_of_shard(path: str) -> str:
    """The split that the name of a shard says, or else that of a folder which it is in."""
    *folders, name = path.split("/")
    stem = _NUMBER_OF_FILE.sub("", name.partition(".")[0])
    return next(filter(None, map(split_of, (stem, *reversed(folders)))), "")


def _index_of_shards(root: str, found: Sequence[Found], columns: _Columns, ignored: Counter[str]) -> PhotoIndex:
    """Photos in shards, with the labels that stand there, or else those of the folders that the shards unpack to."""
    scans = shards.scan_shards(root, found, [name for name in (*columns[1:], "cls") if name])
    known: dict[str, StoredPhoto] = {}
    inner: list[str] = []
    photos: list[Photo] = []
    splits = [_split_of_shard(shard.path) for shard in found]
    if len({*splits}) < 2:  # all of one name: no division, unless it is written as such
        splits = [split_of(_SPLIT_OF_FILE.sub("", Path(shard.path).name)) for shard in found]
    for shard, split, scan in zip(found, splits, scans, strict=True):
        known |= {place.name: place for place in scan.photos}
        rows = _read_notes(scan, columns, split)
        for place, (label, split, group) in zip(scan.photos, rows, strict=True):
            inner.append(place.name[len(shard.path) + 1 :])
            photos.append(Photo(place.name, (label.strip() and label) or None, split, group))
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
    return PhotoIndex(root, Photos.of(photos).sort(), (), dict(+ignored), layout, known, damaged)


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
    joined = Photos.of(named)
    return PhotoIndex(Path(base), joined, _list_classes(joined), new.ignored)


def save_split_table(index: PhotoIndex, path: Path) -> None:
    """Write path, label, split and group of every photo as CSV or Parquet, in index order, whole or not at all."""
    photos = index.photos
    columns = (photos.paths, photos.labels, Categories(photos.splits, PARTS), photos.groups)
    write_table(path, dict(zip(SPLIT_COLUMNS, columns, strict=True)))


def find_split_table(path: Path, count: int = 0) -> Path:
    """The table by this name in .csv, or the same in .parquet: if that is there, or for a large count of photos."""
    other = path.with_suffix(".parquet")
    return other if other.is_file() or count > MOST_CSV_ROWS else path


def load_split_table(path: Path, root: Path | str) -> PhotoIndex:
    """Read what `save_split_table` wrote, in the same order. The photos need not exist."""
    table = read_table(require_path(path))
    paths, *columns = (table.column(name, is_text=name == "label") for name in SPLIT_COLUMNS)
    labels, splits, groups = map(Categories.of, columns)
    if unknown := sorted({*splits.words} - {*SPLITS}):
        raise DataError(f"{path}: {unknown[0]!r} is not a split; use train, val or test")
    photos = Photos(Texts.of(paths), labels, splits.find(PARTS).astype(np.int8), groups)
    return PhotoIndex(root, photos, _list_classes(photos), {})


def apply_corrections(index: PhotoIndex, table: Path) -> PhotoIndex:
    """Relabel and drop photos as a review decided; classes keep their number even if a class loses its last photo.

    The table has the columns path, action (keep, relabel or drop) and label (for relabel). A photo, action or class
    that does not exist, or two decisions about one photo, are a DataError.
    """
    content = read_table(require_path(table))
    columns = [content.column(name, is_text=name != "path") for name in ("path", "action", "label")]
    rows = enumerate(zip(*columns, strict=True))
    decisions = check_decisions(index, ((content.where(row), *values) for row, values in rows))
    labels, is_kept = index.label_numbers(), np.ones(len(index), np.bool_)
    for number, (action, label) in zip(Texts.of(decisions).find(index.photos.paths), decisions.values(), strict=True):
        is_kept[number] = action != "drop"
        labels[number] = index.classes.index(label) if label else labels[number]
    photos = replace(index.photos, labels=Categories(labels, index.classes))[is_kept]
    ignored = Counter(index.ignored)
    ignored["dropped by corrections"] += len(index) - len(photos)
    return replace(index, photos=photos, ignored=dict(+ignored))


def check_decisions(index: PhotoIndex, rows: Iterable[tuple[str, str, str, str]]) -> dict[str, tuple[str, str]]:
    """The decisions (action, label) by path of rows (where, path, action, label), as `apply_corrections` takes them."""
    known = {*index.photos.paths}
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


def _list_classes(photos: Photos) -> tuple[str, ...]:
    return tuple(sorted(photos.labels.used().values(), key=natural_key()))


def _read_splits(table: Table, texts: Categories) -> NDArray[np.int8]:
    """(N,) numbers of PARTS, of what people write for splits."""
    firsts = (table.where(int((texts.numbers == number).argmax())) for number in range(len(texts.words)))
    return replace(texts, words=[*map(_read_split, firsts, texts.words)]).find(PARTS).astype(np.int8)


def _read_split(where: str, value: str) -> str:
    split = split_of(value.strip())
    if value.strip() and not split:
        hint = did_you_mean(value.strip(), SPLITS) or "."
        raise DataError(f"{where}: {value!r} is not a split{hint} Use train, val or test, or leave it empty")
    return split


def _drop_repeats(photos: Photos, table: Table) -> tuple[Photos, dict[str, int]]:
    """The photos of a table's rows in order, each once, and how many rows say again what another says."""
    rows = natural_order(photos.paths)
    photos = photos[rows]
    is_repeat = photos.paths.are_repeats()
    if not is_repeat.any():
        return photos, {}
    columns = (photos.labels.numbers, photos.splits, photos.groups.numbers)
    differs = np.flatnonzero(is_repeat & np.any([np.diff(column, prepend=0) != 0 for column in columns], axis=0))
    if len(differs):
        later = int(min(differs, key=rows.__getitem__))  # the first row that says anything else
        pairs = zip(SPLIT_COLUMNS, astuple(photos[later - 1]), astuple(photos[later]), strict=True)
        what, one, other = next(pair for pair in pairs if pair[1] != pair[2])
        where = f"{table.where(rows[later])}: {photos.paths[later]!r}"
        raise DataError(f"{where} has two {what}s, {one!r} and {other!r}. Keep one row")
    return photos[~is_repeat], {"row that repeats another": int(is_repeat.sum())}


def _find_files(table: Table, folder: Path, paths: Texts) -> tuple[str, Texts]:
    """Root and relative names of a table's photos. The root is the table's folder unless a photo is elsewhere."""
    base, names_in, missing = os.path.normpath(folder.absolute()), functools.cache(list_names), list[int]()

    def find(row: int, path: str) -> str:
        whole = os.path.normpath(os.path.join(base, path))  # noqa: PTH118, Path would tidy what is to be checked
        if not path.strip() or "\0" in path or not (_is_inside(whole, base) or os.path.isabs(path)):  # noqa: PTH117
            raise DataError(f"{table.where(row)}: {_explain_path(path)}")
        if not (os.path.isfile(whole) or shards.split_path("", whole)):  # noqa: PTH113
            whole = find_spelling(whole, names_in)
            missing.extend([] if whole else [row])
        return whole

    if not len(paths):
        raise DataError(f"{table.name} has no rows. Each row names one photo")
    found = Texts.of(find(row, path) for row, path in enumerate(paths))
    if missing:
        count = f"{len(missing)} of {len(paths)} photos not found in {folder}: {quote([paths[row] for row in missing])}"
        hint = _explain_missing(paths[missing[0]], base, names_in)
        raise DataError(f"{table.name}: {count}, the first in line {table.lines[missing[0]]}{hint}")
    root = str(folder)
    if not all(_is_inside(path, base) for path in found):
        try:
            base = os.path.commonpath({os.path.dirname(path) for path in found})  # noqa: PTH120
        except ValueError:
            raise DataError(f"{table.name}: photos are on more than one drive. Bring them to one") from None
        while not os.path.isdir(base):  # noqa: PTH112, a shard
            base = os.path.dirname(base)  # noqa: PTH120
        root = base
    return root, Texts.of(path[len(base.rstrip(os.sep)) + 1 :].replace(os.sep, "/") for path in found)


def _explain_path(path: str) -> str:
    if not path.strip():
        return "this row names no photo. Fill in its path, or delete the row"
    if "\0" in path:
        return f"{path!r} holds a zero byte, which no path can. Correct the row"
    return f"{path!r} leads out of the table's folder. Write an absolute path, or move it"


def _explain_missing(path: str, base: str, names_in: Callable[[str], Mapping[str, str]]) -> str:
    if problem := path_problem(path):
        return f". {problem}"
    where, name = os.path.split(os.path.normpath(os.path.join(base, path)))  # noqa: PTH118
    hint = did_you_mean(name, names_in(where).values())
    if not path.isascii() and sys.getfilesystemencoding() != "utf-8":
        hint = "; this Python reads file names as ASCII: set PYTHONUTF8=1"
    return f"{hint or '.'} Relative paths start at the table's folder"


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


def _refuse_unreadable_names(index: PhotoIndex, classes: Sequence[str]) -> None:
    """Class names stand in tables and models: one that is not text is refused before it costs a training."""
    for name in classes:
        if problem := encoding_problem(name):
            raise DataError(f"{index.root}: the class folder {problem}. Rename the folder")
    paths = index.photos.paths
    for number in paths.matching(r"[^\x00-\x7f]")[:1] if sys.getfilesystemencoding() == "ascii" else ():
        raise DataError(f"{index.root}: this Python reads names such as {paths[number]!r} as ASCII. Set PYTHONUTF8=1")
