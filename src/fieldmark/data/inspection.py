"""What each file really is: decoded to the last pixel, hashed, timed by its EXIF, and remembered until it changes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import sqlite3
import stat
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fieldmark.data.decode import decode
from fieldmark.data.index import PhotoIndex
from fieldmark.errors import PhotoError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


EXIF_IFD, TIME_ORIGINAL, TIME_DIGITIZED = 0x8769, 0x9003, 0x9004
SUBSECONDS = {TIME_ORIGINAL: 0x9291, TIME_DIGITIZED: 0x9292}
HASH_SIDE_PIXELS = 128  # four times the 32 that the hash itself resizes to, so that what it sees is the same


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """What inspection found out about one photo."""

    width: int
    """Upright, in pixels; 0 where the photo cannot be used."""

    height: int
    """Upright, in pixels; 0 where the photo cannot be used."""

    num_bytes: int
    """Size of the file; 0 where there is none."""

    mode: str
    """Pillow's name of the pixel format: RGB, L, P, CMYK, ... "" where it cannot be told."""

    format: str
    """Pillow's name of the file format, whatever the extension says: JPEG, PNG, ... "" where it cannot be told."""

    problem: str
    """"" or the reason why it cannot be used."""

    sha256: str
    """Of the file's bytes, 64 hex digits; "" where they cannot be read."""

    perceptual_hash: str
    """64-bit DCT hash of the upright photo, 16 hex digits; "" where it was not asked for or cannot be had."""

    captured_at: float | None
    """EXIF capture time in seconds, with subseconds, by the camera's own clock; only differences mean something."""


class _Task(NamedTuple):
    number: int
    file: Path
    key: FileKey | None  # None: the file cannot even be looked at
    problem: str


def inspect_photos(
    index: PhotoIndex,
    *,
    background: tuple[int, int, int],
    max_pixels: int,
    with_hash: bool,
    threads: int,
    cache_folder: Path | None,
    progress: Callable[[int], None] | None,
) -> list[PhotoFacts]:
    """Decode every photo fully and note what it is.

    A photo that was inspected before is not opened again while its path, size and modification time are the same.

    Args:
        index: The photos.
        background: As in `decode`.
        max_pixels: As in `decode`.
        with_hash: Compute the perceptual hash: about 2 ms a photo more.
        threads: Photos at once, at least 1.
        cache_folder: Where to remember; None remembers nothing. What cannot be remembered is no error.
        progress: Called in this thread with the number of photos done so far, whenever it grows.

    Returns:
        One entry for each photo, in the order of the index. No photo raises: its `problem` says what is wrong.
    """
    facts: list[PhotoFacts | None] = [None] * len(index.photos)
    tasks: list[_Task] = []
    # Another limit, or another Pillow, may judge the same file differently.
    with open_memory(cache_folder, f"{_pillow_version()} {background} {max_pixels}") as memory, _quiet_pillow():
        for number, file in enumerate(index.files()):
            task = _look(number, file)
            known = memory.get(task.key) if task.key else None
            if known is None or (with_hash and not known["perceptual_hash"]):
                tasks.append(task)
            else:
                facts[number] = PhotoFacts(**known)
        num_done = len(facts) - len(tasks)
        if progress and num_done:
            progress(num_done)
        for task, found in _inspect_all(tasks, background, max_pixels, with_hash, threads):
            facts[task.number] = found
            # A problem may pass without the file changing: permissions, memory, a decoder that was not installed.
            if task.key and not found.problem:
                memory.put(task.key, found)
            num_done += 1
            if progress:
                progress(num_done)
    return [fact for fact in facts if fact is not None]


def perceptual_hash(photo: NDArray[np.uint8]) -> str:
    """The photo's 64-bit perceptual hash as 16 hex digits; close photos differ in few bits.

    Args:
        photo: (H, W, 3) uint8, upright.

    Source:
        pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2), as
        in the library ImageHash. Its own resize reads every pixel, so large photos are averaged down before.
    """
    import imagehash
    from PIL import Image

    image = Image.fromarray(photo)
    factor = min(image.size) // HASH_SIDE_PIXELS
    return str(imagehash.phash(image.reduce(factor) if factor > 1 else image))


