"""Photos to be predicted, wherever they are: folders, lists and shards, on this machine or behind a URL.

A source is cut into pieces that are read one after another here, or each on another machine. A piece is plain data: it
can be sent, and remembered, and its digest changes with the photos that it names.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from glob import glob
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import IO, Any

from fieldmark.data.folders import find_photos, is_photo_path, is_skipped, natural_key, require_photos
from fieldmark.data.index import find_spelling, list_names, path_problem
from fieldmark.data.inspection import map_in_threads
from fieldmark.data.tables import TABLE_SUFFIXES, cell_text, read_csv
from fieldmark.errors import DataError, PhotoError, did_you_mean, first_line
from fieldmark.files import require_path
from fieldmark.inference.storage import Found, fetch, file_version, find_files, is_file, is_url, opened

NamedPhoto = tuple[str, Path | bytes | PhotoError]  # its name in tables; and its file, content, or why there is none
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "content")
KEY_COLUMNS = ("path", "__key__", "key", "file_name", "filename", "name", "id")
_SHARD_ROWS_AT_ONCE = 32
_READ_AHEAD_BYTES = 2**20
# More than any photo within the limit of pixels: a packed archive of a few megabytes may claim members of any size.
MAX_MEMBER_BYTES = 2**30


@dataclass(frozen=True)
class TarShard:
    """The photos of a tar file, in its order."""

    location: str  # path or URL
    name: str  # what the names of its photos begin with
    version: str  # as `storage.Found.version`

    def read(self, *, contents: bool = True) -> Iterator[NamedPhoto]:
        """Names, and contents if asked for, in one pass from the beginning to the end."""
        last = ""
        try:
            # A stream, packed or not: never seeks, so it suits storage that answers each seek with a request.
            with (
                opened(self.location) as file,
                tarfile.open(
                    fileobj=_unpack(file), mode="r|", bufsize=_READ_AHEAD_BYTES, tarinfo=_WatchedInfo
                ) as archive,
            ):
                for member in archive:
                    path = member.name.removeprefix("./")
                    if not member.isfile() or not is_photo_path(path):
                        continue
                    last = f" after {path!r}"
                    yield f"{self.name}/{path}", _read_member(archive, member, self.name) if contents else b""
                if not hasattr(archive, "is_whole"):
                    raise tarfile.ReadError("it has no end")
        except PhotoError as error:
            yield self.name, error
        except (*_DAMAGE, ValueError) as error:
            yield self.name, PhotoError(self.name, f"is damaged{last}: {error}; photos behind that are lost")


def _unpack(file: Any) -> IO[bytes]:
    """The content of a tar file, packed or not, in bounded memory: `tarfile` would hold all that a block becomes."""
    packed: Any = io.BufferedReader(file, _READ_AHEAD_BYTES)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    opener = openers.get(packed.peek(2)[:2])
    return opener(packed) if opener else packed


class _WatchedInfo(tarfile.TarInfo):
    """Reports to the archive that its closing mark was read: `tarfile` itself takes any nonsense for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _END_MARK:
            tarfile.is_whole = True
            raise


_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
_END_MARK: Any = tarfile.EOFHeaderError  # type: ignore[attr-defined]


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> bytes | PhotoError:
    if member.size > MAX_MEMBER_BYTES:
        size = f"{member.size / 2**20:,.0f} MB"
        return PhotoError(member.name, f"takes {size} in {shard}, more than the {MAX_MEMBER_BYTES >> 20} MB of a photo")
    try:
        content = archive.extractfile(member)
        return content.read() if content is not None else b""
    except (ConnectionError, TimeoutError):
        raise
    except _DAMAGE as error:
        return PhotoError(member.name, f"cannot be read from {shard}: {error}")


