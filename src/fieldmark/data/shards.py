"""Photos in tar files and Parquet tables and behind URLs: one after another for prediction, any by itself for training.

A tar file is scanned once, which gives the place of each photo in it; then a photo is a range of its bytes. What a scan
found is remembered until the file changes. A photo in a table comes with its row group, of which the last two are kept:
in order each is read once.
"""

import bz2
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import posixpath
import re
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from fieldmark.data.columns import Rows, Texts
from fieldmark.data.folders import is_photo_path, is_skipped, natural_key
from fieldmark.data.storage import Found, absolute, fetch, find_file, find_files, find_objects, is_file, is_url, opened
from fieldmark.data.tables import cell_text, open_parquet
from fieldmark.errors import DataError, PhotoError, ResourceError, first_line
from fieldmark.files import require_path, user_folder, write_whole

NamedPhoto = tuple[str, Path | bytes | PhotoError]  # its name in tables; and its file, content, or why there is none
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "content")
KEY_COLUMNS = ("path", "__key__", "key", "file_name", "filename", "name", "id")
# More than any photo within the limit of pixels: a packed archive of a few megabytes may claim members of any size.
MAX_MEMBER_BYTES = 2**30
MOST_LOOKED_UP = 100_000  # photos behind URLs; with a request each, by 16 at a time, some minutes
_NOT_LOOKED_UP = "not looked up"  # as the version of a photo
_SHARD_ROWS_AT_ONCE = 32
FETCHES_AT_ONCE = 16  # a request to a store takes tens of milliseconds, of which most is waiting
_READ_AHEAD_BYTES = 2**20
_SCANS_AT_ONCE = 8
_WILD = re.compile(r"[*?\[{]")
_IN_SHARD = re.compile(r"\.(tar|parquet)/(?=.)", re.IGNORECASE | re.DOTALL)
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """A photo that is no file of this machine: a member of a tar file, a row of a table, or an object by URL."""

    name: str  # as tables name it
    location: str  # absolute path or URL of the file that holds it
    version: str  # as `storage.Found.version`, of that file; "" for a photo that is not there
    num_bytes: int  # of its content; -1 where its storage does not say
    start: int = -1  # its first byte in a tar file, or its number in a row group; -1 for a file of its own
    group: int = -1  # the row group of a table
    column: str = ""  # of contents in the table

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        """What it is called in caches: another name as soon as it may have changed; "" if it is gone."""
        text = f"{self.location}\0{self.name}\0{(self.num_bytes, self.start, self.version)}"
        digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16)
        return digest.hexdigest() if self.version else ""

    def is_file(self) -> bool:
        """Whether it was there when it was looked up."""
        return bool(self.version)

    def read_bytes(self) -> bytes:
        """Its content, by one read or one request; raises PhotoError, and DataError for a storage out of reach."""
        coming = _coming.pop(self, None)
        return self.read_now() if coming is None else coming.result()

    def read_now(self) -> bytes:
        """As `read_bytes`, whether or not it was fetched ahead."""
        if not self.version:
            raise PhotoError(self.name, "has vanished")
        try:
            if self.column:
                with _reading:
                    rows = _read_group(self.location, self.version, self.group, self.column)
                if isinstance(content := _cell(rows[self.start].as_py(), self.name), PhotoError):
                    raise content
                return content
            if is_url(self.location) and self.num_bytes:
                data = fetch(self.location, None if self.num_bytes < 0 else max(self.start, 0), self.num_bytes)
            else:
                with opened(self.location) as file:
                    file.seek(max(self.start, 0))
                    data = file.read(self.num_bytes)
        except PhotoError as error:
            raise PhotoError(self.name, error.reason) from None
        if len(data) < self.num_bytes:
            raise PhotoError(self.name, f"is truncated: {len(data)} of its {self.num_bytes} bytes are there")
        return data


PhotoFile = Path | StoredPhoto
_coming: dict[StoredPhoto, Future[bytes]] = {}  # what is being fetched
_fetchers = ThreadPoolExecutor(FETCHES_AT_ONCE, "fieldmark-fetch")  # starts its threads when there is work
_reading = threading.Lock()


def fetch_ahead(files: Iterable[object]) -> None:
    """Begin to fetch those files that are objects in a store or parts of such: whoever reads them soon waits less."""
    for file in files:
        if isinstance(file, StoredPhoto) and is_url(file.location) and not file.column and file not in _coming:
            _coming[file] = _fetchers.submit(file.read_now)


