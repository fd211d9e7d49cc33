"""Files by URL, through fsspec: listed and fetched. The only module that imports fsspec.

Credentials, endpoints and other options are fsspec's to find: in the environment (`AWS_...`, `FSSPEC_S3_...`), in the
configuration of each provider, or in `~/.config/fsspec`.
"""

import os
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from fieldmark.errors import DataError, MissingExtraError, PhotoError, first_line

# By class name, as none of their packages need be installed: errors that mean no file at all, rather than this one.
_NO_STORAGE = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
                         "TokenRetrievalError", "ProfileNotFound", "EndpointConnectionError", "ConnectTimeoutError",
                         "ClientConnectorError", "ClientConnectorDNSError", "DefaultCredentialsError"})  # fmt: skip
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
_S3_OPTIONS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL; for public data FSSPEC_S3_ANON=true"
_READ_AHEAD_BYTES = 4 * 2**20  # of a file that is read from its beginning: the time of a request is then no matter
_LISTED_FROM = 16  # photos in a folder: a listing names a thousand by one request

_opened: dict[str, Any] = {}
_opening = threading.Lock()


class Found(NamedTuple):
    """A file of a listing."""

    path: str  # relative to what was listed, with "/"
    version: str  # changes when the file does, as far as its storage shows without reading it; "" if it is gone
    num_bytes: int = -1  # -1 where its storage does not say


def is_url(text: str) -> bool:
    """Whether `text` is a URL rather than a path of this machine."""
    return "://" in text


def absolute(location: str | Path) -> str:
    """A URL as it is, or the absolute path of a file or folder of this machine."""
    return str(location) if is_url(str(location)) else os.path.abspath(location)  # noqa: PTH100, follows no links


def resolve(location: str | Path) -> str:
    """A URL as it is, or the absolute path of a file or folder of this machine behind all links."""
    return str(location) if is_url(str(location)) else str(Path(location).resolve())


def fetch(url: str, start: int | None = None, num_bytes: int = 0) -> bytes:
    """The content of a file, or `num_bytes` of it from byte `start`. Calls from several threads are safe.

    Raises PhotoError where this file cannot be read, and DataError where none can: no such bucket, no credentials.
    """
    storage, path = _open(url)
    with _explained(url):
        return storage.cat_file(path, start=start, end=None if start is None else start + num_bytes)


@contextmanager
def opened(location: str) -> Generator[IO[bytes]]:
    """A file of this machine or behind a URL, open for reading; raises as `fetch`, also inside the `with`."""
    with _explained(location):
        if is_url(location):
            storage, path = _open(location)
            file: Any = storage.open(path, "rb", block_size=_READ_AHEAD_BYTES)
        else:
            file = Path(location).open("rb")  # noqa: SIM115, closed below
    with file:
        try:
            yield file
        except Exception as error:
            if problem := _unreachable(location, error):  # while reading; other errors there are the reader's
                raise problem from None
            raise


def is_file(url: str) -> bool:
    """Whether there is a file, rather than a folder, by this URL; a DataError where there is neither."""
    storage, path = _open(url)
    with _listing(url):
        return storage.info(path)["type"] == "file"


def find_files(folder: str, pattern: str = "") -> list[Found]:
    """Every file below a folder; with a `pattern`, a URL that begins with the folder's, those that fit it."""
    storage, root = _open(folder)
    storage.invalidate_cache()  # the list as it is now, not as an earlier call saw it
    with _listing(pattern or folder):
        found: Mapping[str, Any] = (
            storage.glob(storage._strip_protocol(pattern), detail=True) if pattern else storage.find(root, detail=True)
        )
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    return [_found(name[len(root) :].lstrip("/"), info) for name, info in files.items()]


def find_objects(urls: Sequence[str]) -> list[Found]:
    """Files by URL, in this order: by a listing of each folder of which many are asked for, else one by one."""
    folders = Counter(url.rpartition("/")[0] for url in urls if not url.startswith("http"))
    known: dict[str, Found] = {}
    for folder in (folder for folder, count in folders.items() if count > _LISTED_FROM):
        with suppress(DataError):  # said file by file
            known |= {f"{folder}/{file.path}": file for file in find_files(folder)}
    with ThreadPoolExecutor(_LISTED_FROM, "fieldmark-find") as pool:
        return list(pool.map(lambda url: known.get(url) or find_file(url, url), urls))


def find_file(location: str, name: str) -> Found:
    """A file of this machine or behind a URL, called `name`, with "" for its version if it is gone."""
    with suppress(PhotoError, OSError, ValueError), _explained(location):
        if is_url(location):
            storage, path = _open(location)
            return _found(name, storage.info(path))
        info = os.stat(location)  # noqa: PTH116, half the time of Path.stat
        return Found(name, f"{info.st_size} {info.st_mtime_ns}", info.st_size)
    return Found(name, "")


def _found(name: str, info: Mapping[str, Any]) -> Found:
    mark, size = next((info[key] for key in _VERSIONS if info.get(key)), ""), info.get("size")
    return Found(name, f"{size} {mark}", -1 if size is None else int(size))


def _open(url: str) -> tuple[Any, str]:
    """The storage of a URL, opened once for all threads, and the path in it."""
    import fsspec.core

    protocol, _, rest = url.partition("://")
    place = f"{protocol}://{rest.split('/', 1)[0]}"
    try:
        # fsspec's own instances are one per thread, and each would look for credentials anew.
        with _opening, _explained(place):
            if place not in _opened:
                _opened[place] = fsspec.core.url_to_fs(place)[0]
            return _opened[place], _opened[place]._strip_protocol(url)
    except ImportError as error:
        if protocol in ("s3", "s3a"):
            raise MissingExtraError("s3fs", "storage") from None
        raise DataError(f"{protocol}:// needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise DataError(f"{place} cannot be opened: {error}. Check the URL; fsspec lists the protocols") from None


@contextmanager
def _listing(url: str) -> Generator[None]:
    try:
        with _explained(url):
            yield
    except PhotoError as error:
        raise DataError(f"{url} {error.reason}. Check bucket, path and credentials") from None


@contextmanager
def _explained(url: str) -> Generator[None]:
    """Turn what a storage raises into PhotoError for one file, DataError for a storage without any."""
    try:
        yield
    except (ImportError, ValueError):
        raise
    except Exception as error:  # each provider's package has its own
        text = first_line(error)
        if isinstance(error, FileNotFoundError):
            if "bucket does not exist" in text:
                raise DataError(f"{url}: {text}. Check the bucket's name") from None
            raise PhotoError(url, "does not exist") from None
        if problem := _unreachable(url, error):
            raise problem from None
        denied = "permission denied" if isinstance(error, PermissionError) else text
        raise PhotoError(url, f"cannot be read: {denied}") from None


def _unreachable(url: str, error: Exception) -> DataError | None:
    """Return what to raise where an error means that no file of this storage can be had."""
    if type(error).__name__ not in _NO_STORAGE and not isinstance(error, ConnectionError | TimeoutError):
        return None
    where = f" ({_S3_OPTIONS})" if url.startswith("s3") else ""
    return DataError(f"{url} cannot be reached: {first_line(error)}. Check credentials and endpoint{where}")
