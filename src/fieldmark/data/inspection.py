"""What each file really is: decoded to the last pixel, hashed, timed by its EXIF, and remembered until it changes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import sqlite3
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fieldmark.data.decode import DecodeSpec, Pixels, decode, explain_reading, read_bytes, silence_pillow
from fieldmark.data.index import PhotoIndex
from fieldmark.errors import PhotoError
from fieldmark.progress import Progress

FORMAT = 2  # raised when the meaning of an entry changes; older entries are then not found
ENTRIES_PER_COMMIT = 500
HASH_SIDE_PIXELS = 128  # four times the 32 that the hash itself resizes to, so that what it sees is the same
EXIF_IFD, TIME_ORIGINAL, TIME_DIGITIZED = 0x8769, 0x9003, 0x9004
SUBSECONDS = {TIME_ORIGINAL: 0x9291, TIME_DIGITIZED: 0x9292}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """Holds what inspection found out about one photo; "" stands for what cannot be known or was not asked for."""

    width: int  # upright, in pixels; 0 where the photo cannot be used
    height: int
    num_bytes: int  # size of the file; 0 where there is none
    mode: str  # Pillow's name of the pixel format: RGB, L, P, CMYK, ...
    format: str  # Pillow's name of the file format, whatever the extension says: JPEG, PNG, ...
    problem: str  # why the photo cannot be used; "" if it can
    sha256: str  # of the file's bytes, 64 hex digits
    perceptual_hash: str  # 64-bit DCT hash of the upright photo, 16 hex digits
    captured_at: float | None  # EXIF capture time in seconds by the camera's own clock; only differences mean something
    color_profile: str = ""  # name of an ICC profile other than sRGB, which decoding ignores


_UNKNOWN = PhotoFacts(0, 0, 0, "", "", "", "", "", None)


def inspect_photos(
    index: PhotoIndex,
    *,
    decoding: DecodeSpec,
    with_hash: bool,
    threads: int,
    cache_folder: Path | None,
    progress: Progress,
) -> list[PhotoFacts]:
    """Decode every photo fully and note what it is, in the order of the index; no photo raises.

    A photo that was inspected before is not opened again while its path, size and modification time are the same. No
    `cache_folder` remembers nothing, and what cannot be remembered is no error. The hash takes about 2 ms a photo more.
    """
    import PIL

    files = index.files()
    facts: dict[int, PhotoFacts] = {}
    stamps: dict[int, str] = {}
    # Another limit, or another Pillow, may accept what this one refuses.
    settings = f"{PIL.__version__} {decoding.background} {decoding.max_pixels}"
    with contextlib.closing(Memory(cache_folder, settings)) as memory:
        for number, file in enumerate(files):
            stamps[number], problem = _look(file)
            known = memory.get(file, stamps[number])
            if problem:
                facts[number] = dataclasses.replace(_UNKNOWN, problem=problem)
            elif known is not None and (known.perceptual_hash or not with_hash):
                facts[number] = known
        progress.start(len(files), len(facts))
        new = [number for number in range(len(files)) if number not in facts]
        results = map_in_threads(lambda number: _inspect(files[number], decoding, with_hash), new, threads)
        for number, found in zip(new, results, strict=True):
            facts[number] = found
            # A problem may pass without the file changing: permissions, memory, a decoder that was not installed.
            if not found.problem:
                memory.put(files[number], stamps[number], found)
            progress.advance(1)
    return [facts[number] for number in range(len(files))]


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Do `work` on each item by threads, in order, a few ahead of the consumer."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the consumer has had enough
        pool.shutdown(cancel_futures=True)


def perceptual_hash(photo: Pixels) -> str:
    """The 64-bit hash of an (H, W, 3) upright photo as 16 hex digits; close photos differ in few bits.

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
    """When the shutter opened, in seconds since 1970 by the camera's clock, by Pillow's `Image.Exif`; None if unknown.

    The plain DateTime tag does not count: it is the time of the last change, and one for all after a batch export.
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


def _look(file: Path) -> tuple[str, str]:
    """The stamp of a file, by which a change is seen, and what is wrong with it before it is opened."""
    try:
        info = file.stat()
    except (OSError, ValueError) as error:
        return "", explain_reading(error)
    # To open a pipe would be to wait for ever.
    return f"{info.st_size} {info.st_mtime_ns}", "" if stat.S_ISREG(info.st_mode) else "is not a regular file"


def _inspect(file: Path, decoding: DecodeSpec, with_hash: bool) -> PhotoFacts:
    facts = _UNKNOWN
    try:
        data = read_bytes(file)
        facts = dataclasses.replace(facts, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        photo = decode(data, background=decoding.background, max_pixels=decoding.max_pixels, name=str(file))
        hashed = perceptual_hash(photo) if with_hash else ""
    except PhotoError as error:
        return dataclasses.replace(facts, problem=error.reason)
    height, width = photo.shape[:2]
    return dataclasses.replace(facts, width=width, height=height, perceptual_hash=hashed, **_read_header(data))


def _read_header(data: bytes) -> dict[str, Any]:
    from PIL import Image

    silence_pillow()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {
                "mode": image.mode,
                "format": image.format or "",
                "captured_at": capture_time(image.getexif()),
                "color_profile": _name_profile(image.info.get("icc_profile") or b""),
            }
    except Exception:  # the decoder that read the pixels is not always Pillow
        return {}


@functools.lru_cache(maxsize=64)  # cameras write the same few profiles
def _name_profile(profile: bytes) -> str:
    """The name of an ICC profile that is not sRGB; "" where there is none, or none that can be read."""
    from PIL import ImageCms

    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, OSError):
        return ""
    return "" if "srgb" in name.lower() else name[:80] or "unnamed"


class Memory:
    """What is known of files by path, size and modification time. A failure to read or write only makes it forget.

    The folder is made if absent; None remembers nothing. Facts are not found under other settings than their own.
    """

    def __init__(self, folder: Path | None, settings: str) -> None:
        self._database = _open_database(folder) if folder else None
        self._settings = f"{FORMAT} {settings}".encode()
        self._num_written = 0

    def get(self, file: Path, stamp: str) -> PhotoFacts | None:
        """Return what `put` was given for a file of the same path and stamp, under the same settings."""
        if self._database is None:
            return None
        try:
            query = "SELECT stamp, facts FROM files WHERE name = ?"
            found = self._database.execute(query, (self._name(file),)).fetchone()
            if found is None or found[0] != _seal(stamp, str(found[1])):
                return None
            return PhotoFacts(**json.loads(found[1]))
        except (sqlite3.Error, ValueError):
            return None

    def put(self, file: Path, stamp: str, facts: PhotoFacts) -> None:
        """Keep facts, in place of what was kept for the same path and settings."""
        if self._database is None:
            return
        text = json.dumps(dataclasses.asdict(facts))
        try:
            entry = (self._name(file), _seal(stamp, text), text)
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", entry)
            self._num_written += 1
            if self._num_written % ENTRIES_PER_COMMIT == 0:  # so that an interrupted inspection goes on from here
                self._database.commit()
        except sqlite3.Error:  # the disk is full, or another command writes
            self.close()

    def close(self) -> None:
        """Keep what was put and let go of the database."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.commit()
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _name(self, file: Path) -> bytes:
        return hashlib.sha256(self._settings + b"\0" + os.fsencode(file.absolute())).digest()


def _seal(stamp: str, facts: str) -> str:
    """The stamp of a file, and a checksum, as SQLite has none: a flipped bit is another stamp."""
    return f"{stamp} {zlib.crc32(facts.encode())}"


def _open_database(folder: Path) -> sqlite3.Connection | None:
    file = folder / "photos.sqlite"
    for _ in range(2):
        database = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(file, timeout=5)
            database.execute("CREATE TABLE IF NOT EXISTS files (name BLOB PRIMARY KEY, stamp TEXT, facts TEXT)")
            return database
        except (sqlite3.Error, OSError) as error:
            if database is not None:
                database.close()
            if isinstance(error, sqlite3.OperationalError):  # busy, read-only or full: not ours to delete
                return None
            with contextlib.suppress(OSError):  # not a database, or half of one: it only saved time
                file.unlink()
    return None
