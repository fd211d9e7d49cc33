"""Photos to be predicted, wherever they lie: folders, lists and shards, on this machine or behind a URL.

A source is cut into pieces that are read one after another here, or each on another machine. A piece is plain data: it
can be sent, and remembered, and its digest changes with the photos that it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fieldmark.data.folders import existing, find_photos, is_left_aside, is_photo_path, natural_key
from fieldmark.data.layouts import require_photos
from fieldmark.data.lists import FETCHES_AT_ONCE, FileList, locate, open_list, split_list
from fieldmark.data.shards import TAR_SUFFIXES, NamedPhoto, RowShard, TarShard, row_shards
from fieldmark.data.storage import Found, file_version, find_files, is_file, is_url, match_files
from fieldmark.data.tables import TABLE_SUFFIXES
from fieldmark.errors import DataError

Piece = FileList | TarShard | RowShard

_KINDS: dict[str, Callable[..., Piece]] = {kind.kind: kind for kind in (FileList, TarShard, RowShard)}
_WILD = re.compile(r"[*?\[{]")
_LISTED_AT_ONCE = 1024


@dataclass(frozen=True)
class PhotoSource:
    """Photos in their order.

    Attributes:
        name: What messages call it.
        count: How many there are; None for tar files, which tell only when they are read.
        cut: Called with a number of photos, yields the pieces from the first. Only lists of files are cut to this
            size; a tar file or a row group is a piece, whatever it holds.
        root: Folder of this machine that all names are relative to; None where they are not all files in one.
    """

    name: str
    count: int | None
    cut: Callable[[int], Iterator[Piece]]
    root: str | None = None

    def names(self) -> Iterator[str]:
        """Names of all photos, as tables will have them."""
        return chain.from_iterable(piece.names() for piece in self.cut(_LISTED_AT_ONCE))

    def read(self, ahead: int) -> Iterator[NamedPhoto]:
        """All photos; the next `ahead` of them are fetched while the last are used."""
        return read_ahead(chain.from_iterable(piece.read() for piece in self.cut(_LISTED_AT_ONCE)), ahead)


def open_source(text: str) -> PhotoSource:
    """Find out what photos are meant, without reading any.

    Args:
        text: Path or URL of one of: a folder of photos; else a folder of tar or Parquet files; a photo; a tar file; a
            Parquet table that holds photos; a CSV or Parquet table with a column `path`. Wildcards (`*`, `?`, `[..]`,
            `**`) and braces (`{0000..0003}`, `{a,b}`) stand for several files.

    Raises:
        DataError: There is nothing of that kind, or its storage cannot be reached.
        MissingExtraError: The package for this kind of storage is not installed.
    """
    given = text
    if not is_url(text):
        text = str(Path(text).absolute())  # for whoever reads a piece elsewhere
        if Path(text).exists():
            return _of_local(Path(text))
    if _WILD.search(text) and not text.startswith("http"):
        folder = _fixed_folder(text)
        found = [file for pattern in expand_braces(text) for file in _match(pattern, folder)]
        return _of_files(text, folder, found)
    if not is_url(text):
        existing(Path(given))  # says what is missing
    if is_file(text):
        root, _, name = text.rpartition("/")
        return _of_file(text, root, Found(name, file_version(text)))
    return _of_files(text, text, find_files(text))


def read_ahead(photos: Iterable[NamedPhoto], count: int) -> Iterator[NamedPhoto]:
    """The same photos, the next `count` of which another thread fetches while the last are used."""
    photos = iter(photos)
    with ThreadPoolExecutor(1, "fieldmark-ahead") as thread:

        def take() -> list[NamedPhoto]:
            return list(islice(photos, count))

        coming = thread.submit(take)
        while part := coming.result():
            coming = thread.submit(take)
            yield from part


def digest(piece: Piece) -> str:
    """64 hex digits over what a piece names and how its storage marks it."""
    return hashlib.sha256(to_json(piece).encode("ascii")).hexdigest()


def to_json(piece: Piece) -> str:
    """A piece as text."""
    return json.dumps({"kind": piece.kind, **asdict(piece)})


def from_json(text: str) -> Piece:
    """What `to_json` wrote."""
    fields: dict[str, Any] = json.loads(text)
    kind = _KINDS[fields.pop("kind")]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def expand_braces(text: str) -> list[str]:
    """`{a,b}` and `{0008..0010}` written out, the first brace slowest, as shells and WebDataset do.

    >>> expand_braces("s-{08..10}.{tar,tgz}")
    ['s-08.tar', 's-08.tgz', 's-09.tar', 's-09.tgz', 's-10.tar', 's-10.tgz']
    """
    brace = re.search(r"\{([^{}]*)\}", text)
    if brace is None:
        return [text]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        width = len(span[1]) if span[1].startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = brace[1].split(",")
    rests = expand_braces(text[brace.end() :])
    return [text[: brace.start()] + option + rest for option in options for rest in rests]


def _of_local(path: Path) -> PhotoSource:
    if not path.is_dir():
        found = Found(path.name, file_version(str(path)))
        return _of_file(str(path), str(path.parent), found)
    names, ignored = find_photos(path)
    if not names:
        others = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        if any(_is_shard(name) for name in others):
            return _of_files(str(path), str(path), [Found(name, file_version(str(path / name))) for name in others])
        require_photos(path, names, ignored)
    # Looked up piece by piece: the state of a million files takes a while, and only those who remember need it.
    return PhotoSource(str(path), len(names), partial(_cut_local, str(path), names), str(path))


def _cut_local(root: str, names: Sequence[str], size: int) -> Iterator[FileList]:
    for start in range(0, len(names), size):
        part = tuple(names[start : start + size])
        yield FileList(root, part, tuple(file_version(locate(root, name)) for name in part))


def _match(pattern: str, folder: str) -> list[Found]:
    """Files that a pattern without braces stands for; one that names a single file must be there."""
    if is_url(pattern):
        if _WILD.search(pattern):
            return match_files(pattern, folder)
        return [Found(pattern[len(folder) :].lstrip("/"), file_version(pattern))]
    files = [Path(name) for name in glob(pattern, recursive=True)]  # noqa: PTH207, takes absolute patterns too
    if not files and not _WILD.search(pattern):
        existing(Path(pattern))
    return [Found(file.relative_to(folder).as_posix(), file_version(str(file))) for file in files if file.is_file()]


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern up to the folder above its first wildcard."""
    place = _WILD.search(pattern)
    return pattern[: place.start() if place else None].rpartition("/")[0] or ("/" if pattern.startswith("/") else "")