@dataclass(frozen=True)
class RowShard:
    """The photos of one row group of a Parquet table, in its order."""

    location: str  # path or URL of the table
    name: str  # what the names of its photos begin with
    version: str  # as `storage.Found.version`
    group: int  # number of the row group
    first_row: int  # its number in the table
    num_rows: int
    image: str  # column of contents: bytes, or `{bytes, path}` as Hugging Face stores images
    key: str | None  # column that names the photos; None names them by the row's number

    def read(self, *, contents: bool = True) -> Iterator[NamedPhoto]:
        """Names, and contents if asked for."""
        import pyarrow as pa

        number, end = self.first_row, self.first_row + self.num_rows
        columns = [*([self.image] if contents else []), *([self.key] if self.key else [])]
        try:
            with open_parquet(self.location, self.name) as table:
                batches = table.iter_batches(_SHARD_ROWS_AT_ONCE, row_groups=[self.group], columns=columns)
                for row in (row for batch in batches for row in batch.to_pylist()) if columns else [{}] * self.num_rows:
                    key = (cell_text(row[self.key]) if self.key else "") or str(number)
                    yield f"{self.name}/{key}", _cell(row[self.image], key) if contents else b""
                    number += 1
        except (PhotoError, pa.ArrowException, OSError) as error:
            reason = error.reason if isinstance(error, PhotoError) else f"is damaged: {first_line(error)}"
            for row in range(number, end):
                yield f"{self.name}/{row}", PhotoError(self.name, f"cannot be had: {self.name} {reason}")


def row_shards(location: str, name: str, version: str) -> list[RowShard]:
    """A Parquet table as one shard for each row group; none if it holds no photos, but their paths perhaps."""
    import pyarrow as pa

    with open_parquet(location, location) as table:
        schema, groups = table.schema_arrow, table.metadata
        rows = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    kinds = {field.name: field.type for field in schema}
    image = next((column for column in IMAGE_COLUMNS if column in kinds and _holds_bytes(kinds[column])), None)
    if image is None:
        return []
    key = next((c for c in KEY_COLUMNS if c in kinds and c != image and not pa.types.is_nested(kinds[c])), None)
    starts = accumulate(rows, initial=0)
    return [
        RowShard(location, name, version, number, start, count, image, key)
        for number, (start, count) in enumerate(zip(starts, rows, strict=False))
    ]


@contextmanager
def open_parquet(location: str, name: str) -> Generator[Any]:
    """A Parquet file of this machine or behind a URL for reading; a DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(location) as file:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"{name} is not a Parquet table: {first_line(error)}") from None
        yield table


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cell(value: Any, key: str) -> bytes | PhotoError:
    content = value.get("bytes") if isinstance(value, dict) else value
    return PhotoError(key, "has no content in its table") if content is None else content


PATH_COLUMN = "path"
# A request to an object store takes tens of milliseconds, of which most is waiting.
FETCHES_AT_ONCE = 16
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
        location = locate(self.root, path)
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


def locate(root: str, path: str) -> str:
    """Return where a listed photo is: `path` itself if it is a URL or absolute, else below `root`."""
    if is_url(path) or Path(path).is_absolute():
        return path
    if not is_url(root):
        return str(Path(root) / path)
    return f"{root}{path}" if root.endswith("/") else f"{root}/{path}"


def cut_list(
    root: str, paths: Iterable[str], size: int, version: Callable[[str], str] | None = None
) -> Iterator[FileList]:
    """Paths in pieces of `size`, each with its `version` where there is one."""
    paths = iter(paths)
    while part := tuple(islice(paths, size)):
        yield FileList(root, part, tuple(map(version, part)) if version else ())


def open_list(location: str, path_column: str) -> tuple[int, Callable[[], Iterator[str]]]:
    """The number of rows of a CSV or Parquet table, and what yields the paths in its column, of Parquet bit by bit."""
    if location.lower().endswith(".parquet"):
        with open_parquet(location, location) as table:
            names, num_rows = table.schema_arrow.names, table.metadata.num_rows
        _require_column(location, path_column, names)
        return num_rows, partial(_parquet_paths, location, path_column)
    with opened(location) as file:
        table = read_csv(location, file.read())
    _require_column(location, path_column, list(table.values))
    paths = table.column(path_column, is_text=False)
    return len(paths), partial(iter, paths)


def _require_column(location: str, path_column: str, names: Sequence[str]) -> None:
    if path_column not in names:
        there, hint = ", ".join(map(repr, names)), did_you_mean(path_column, names) or "."
        raise DataError(
            f"{location} has no column {path_column!r}; it has {there}{hint} Say which column of a list holds the "
            "paths with --path-column NAME; a shard needs `image`, as bytes"
        )


def _parquet_paths(location: str, path_column: str) -> Iterator[str]:
    with open_parquet(location, location) as table:
        for batch in table.iter_batches(_LIST_ROWS_AT_ONCE, columns=[path_column]):
            yield from map(cell_text, batch.column(0).to_pylist())


Piece = FileList | TarShard | RowShard

_WILD = re.compile(r"[*?\[{]")
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
    given = text
    if not is_url(text):
        text = str(Path(text).absolute())  # a piece may be read elsewhere
    if _WILD.search(text) and not text.startswith("http") and (is_url(text) or not Path(text).exists()):
        folder = _fixed_folder(text)
        found = [file for pattern in expand_braces(text) for file in _match(pattern, folder)]
        return _of_files(text, folder, found, path_column)
    if not is_url(text):
        require_path(Path(given))  # says what is missing
        if Path(text).is_dir():
            return _of_folder(Path(text), path_column)
    elif not is_file(text):
        return _of_files(text, text, find_files(text), path_column)
    root, _, name = text.rpartition("/")
    return _of_file(text, root or "/", Found(name, file_version(text)), path_column)


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


def _of_folder(path: Path, path_column: str) -> PhotoSource:
    names, ignored = find_photos(path)
    if not names:
        others = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        if any(_is_shard(name) for name in others):
            found = [Found(name, file_version(str(path / name))) for name in others]
            return _of_files(str(path), str(path), found, path_column)
        require_photos(path, names, ignored)
    # Looked up piece by piece: the state of a million files takes a while, and only those who remember need it.
    cut = partial(cut_list, str(path), names, version=lambda name: file_version(str(path / name)))
    return PhotoSource(str(path), len(names), cut, str(path), ignored)


def _match(pattern: str, folder: str) -> list[Found]:
    """Files that a pattern without braces stands for; one that names a single file must be there."""
    if is_url(pattern):
        if _WILD.search(pattern):
            return find_files(folder, pattern)
        return [Found(pattern[len(folder) :].lstrip("/"), file_version(pattern))]
    files = [Path(name) for name in glob(pattern, recursive=True)]  # noqa: PTH207, takes absolute patterns too
    if not files and not _WILD.search(pattern):
        require_path(Path(pattern))
    return [Found(file.relative_to(folder).as_posix(), file_version(str(file))) for file in files if file.is_file()]


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern up to the folder above its first wildcard."""
    fixed = _WILD.split(pattern, maxsplit=1)[0]
    return fixed.rpartition("/")[0] or ("/" if pattern.startswith("/") else "")


