"""Photos to be predicted, wherever they are: folders, lists and shards, on this machine or behind a URL.

A source is cut into pieces that are read one after another here, or each on another machine. A piece is plain data: it
can be sent, and remembered, and its digest changes with the photos that it names.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import chain, islice, repeat
from pathlib import Path

from fieldmark.data import shards
from fieldmark.data.folders import find_photos, is_photo_path, require_photos
from fieldmark.data.index import find_spelling, list_names, path_problem
from fieldmark.data.inspection import map_in_threads
from fieldmark.data.shards import FETCHES_AT_ONCE, NamedPhoto, RowShard, TarShard
from fieldmark.data.storage import Found, absolute, fetch, find_file, is_url
from fieldmark.data.tables import TABLE_SUFFIXES, Table, cell_text, open_parquet, read_table
from fieldmark.errors import DataError, PhotoError
from fieldmark.files import require_path

PATH_COLUMN = "path"
_LIST_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class FileList:
    """Photos that are files of their own."""

    root: str  # folder or URL that relative paths begin at
    paths: tuple[str, ...]  # as tables name them: relative to the root, absolute, or URLs; "" is a gap in a list
    versions: tuple[str, ...]  # `storage.Found.version` of each where a listing has it, else none at all

    def read(self, *, contents: bool = True) -> Iterator[NamedPhoto]:
        """Names, and files of this machine unread or what was fetched of others."""
        if not contents:
            yield from zip(self.paths, repeat(b""))
            return
        fetch_one = partial(self._fetch, names_in=cache(list_names))
        yield from zip(self.paths, map_in_threads(fetch_one, self.paths, FETCHES_AT_ONCE), strict=True)

    def _fetch(self, path: str, *, names_in: Callable[[str], Mapping[str, str]]) -> Path | bytes | PhotoError:
        if not path:
            return PhotoError("", "has no path in the list")
        location = shards.locate(self.root, path)
        if not is_url(location):
            return _find_file(location, path, names_in)
        try:
            return fetch(location)
        except PhotoError as error:
            return error


def _find_file(location: str, path: str, names_in: Callable[[str], Mapping[str, str]]) -> Path | PhotoError:
    """The file of a listed path, also under another spelling; of one that is missing why, where its text shows it."""
    if os.path.isfile(location):  # noqa: PTH113, a path may be what no file can be called
        return Path(location)
    problem = path_problem(path)
    if not problem and (other := find_spelling(location, names_in)):
        return Path(other)
    return PhotoError(path, f"is not there: {problem}") if problem else Path(location)


def cut_list(
    root: str, paths: Iterable[str], size: int, version: Callable[[str], str] | None = None
) -> Iterator[FileList]:
    """Paths in pieces of `size`, each with its `version` where there is one."""
    paths = iter(paths)
    while part := tuple(islice(paths, size)):
        yield FileList(root, part, tuple(map(version, part)) if version else ())


def open_list(location: str, path_column: str) -> tuple[int, Callable[[], Iterator[str]]]:
    """The number of rows of a CSV or Parquet table, and what yields the paths in its column, of Parquet bit by bit."""
    option = "--path-column NAME. A shard needs `image`, as bytes"
    if location.lower().endswith(".parquet"):
        with open_parquet(location, location) as table:
            columns, num_rows = {name: list[str]() for name in table.schema_arrow.names}, table.metadata.num_rows
        Table(location, columns, {}, ()).column(path_column, option=option)
        return num_rows, partial(_parquet_paths, location, path_column)
    paths = read_table(location).column(path_column, option=option, is_text=False)
    return len(paths), partial(iter, paths)


def _parquet_paths(location: str, path_column: str) -> Iterator[str]:
    with open_parquet(location, location) as table:
        for batch in table.iter_batches(_LIST_ROWS_AT_ONCE, columns=[path_column]):
            yield from map(cell_text, batch.column(0).to_pylist())


Piece = FileList | TarShard | RowShard

_LISTED_AT_ONCE = 1024


@dataclass(frozen=True)
class PhotoSource:
    """Photos in their order."""

    name: str  # what messages call it
    count: int | None  # None for tar files, which tell only when they are read
    cut: Callable[[int], Iterator[Piece]]
    """Called with a number of photos, yields the pieces from the first. Only lists of files are cut to this size; a
    tar file or a row group is a piece, whatever it holds."""
    root: str | None = None  # folder of this machine that all names are relative to, if they are all files in one
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])  # files that are not photos: how many, by reason

    def names(self) -> Iterator[str]:
        """Names of all photos, as tables will have them."""
        return (name for piece in self.cut(_LISTED_AT_ONCE) for name, _ in piece.read(contents=False))

    def read(self, ahead: int) -> Iterator[NamedPhoto]:
        """All photos; the next `ahead` of them are fetched while the last are used."""
        return read_ahead(chain.from_iterable(piece.read() for piece in self.cut(_LISTED_AT_ONCE)), ahead)

    def fetch_files(self, names: Sequence[str], folder: Path) -> dict[str, Path]:
        """The files of some photos, by name in this order; what is no file of this machine is saved in a folder.

        Of lists no other file is fetched. A photo that cannot be had raises its PhotoError.
        """
        found, wanted = dict[str, Path](), set(names)
        for piece in self.cut(_LISTED_AT_ONCE):
            if isinstance(piece, FileList):
                piece = replace(piece, paths=tuple(path for path in piece.paths if path in wanted), versions=())
            for name, content in piece.read():
                if name not in wanted:
                    continue
                if isinstance(content, PhotoError):
                    raise content
                if isinstance(content, bytes):
                    file = folder / f"{hashlib.sha256(content).hexdigest()[:8]}-{Path(name).name}"
                    file.write_bytes(content)
                    content = file
                found[name] = content
        return {name: found[name] for name in names}


def open_source(text: str, *, path_column: str = PATH_COLUMN) -> PhotoSource:
    """Find out what photos are meant, without reading any.

    The text is the path or URL of a folder of photos, or else of tar or Parquet files; of a photo; of a tar file; of a
    Parquet table that holds photos; or of a CSV or Parquet table with the column `path_column`. Wildcards (`*`, `?`,
    `[..]`, `**`) and braces (`{0000..0003}`, `{a,b}`) stand for several files.
    """
    given, text = text, absolute(text)  # a piece may be read elsewhere
    if not is_url(text) and not shards.is_pattern(text):
        require_path(Path(given))  # says what is missing
        if Path(text).is_dir():
            return _of_folder(Path(text), path_column)
    root, found = shards.list_source(text)
    if len(found) == 1 and shards.locate(root, found[0].path) == text:
        return _of_file(text, root, found[0], path_column)
    return _of_files(text, root, found, path_column)


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
    return hashlib.sha256(json.dumps([type(piece).__name__, asdict(piece)]).encode("ascii")).hexdigest()


def _of_folder(path: Path, path_column: str) -> PhotoSource:
    names, ignored = find_photos(path)
    if not names:
        root, found = shards.list_source(str(path))
        if any(shards.is_shard(file.path) for file in found):
            return _of_files(root, root, found, path_column)
        require_photos(path, names, ignored)
    # Looked up piece by piece: the state of a million files takes a while, and only those who remember need it.
    cut = partial(cut_list, str(path), names, version=lambda name: find_file(str(path / name), name).version)
    return PhotoSource(str(path), len(names), cut, str(path), ignored)


def _of_files(name: str, root: str, there: Sequence[Found], path_column: str) -> PhotoSource:
    """Photos among the files; shards and lists where there is no photo, each with all that it holds."""
    photos = [file for file in there if is_photo_path(file.path)]
    if photos:
        versions = {file.path: file.version for file in photos}
        return PhotoSource(name, len(photos), partial(cut_list, root, versions, version=versions.__getitem__))
    packed = [file for file in there if shards.is_shard(file.path)]
    if not packed:
        seen = f"{len(there)} other files" if there else "nothing"
        raise DataError(
            f"{name} holds no photos: {seen} there. Give a folder of photos, a list (.csv or .parquet with a column "
            "`path`), or shards (.tar, or .parquet with the bytes of photos)"
        )
    with ThreadPoolExecutor(FETCHES_AT_ONCE, "fieldmark-open") as pool:
        sources = list(pool.map(lambda file: _of_file(name, root, file, path_column), packed))
    counts = [source.count for source in sources if source.count is not None]
    count = sum(counts) if len(counts) == len(sources) else None
    return PhotoSource(name, count, lambda size: chain.from_iterable(source.cut(size) for source in sources))


def _of_file(name: str, root: str, file: Found, path_column: str) -> PhotoSource:
    location, lower = shards.locate(root, file.path), file.path.lower()
    if lower.endswith(shards.TAR_SUFFIXES):
        return PhotoSource(name, None, lambda _: iter([TarShard(location, file.path, file.version)]))
    if lower.endswith(".parquet") and (pieces := shards.row_shards(location, file.path, file.version)):
        return PhotoSource(name, sum(piece.num_rows for piece in pieces), lambda _: iter(pieces))
    if lower.endswith(TABLE_SUFFIXES):
        folder = location.rpartition("/")[0] if is_url(location) else str(Path(location).parent)
        count, paths = open_list(location, path_column)
        if not count:
            raise DataError(f"{location} is a list without rows: there is nothing to predict")
        return PhotoSource(name, count, lambda size: cut_list(folder, paths(), size))
    here = None if is_url(root) else root
    return PhotoSource(name, 1, lambda _: iter([FileList(root, (file.path,), (file.version,))]), here)