def expect(numbers: Iterable[int], files: Sequence[object]) -> Iterator[int]:
    """The numbers of files as they are, while the next of these are fetched."""
    ahead: deque[int] = deque()
    for number in numbers:
        fetch_ahead([files[number]])
        ahead.append(number)
        if len(ahead) > 2 * FETCHES_AT_ONCE:
            yield ahead.popleft()
    yield from ahead


@functools.lru_cache(maxsize=2)
def _read_group(location: str, version: str, group: int, column: str) -> Any:
    """The contents in one row group; the version keeps those of a table that has changed apart."""
    import pyarrow as pa

    try:
        with open_parquet(location, location) as table:
            return table.read_row_group(group, [column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise PhotoError(location, f"cannot be had: {location} is damaged: {first_line(error)}") from None


class Scan(NamedTuple):
    """What was found in a shard."""

    photos: list[StoredPhoto]
    notes: list[Any]  # what the .json or else the .cls beside each photo says, as JSON, or its row; else ""
    problem: str = ""  # what is wrong with the shard; photos behind that are not among these


def scan_shards(root: str, shards: Sequence[Found], columns: Sequence[str] = ()) -> list[Scan]:
    """Find the photos of tar files, and of tables with the values of some columns. A packed tar is a DataError."""
    with ThreadPoolExecutor(_SCANS_AT_ONCE, "fieldmark-scan") as pool:
        return list(pool.map(functools.partial(_scan, root, columns=columns), shards))


def _scan(root: str, shard: Found, columns: Sequence[str]) -> Scan:
    location = absolute(locate(root, shard.path))
    if not shard.version:
        return Scan([], [], "has vanished")
    if shard.path.lower().endswith(".parquet"):
        return _scan_table(location, shard, columns)
    text = f"2\0{location}\0{shard.version}".encode(errors="surrogateescape")
    memory = user_folder("shards") / f"{hashlib.blake2b(text, digest_size=16).hexdigest()}.json"
    try:
        members, problem = json.loads(memory.read_text("ascii")), ""
    except (OSError, ValueError):
        members, problem = _scan_tar(location, shard.path)
        if not problem:
            with suppress(OSError, ResourceError):  # it only saves time
                memory.parent.mkdir(parents=True, exist_ok=True)
                write_whole(memory, json.dumps(members))
    photos = [
        StoredPhoto(f"{shard.path}/{name}", location, shard.version, size, start) for name, _, size, start in members
    ]
    return Scan(photos, [note for _, note, *_ in members], problem)


def _scan_tar(location: str, shard: str) -> tuple[list[tuple[str, str, int, int]], str]:
    """Name, note, size and first byte of each photo in a tar file, and what is wrong with the file."""
    places: dict[str, tuple[int, int]] = {}  # of a name that comes twice the last counts, as when it is unpacked
    links: dict[str, str] = {}  # symbolic ones; those that lead out of the file are left out
    notes: dict[str, str] = {}  # by name without its extension
    problem = ""
    try:
        for member, name, content in _read_tar(location, shard, "r:", lambda name: name.endswith((".json", ".cls"))):
            stem, extension = os.path.splitext(name)  # noqa: PTH122
            if isinstance(content, bytes):
                text = content.decode(errors="replace")
                notes[stem] = text if extension == ".json" else notes.get(stem) or json.dumps({"cls": text.strip()})
            elif member.islnk():
                places[name] = places.get(member.linkname.removeprefix("./"), (0, 0))
            elif member.issym():  # often before what it names
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.isfile():
                places[name] = member.size, member.offset_data
    except PhotoError as error:
        problem = error.reason
    found: list[tuple[str, str, int, int]] = []
    for name, place in ({name: places[target] for name, target in links.items() if target in places} | places).items():
        if is_photo_path(name):
            found.append((name, notes.get(name) or notes.get(os.path.splitext(name)[0], ""), *place))  # noqa: PTH122
    return found, problem


def _scan_table(location: str, shard: Found, columns: Sequence[str]) -> Scan:
    """The rows of a table as photos, with the names that prediction gives them, if no two are the same."""
    pieces = row_shards(location, shard.path, shard.version)
    if not pieces:
        raise DataError(f"{location} holds no photos: none of its columns {', '.join(IMAGE_COLUMNS)} holds bytes")
    key = pieces[0].key or ""
    with open_parquet(location, shard.path) as file:
        about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        there = [name for name in dict.fromkeys((key, *columns)) if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read(there).to_pylist() if there else [{}] * file.metadata.num_rows
    for name in there:  # Hugging Face stores the numbers of classes, and their names apart
        if names := about.get("features", {}).get(name, {}).get("names"):
            rows = [{**row, name: names[row[name]] if row[name] in range(len(names)) else None} for row in rows]
    keys = [cell_text(row.get(key)) or str(number) for number, row in enumerate(rows)]
    keys = keys if len({*keys}) == len(keys) else list(map(str, range(len(keys))))
    places = [(row, piece.group, piece.image) for piece in pieces for row in range(piece.num_rows)]
    named = zip((f"{shard.path}/{key}" for key in keys), places, strict=True)
    return Scan([StoredPhoto(name, location, shard.version, -1, *place) for name, place in named], rows)


def locate(root: str, path: str) -> str:
    """Return where a listed photo is: `path` itself if it is a URL or absolute, else below `root`."""
    if is_url(path) or Path(path).is_absolute():
        return path
    if not is_url(root):
        return str(Path(root) / path)
    return f"{root}{path}" if root.endswith("/") else f"{root}/{path}"


def split_path(root: str, path: str) -> tuple[str, str] | None:
    """The path of the shard that a photo lies in, and its name there; None for a photo that is a file of its own."""
    for found in _IN_SHARD.finditer(path):
        shard, name = path[: found.end() - 1], path[found.end() :]
        location = locate(root, shard)
        if is_url(location) or os.path.isfile(location):  # noqa: PTH113
            return shard, name
    return None


@dataclass(frozen=True, eq=False)
class PhotoFiles(Rows[PhotoFile]):
    """The file of each photo of a data set, or its place in a shard or behind a URL, made when it is asked for."""

    root: str
    paths: Texts
    known: Mapping[str, StoredPhoto]  # by path

    def count_bytes(self, path: str) -> int:
        """Size of a photo, -1 where that is not known or the photo is gone."""
        if known := self.known.get(path):
            return known.num_bytes
        try:
            return -1 if "://" in path or is_url(self.root) else os.stat(os.path.join(self.root, path)).st_size  # noqa: PTH116, PTH118
        except (OSError, ValueError):
            return -1

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.paths[index]
        if isinstance(path, Texts):
            return PhotoFiles(self.root, path, self.known)
        location = locate(self.root, path)
        place = StoredPhoto(path, location, _NOT_LOOKED_UP, -1) if is_url(location) else Path(location)
        return self.known.get(path, place)


def locate_photos(root: str, paths: Sequence[str]) -> PhotoFiles:
    """The files of a data set as they are now; beyond `MOST_LOOKED_UP` URLs are taken at their word."""
    paths = Texts.of(paths)
    inside = (paths[number] for number in paths.matching(r"(?is)\.(tar|parquet)/."))
    members = {path: found[0] for path in inside if (found := split_path(root, path))}
    locations = {shard: locate(root, shard) for shard in dict.fromkeys(members.values())}
    found = [find_file(location, shard) for shard, location in locations.items()]
    known = {path: StoredPhoto(path, "", "", -1) for path in members}  # gone, unless it is found
    known |= {photo.name: photo for scan in scan_shards(root, found) for photo in scan.photos}
    far = range(len(paths)) if is_url(root) else paths.matching("://")
    if len(far) <= MOST_LOOKED_UP:
        places = ((paths[number], locate(root, paths[number])) for number in far)
        urls = {path: url for path, url in places if is_url(url) and path not in members}
        for (path, url), file in zip(urls.items(), find_objects(list(urls.values())), strict=True):
            known[path] = StoredPhoto(path, url, file.version, file.num_bytes)
    return PhotoFiles(root, paths, known)


def is_pattern(text: str) -> bool:
    """Whether wildcards or braces in `text` stand for several files."""
    return bool(_WILD.search(text)) and not text.startswith("http") and (is_url(text) or not Path(text).exists())


def list_source(text: str) -> tuple[str, list[Found]]:
    """The folder or URL that names begin at, and the files, in natural order, that a path, URL or pattern stands for.

    All below a folder; those that fit a pattern (`*`, `?`, `[..]`, `**`, `{0000..0003}`, `{a,b}`); or one file.
    """
    if is_pattern(text):
        root = _fixed_folder(text)
        found = [file for pattern in expand_braces(text) for file in _match(pattern, root)]
    elif not is_url(text) and Path(text).is_dir():
        root, files = text, (file for file in Path(text).rglob("*") if file.is_file())
        found = [find_file(str(file), file.relative_to(text).as_posix()) for file in files]
    elif is_url(text) and not is_file(text):
        root, found = text, find_files(text)
    else:
        root, _, name = text.rpartition("/")
        return root or "/", [find_file(text, name)]
    key = natural_key()
    return root, sorted({file.path: file for file in found}.values(), key=lambda file: key(file.path))


def is_shard(name: str) -> bool:
    """Whether a file by this relative path may hold photos."""
    return not is_skipped(name) and name.lower().endswith((*TAR_SUFFIXES, ".parquet"))


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


def _match(pattern: str, folder: str) -> list[Found]:
    """Files that a pattern without braces stands for; one that names a single file must be there."""
    if is_url(pattern):
        if _WILD.search(pattern):
            return find_files(folder, pattern)
        is_file(pattern)  # says what is missing
        return [find_file(pattern, pattern[len(folder) :].lstrip("/"))]
    files = [Path(name) for name in glob(pattern, recursive=True)]  # noqa: PTH207, takes absolute patterns too
    if not files and not _WILD.search(pattern):
        require_path(Path(pattern))
    return [find_file(str(file), file.relative_to(folder).as_posix()) for file in files if file.is_file()]


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern up to the folder above its first wildcard."""
    fixed = _WILD.split(pattern, maxsplit=1)[0]
    return fixed.rpartition("/")[0] or ("/" if pattern.startswith("/") else "")


@dataclass(frozen=True)
class TarShard:
    """The photos of a tar file, in its order."""

    location: str  # path or URL
    name: str  # what the names of its photos begin with
    version: str  # as `storage.Found.version`

    def read(self, *, contents: bool = True) -> Iterator[NamedPhoto]:
        """Names, and contents if asked for, in one pass from the beginning to the end."""
        try:
            # A stream, packed or not: never seeks, so it suits storage that answers each seek with a request.
            for member, name, content in _read_tar(self.location, self.name, "r|", is_photo_path if contents else None):
                full = f"{self.name}/{name}"
                if is_photo_path(name) and (member.islnk() or member.issym()):
                    reason = f"is a link to {member.linkname}, and a tar file is read without going back: unpack it"
                    yield full, PhotoError(full, reason)
                elif member.isfile() and is_photo_path(name):
                    yield full, b"" if content is None else content
        except PhotoError as error:
            yield self.name, PhotoError(self.name, error.reason)


def _read_tar(
    location: str, shard: str, mode: Any, wants: Callable[[str], bool] | None
) -> Iterator[tuple[tarfile.TarInfo, str, bytes | PhotoError | None]]:
    """The members of a tar file with their names, and the content of files whose name is one that somebody `wants`.

    Raises PhotoError where the file ends too early or is damaged, and DataError for a packed one that is to be read
    with seeks, by mode `r:`; mode `r|` reads it as a stream.
    """
    last = ""
    try:
        with opened(location) as file:
            if mode == "r:" and file.read(2) in _PACKED:
                raise DataError(f"{location} is packed, so no photo can be read by itself. Give it as a plain .tar")
            if mode == "r:":
                file.seek(0)
            stream = _unpack(file) if mode == "r|" else file
            with tarfile.open(fileobj=stream, mode=mode, bufsize=_READ_AHEAD_BYTES, tarinfo=_WatchedInfo) as archive:
                members: Any = archive
                for member in members:
                    members.members = []  # which would keep them all
                    name = member.name.removeprefix("./")
                    is_wanted = wants is not None and wants(name) and member.isfile()
                    last = f" after {name!r}" if is_photo_path(name) else last
                    yield member, name, _read_member(archive, member, shard) if is_wanted else None
                if not hasattr(archive, "is_whole"):
                    raise tarfile.ReadError("it has no end")
    except (*_DAMAGE, ValueError) as error:
        raise PhotoError(shard, f"is damaged{last}: {error}; photos behind that are lost") from None


def _unpack(file: Any) -> IO[bytes]:
    """The content of a tar file, packed or not, in bounded memory: `tarfile` would hold all that a block becomes."""
    packed: Any = io.BufferedReader(file, _READ_AHEAD_BYTES)
    opener = _PACKED.get(packed.peek(2)[:2])
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
    places = zip(range(len(rows)), accumulate(rows, initial=0), rows, strict=False)
    return [RowShard(location, name, version, *place, image, key) for place in places]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cell(value: Any, key: str) -> bytes | PhotoError:
    content = value.get("bytes") if isinstance(value, dict) else value
    return PhotoError(key, "has no content in its table") if content is None else content