def _is_shard(name: str) -> bool:
    return not is_skipped(name) and name.lower().endswith((*TAR_SUFFIXES, ".parquet"))


def _of_files(name: str, root: str, found: Iterable[Found], path_column: str) -> PhotoSource:
    """Photos among the files; shards and lists where there is no photo, each with all that it holds."""
    key = natural_key()
    there = sorted({file.path: file for file in found}.values(), key=lambda file: key(file.path))
    photos = [file for file in there if is_photo_path(file.path)]
    if photos:
        versions = {file.path: file.version for file in photos}
        return PhotoSource(name, len(photos), partial(cut_list, root, versions, version=versions.__getitem__))
    shards = [file for file in there if _is_shard(file.path)]
    if not shards:
        seen = f"{len(there)} other files" if there else "nothing"
        raise DataError(
            f"{name} holds no photos: {seen} there. Give a folder of photos, a list (.csv or .parquet with a column "
            "`path`), or shards (.tar, or .parquet with the bytes of photos)"
        )
    with ThreadPoolExecutor(FETCHES_AT_ONCE, "fieldmark-open") as pool:
        sources = list(pool.map(lambda file: _of_file(name, root, file, path_column), shards))
    counts = [source.count for source in sources if source.count is not None]
    count = sum(counts) if len(counts) == len(sources) else None
    return PhotoSource(name, count, lambda size: chain.from_iterable(source.cut(size) for source in sources))


def _of_file(name: str, root: str, file: Found, path_column: str) -> PhotoSource:
    location, lower = locate(root, file.path), file.path.lower()
    if lower.endswith(TAR_SUFFIXES):
        return PhotoSource(name, None, lambda _: iter([TarShard(location, file.path, file.version)]))
    if lower.endswith(".parquet") and (shards := row_shards(location, file.path, file.version)):
        return PhotoSource(name, sum(shard.num_rows for shard in shards), lambda _: iter(shards))
    if lower.endswith(TABLE_SUFFIXES):
        folder = location.rpartition("/")[0] if is_url(location) else str(Path(location).parent)
        count, paths = open_list(location, path_column)
        if not count:
            raise DataError(f"{location} is a list without rows: there is nothing to predict")
        return PhotoSource(name, count, lambda size: cut_list(folder, paths(), size))
    here = None if is_url(root) else root
    return PhotoSource(name, 1, lambda _: iter([FileList(root, (file.path,), (file.version,))]), here)