def _is_shard(name: str) -> bool:
    return not is_left_aside(name) and name.lower().endswith((*TAR_SUFFIXES, ".parquet"))


def _of_files(name: str, root: str, found: Iterable[Found]) -> PhotoSource:
    """Photos among the files; shards and lists where there is no photo, each with all that it holds."""
    key = natural_key()
    there = sorted({file.path: file for file in found}.values(), key=lambda file: key(file.path))
    photos = [file for file in there if is_photo_path(file.path)]
    if photos:
        return PhotoSource(name, len(photos), partial(_cut_found, root, photos))
    shards = [file for file in there if _is_shard(file.path)]
    if not shards:
        seen = f"{len(there)} other files" if there else "nothing"
        raise DataError(
            f"{name} holds no photos: {seen} there. Give a folder of photos, a list (.csv or .parquet with a column "
            "`path`), or shards (.tar, or .parquet with the bytes of photos)"
        )
    with ThreadPoolExecutor(FETCHES_AT_ONCE, "fieldmark-open") as pool:
        sources = list(pool.map(lambda file: _of_file(name, root, file), shards))
    counts = [source.count for source in sources if source.count is not None]
    count = sum(counts) if len(counts) == len(sources) else None
    return PhotoSource(name, count, lambda size: chain.from_iterable(source.cut(size) for source in sources))


def _cut_found(root: str, found: Sequence[Found], size: int) -> Iterator[FileList]:
    for start in range(0, len(found), size):
        part = found[start : start + size]
        yield FileList(root, tuple(file.path for file in part), tuple(file.version for file in part))


def _of_file(name: str, root: str, file: Found) -> PhotoSource:
    location, lower = locate(root, file.path), file.path.lower()
    if lower.endswith(TAR_SUFFIXES):
        return PhotoSource(name, None, lambda _: iter([TarShard(location, file.path, file.version)]))
    if lower.endswith(".parquet") and (shards := row_shards(location, file.path, file.version)):
        return PhotoSource(name, sum(shard.num_rows for shard in shards), lambda _: iter(shards))
    if lower.endswith(TABLE_SUFFIXES):
        folder = location.rpartition("/")[0] if is_url(location) else str(Path(location).parent)
        count, paths = open_list(location, folder)
        if not count:
            raise DataError(f"{location} is a list without rows: there is nothing to predict")
        return PhotoSource(name, count, lambda size: split_list(folder, paths(), size))
    here = None if is_url(root) else root
    return PhotoSource(name, 1, lambda _: iter([FileList(root, (file.path,), (file.version,))]), here)
