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
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.decode import DecodeSpec, Pixels, explain_reading, read_bytes, silence_pillow
from fieldmark.errors import PhotoError
from fieldmark.progress import Progress

FORMAT = 2  # raised when the meaning of an entry changes; older entries are then not found
ENTRIES_PER_COMMIT = 500
SAMPLED_HEADERS = 256  # of new photos, from which the sizes of all are estimated before they are decoded
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


class Inspection:
    """The facts of N photos, noted when somebody reads their pixels: so what needs these decodes each photo only once.

    Any number of threads may read. A photo that was inspected before is not opened for its facts while its path, size
    and modification time are the same: they are remembered in `cache_folder`, unless it is None, from the end of the
    `with` on. What cannot be remembered is no error. The hash takes about 2 ms a photo more.
    """

    def __init__(
        self, files: Sequence[Path], *, decoding: DecodeSpec, with_hash: bool, cache_folder: Path | None
    ) -> None:
        import PIL

        # Another limit, or another Pillow, may accept what this one refuses.
        settings = f"{PIL.__version__} {decoding.background} {decoding.max_pixels}"
        self.files = files
        self._decoding, self._with_hash = decoding, with_hash
        self._memory = Memory(cache_folder, settings)
        self._stamps: list[str] = []
        self._facts: dict[int, PhotoFacts] = {}
        for number, file in enumerate(files):
            stamp, problem = _look(file)
            self._stamps.append(stamp)
            known = self._memory.get(file, stamp)
            if problem:
                self._facts[number] = dataclasses.replace(_UNKNOWN, problem=problem)
            elif known is not None and (known.perceptual_hash or not with_hash):
                self._facts[number] = known

    def estimate_sizes(self) -> NDArray[np.int64]:
        """(N, 2) width and height in pixels; of photos not yet read those of a sample, as they lie; 0 if broken."""
        from PIL import Image

        silence_pillow()
        sizes = np.zeros((len(self.files), 2), np.int64)
        for number, facts in self._facts.items():
            sizes[number] = facts.width, facts.height
        new, sample = self._list_new(), [(0, 0)]
        for number in new[:: len(new) // SAMPLED_HEADERS + 1]:
            with contextlib.suppress(Exception), Image.open(self.files[number]) as image:  # what is wrong shows later
                sample.append(image.size)
        sizes[new] = np.resize(sample[1:] or sample, (len(new), 2))
        return sizes

    def _list_new(self) -> list[int]:
        return [number for number in range(len(self.files)) if number not in self._facts]

    def read(self, number: int, *, min_short_side: float | None = None) -> Pixels:
        """The pixels of a photo as `DecodeSpec.read` gives them, which notes its facts; raises PhotoError."""
        facts = self._facts.get(number)
        if facts is None:
            return self._inspect(number, min_short_side)
        if facts.problem:
            raise PhotoError(str(self.files[number]), facts.problem)
        return self._decoding.read(self.files[number], min_short_side=min_short_side)

    def _inspect(self, number: int, min_short_side: float | None) -> Pixels:
        file, facts = self.files[number], _UNKNOWN
        try:
            data = read_bytes(file)
            facts = dataclasses.replace(facts, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            photo, width, height = self._decoding.decode(data, min_short_side=min_short_side, name=str(file))
            hashed = perceptual_hash(photo) if self._with_hash else ""
        except PhotoError as error:
            # Not remembered: it may pass without the file changing (permissions, memory, a decoder that is installed).
            self._facts[number] = dataclasses.replace(facts, problem=error.reason)
            raise
        facts = dataclasses.replace(facts, width=width, height=height, perceptual_hash=hashed, **_read_header(data))
        self._facts[number] = facts
        self._memory.put(file, self._stamps[number], facts)
        return photo

    def finish(self, *, threads: int, progress: Progress) -> list[PhotoFacts]:
        """Read the photos that nobody has read, and give the N facts in order; no photo raises."""
        new = self._list_new()
        progress.start(len(self.files), len(self.files) - len(new))
        for _ in map_in_threads(self._note, new, threads):
            progress.advance(1)
        return [self._facts[number] for number in range(len(self.files))]

    def _note(self, number: int) -> None:
        with contextlib.suppress(PhotoError):
            self.read(number, min_short_side=None if self._with_hash else 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._memory.close()


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
        self._lock = threading.Lock()

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
        """Keep facts, in place of what was kept for the same path and settings; in any thread."""
        text = json.dumps(dataclasses.asdict(facts))
        entry = (self._name(file), _seal(stamp, text), text)
        with self._lock:
            if self._database is None:
                return
            try:
                self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", entry)
                # So that an interrupted inspection goes on from here.
                if self._database.total_changes % ENTRIES_PER_COMMIT == 0:
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
            database = sqlite3.connect(file, timeout=5, check_same_thread=False)
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
