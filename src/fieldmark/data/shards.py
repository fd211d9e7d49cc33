"""Photos inside larger files: WebDataset's tar shards, and Parquet tables that hold the bytes of photos.

What was found of a shard is handed on, and what was lost is told: a damaged shard ends with a row of its own that says
why, as nobody can know which photos it held from there on.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from fieldmark.data.folders import is_photo_path
from fieldmark.data.storage import opened
from fieldmark.errors import DataError, PhotoError

NamedPhoto = tuple[str, Path | bytes | PhotoError]
"""A photo's name in tables; and its file, its content, or why there is none."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "content")
KEY_COLUMNS = ("path", "__key__", "key", "file_name", "filename", "name", "id")
_ROWS_AT_ONCE = 32
_READ_AHEAD_BYTES = 2**20


@dataclass(frozen=True)
class TarShard:
    """The photos of a tar file, in its order.

    Attributes:
        location: Path or URL.
        name: What the names of its photos begin with.
        version: As `storage.Found.version`.
    """

    location: str
    name: str
    version: str
    kind: ClassVar[str] = "tar"

    def names(self) -> Iterator[str]:
        """Names of the photos, without reading them."""
        for name, _ in self._members(reads=False):
            yield name

    def read(self) -> Iterator[NamedPhoto]:
        """Names and contents, in one pass from the beginning to the end."""
        return self._members(reads=True)

    def _members(self, *, reads: bool) -> Iterator[NamedPhoto]:
        last = ""
        try:
            with opened(self.location) as file, _open_tar(file) as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    if not member.isfile() or not is_photo_path(path):
                        continue
                    last = f" after {path!r}"
                    yield f"{self.name}/{path}", _content(archive, member, self.name) if reads else b""
                if not archive.is_whole:
                    raise tarfile.ReadError("it has no end")
        except PhotoError as error:
            yield self.name, error
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            yield self.name, PhotoError(self.name, f"is damaged{last}: {error}; photos behind that are lost")


class _WatchedInfo(tarfile.TarInfo):
    """Tells the archive when its closing mark was read: `tarfile` itself takes any nonsense for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _END_MARK:
            tarfile.is_whole = True
            raise


_END_MARK: Any = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class _WatchedTar(tarfile.TarFile):
    tarinfo = _WatchedInfo
    is_whole = False


def _open_tar(file: IO[bytes]) -> _WatchedTar:
    # A stream, packed or not: never seeks, so it suits storage that answers each seek with a request.
    return _WatchedTar.open(fileobj=file, mode="r|*", bufsize=_READ_AHEAD_BYTES)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> bytes | PhotoError:
    try:
        content = archive.extractfile(member)
        return content.read() if content is not None else b""
    except (ConnectionError, TimeoutError):
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        return PhotoError(member.name, f"cannot be read from {shard}: {error}")


@dataclass(frozen=True)
class RowShard:
    """The photos of one row group of a Parquet table, in its order.

    Attributes:
        location: Path or URL of the table.
        name: What the names of its photos begin with.
        version: As `storage.Found.version`.
        group: Number of the row group.
        first_row: Its first row's number in the table.
        num_rows: How many it has.
        image: Column of contents: bytes, or `{bytes, path}` as Hugging Face stores images.
        key: Column that names the photos; None names them by the row's number.
    """

    location: str
    name: str
    version: str
    group: int
    first_row: int
    num_rows: int
    image: str
    key: str | None
    kind: ClassVar[str] = "rows"

    def names(self) -> Iterator[str]:
        """Names of the photos, without reading them."""
        for name, _ in self._rows([self.key] if self.key else [], reads=False):
            yield name

    def read(self) -> Iterator[NamedPhoto]:
        """Names and contents."""
        return self._rows([self.image, *([self.key] if self.key else [])], reads=True)

    def _rows(self, columns: list[str], *, reads: bool) -> Iterator[NamedPhoto]:
        import pyarrow as pa

        number, end = self.first_row, self.first_row + self.num_rows
        try:
            with opened(self.location) as file:
                batches: Any = open_parquet(file, self.name).iter_batches(
                    _ROWS_AT_ONCE, row_groups=[self.group], columns=columns
                )
                for row in (row for batch in batches for row in batch.to_pylist()) if columns else [{}] * self.num_rows:
                    key = _text(row[self.key]) if self.key else str(number)
                    yield f"{self.name}/{key}", _cell(row[self.image], key) if reads else b""
                    number += 1
        except (PhotoError, pa.ArrowException, OSError) as error:
            reason = error.reason if isinstance(error, PhotoError) else f"is damaged: {str(error).splitlines()[0]}"
            for row in range(number, end):
                yield f"{self.name}/{row}", PhotoError(self.name, f"cannot be had: {self.name} {reason}")


def row_shards(location: str, name: str, version: str) -> list[RowShard]:
    """A Parquet table as one shard for each row group; none if it holds no photos, but their paths perhaps.

    Raises:
        DataError: No such table, or it cannot be read.
    """
    import pyarrow as pa

    try:
        with opened(location) as file:
            table = open_parquet(file, location)
            schema, groups = table.schema_arrow, table.metadata
            rows = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    except PhotoError as error:
        raise DataError(f"{location} {error.reason}") from None
    kinds = {field.name: field.type for field in schema}
    image = next((column for column in IMAGE_COLUMNS if column in kinds and _holds_bytes(kinds[column])), None)
    if image is None:
        return []
    key = next((c for c in KEY_COLUMNS if c in kinds and c != image and not pa.types.is_nested(kinds[c])), None)
    starts = [sum(rows[:number]) for number in range(len(rows))]
    return [
        RowShard(location, name, version, number, start, count, image, key)
        for number, (start, count) in enumerate(zip(starts, rows, strict=True))
    ]


def open_parquet(file: IO[bytes], name: str) -> Any:
    """A Parquet file for reading.

    Raises:
        DataError: It is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{name} is not a Parquet table: {str(error).splitlines()[0]}") from None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cell(value: Any, key: str) -> bytes | PhotoError:
    content = value.get("bytes") if isinstance(value, dict) else value
    return PhotoError(key, "has no content in its table") if content is None else content


def _text(key: Any) -> str:
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
