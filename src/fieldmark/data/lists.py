"""Lists of photos: a column `path` of a CSV or Parquet table, whose entries are paths or URLs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

from fieldmark.data.folders import close_match
from fieldmark.data.shards import NamedPhoto, open_parquet
from fieldmark.data.storage import fetch, is_url, opened
from fieldmark.data.tables import read_csv
from fieldmark.errors import DataError, PhotoError

PATH_COLUMN = "path"
# A request to an object store takes tens of milliseconds, of which most is waiting.
FETCHES_AT_ONCE = 16
_FETCHED_AHEAD = 64
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class FileList:
    """Photos that are files of their own.

    Attributes:
        root: Folder or URL that relative paths begin at.
        paths: The photos, as tables name them: relative to the root, absolute, or URLs. "" is a gap in a list.
        versions: `storage.Found.version` of each where a listing told it, else none at all.
    """

    root: str
    paths: tuple[str, ...]
    versions: tuple[str, ...]
    kind: ClassVar[str] = "files"

    def names(self) -> Iterator[str]:
        """Names of the photos."""
        return iter(self.paths)

    def read(self) -> Iterator[NamedPhoto]:
        """Names, and files of this machine unread or what was fetched of others.

        Raises:
            DataError: Nothing can be fetched from a storage at all.
        """
        with ThreadPoolExecutor(FETCHES_AT_ONCE, "fieldmark-fetch") as pool:
            for start in range(0, len(self.paths), _FETCHED_AHEAD):
                part = self.paths[start : start + _FETCHED_AHEAD]
                yield from zip(part, pool.map(self._fetch, part), strict=True)

    def _fetch(self, path: str) -> Path | bytes | PhotoError:
        if not path:
            return PhotoError("", "has no path in the list")
        location = locate(self.root, path)
        if not is_url(location):
            return Path(location)
        try:
            return fetch(location)
        except PhotoError as error:
            return error


def locate(root: str, path: str) -> str:
    """Where a listed photo is: `path` itself if it is a URL or absolute, else below `root`."""
    if is_url(path) or Path(path).is_absolute():
        return path
    if not is_url(root):
        return str(Path(root) / path)
    return f"{root}{path}" if root.endswith("/") else f"{root}/{path}"


def split_list(root: str, paths: Iterator[str], size: int) -> Iterator[FileList]:
    """A list of any length in pieces of `size`."""
    while part := tuple(islice(paths, size)):
        yield FileList(root, part, ())


def open_list(location: str, root: str) -> tuple[int, Callable[[], Iterator[str]]]:
    """A table of paths.

    Args:
        location: Path or URL of a CSV or Parquet table.
        root: Folder or URL that the table lies in.

    Returns:
        Number of rows; and what yields the column `path` from the beginning. Of Parquet a part at a time is in memory.

    Raises:
        DataError: No such table, or it has no column `path`.
    """
    try:
        if location.lower().endswith(".parquet"):
            with opened(location) as file:
                table = open_parquet(file, location)
                names, num_rows = table.schema_arrow.names, table.metadata.num_rows
            if PATH_COLUMN not in names:
                there = ", ".join(map(repr, names))
                hint = close_match(PATH_COLUMN, names) or ". A list needs `path`; a shard needs `image`, as bytes"
                raise DataError(f"{location} has no column {PATH_COLUMN!r}; it has {there}{hint}")
            return num_rows, partial(_parquet_paths, location)
        with opened(location) as file:
            paths = read_csv(location, file.read()).column(PATH_COLUMN)
    except PhotoError as error:
        raise DataError(f"{location} {error.reason}") from None
    return len(paths), partial(iter, paths)


def _parquet_paths(location: str) -> Iterator[str]:
    with opened(location) as file:
        for batch in open_parquet(file, location).iter_batches(_ROWS_AT_ONCE, columns=[PATH_COLUMN]):
            for value in batch.column(0).to_pylist():
                text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
                yield "" if text is None else str(text)