def capture_time(exif: Any) -> float | None:
    """When the shutter opened, in seconds since 1970 by the camera's clock, or None where EXIF does not tell.

    The plain DateTime tag does not count: it is the time of the last change, and one for all after a batch export.

    Args:
        exif: Pillow's `Image.Exif`.
    """
    try:
        details = exif.get_ifd(EXIF_IFD)
        for tag, subseconds in SUBSECONDS.items():
            text = str(details.get(tag, "")).strip("\0 ")
            if not text:
                continue
            moment = datetime.strptime(text, "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
            digits = re.match(r"\d+", str(details.get(subseconds, "")))
            return moment.timestamp() + (float(f"0.{digits[0]}") if digits else 0.0)
    except Exception:  # whatever is wrong with its EXIF, the photo itself is good
        return None
    return None


def _look(number: int, file: Path) -> _Task:
    try:
        info = file.stat()
    except (OSError, ValueError) as error:
        return _Task(number, file, None, _reading_problem(error))
    if not stat.S_ISREG(info.st_mode):  # to open a pipe would be to wait for ever
        return _Task(number, file, None, "is not a regular file")
    return _Task(number, file, FileKey(str(file.absolute()), info.st_size, info.st_mtime_ns), "")


def _inspect_all(
    tasks: list[_Task], background: tuple[int, int, int], max_pixels: int, with_hash: bool, threads: int
) -> Iterator[tuple[_Task, PhotoFacts]]:
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(lambda task: (task, _inspect(task, background, max_pixels, with_hash)), tasks)
    finally:  # also when the caller has had enough
        pool.shutdown(cancel_futures=True)


def _inspect(task: _Task, background: tuple[int, int, int], max_pixels: int, with_hash: bool) -> PhotoFacts:
    facts = PhotoFacts(0, 0, task.key.num_bytes if task.key else 0, "", "", task.problem, "", "", None)
    if task.problem:
        return facts
    try:
        data = task.file.read_bytes()
        facts = replace(facts, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        photo = decode(data, background=background, max_pixels=max_pixels, name=str(task.file))
        hashed = perceptual_hash(photo) if with_hash else ""
    except OSError as error:
        return replace(facts, problem=_reading_problem(error))
    except PhotoError as error:
        return replace(facts, problem=error.reason)
    except MemoryError:
        return replace(facts, problem="needs more memory than there is")
    mode, kind, captured_at = _read_header(data)
    height, width = photo.shape[:2]
    return replace(
        facts, width=width, height=height, mode=mode, format=kind, perceptual_hash=hashed, captured_at=captured_at
    )


def _reading_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "has vanished"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _read_header(data: bytes) -> tuple[str, str, float | None]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode, image.format or "", capture_time(image.getexif())
    except Exception:  # the decoder that read the pixels is not always Pillow
        return "", "", None


@contextlib.contextmanager
def _quiet_pillow() -> Generator[None]:
    """Keep in what Pillow warns of: large photos and odd EXIF. `problem` says what matters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _pillow_version() -> str:
    import PIL

    return PIL.__version__


FORMAT = 1
"""Raised when the meaning of an entry changes; older entries are then not found."""

ENTRIES_PER_COMMIT = 500


class FileKey(NamedTuple):
    """A file as it was at one time."""

    path: str
    num_bytes: int
    mtime_ns: int


class Memory:
    """Facts about files by path, size and modification time. Failures to read or write it only make it forget."""

    def __init__(self, database: sqlite3.Connection | None, settings: str) -> None:
        self._database = database
        self._settings = f"{FORMAT} {settings}"
        self._num_waiting = 0

    def get(self, key: FileKey) -> dict[str, Any] | None:
        """What `put` was given for the same file under the same settings, as a dict."""
        if self._database is None:
            return None
        try:
            found = self._database.execute(
                "SELECT stamp, facts FROM files WHERE name = ?", (self._name(key),)
            ).fetchone()
            return json.loads(found[1]) if found and found[0] == _stamp(key) else None
        except (sqlite3.Error, ValueError):
            return None

    def put(self, key: FileKey, facts: Any) -> None:
        """Keep a dataclass of plain values, in place of what was kept for the same path and settings."""
        if self._database is None:
            return
        entry = (self._name(key), _stamp(key), json.dumps(dataclasses.asdict(facts)))
        try:
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", entry)
            self._num_waiting += 1
            if self._num_waiting % ENTRIES_PER_COMMIT == 0:  # so that an interrupted inspection goes on from here
                self._database.commit()
        except sqlite3.Error:  # the disk is full, or another command writes
            self.close()

    def close(self) -> None:
        """Keep what is waiting and let go of the file."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.commit()
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _name(self, key: FileKey) -> bytes:
        return hashlib.sha256(self._settings.encode() + b"\0" + os.fsencode(key.path)).digest()


@contextlib.contextmanager
def open_memory(folder: Path | None, settings: str) -> Generator[Memory]:
    """Open the memory in `folder` for a `with` block.

    Args:
        folder: Made if absent; None, or a folder that cannot be written, remembers nothing.
        settings: Facts found under other settings are not found under these.
    """
    memory = Memory(_open(folder) if folder else None, settings)
    try:
        yield memory
    finally:
        memory.close()


def _open(folder: Path) -> sqlite3.Connection | None:
    file = folder / "photos.sqlite"
    for _ in range(2):
        database = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(file, timeout=5)
            database.execute("CREATE TABLE IF NOT EXISTS files (name BLOB PRIMARY KEY, stamp TEXT, facts TEXT)")
            return database
        except sqlite3.OperationalError:  # busy, read-only or full: not ours to delete
            _close(database)
            return None
        except (sqlite3.DatabaseError, OSError):  # not a database, or half of one: worth no more than its time
            _close(database)
            with contextlib.suppress(OSError):
                file.unlink()
    return None


def _close(database: sqlite3.Connection | None) -> None:
    if database is not None:
        database.close()


def _stamp(key: FileKey) -> str:
    return f"{key.num_bytes} {key.mtime_ns}"
