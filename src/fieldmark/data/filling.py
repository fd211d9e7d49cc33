"""Writing the cache: what is missing, and one writer at a time.

Shape letters: N photos.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.packs import KEY_BYTES, PackWriter, clean, load_packs, remove
from fieldmark.data.presets import Preset
from fieldmark.errors import PhotoError

_PACK_BYTES = 128 * 2**20  # what a kill while writing loses at most
_WAIT_SECONDS = 3600.0
_GIGA = 1e9
T = TypeVar("T")

CACHED = np.dtype(
    [
        ("pack", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("checksum", "<u4"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
    ]
)
"""Where a photo lies (`pack` is -1 for nowhere), and what its original was when it was put there."""


class Progress(Protocol):
    """Where filling tells how far it is."""

    def start(self, total: int, done: int) -> None:
        """Work on `total` photos begins, `done` of which were there before."""
        ...

    def advance(self, n: int) -> None:
        """`n` more photos are done."""
        ...

    def message(self, text: str) -> None:
        """One line that stays."""
        ...


class Matched(NamedTuple):
    """What a folder holds of a data set."""

    entries: NDArray[np.void]  # (N,) of CACHED
    packs: list[Path]
    num_bytes: int


class CacheFolder:
    """The photos of one data set in one form, on disk.

    Args:
        files: N originals, absolute.
        folder: Where their packs lie.
        preset: Their form.
    """

    def __init__(self, files: Sequence[Path], folder: Path, preset: Preset) -> None:
        self._files = files
        self.folder = folder
        self.preset = preset

    def match(self) -> Matched:
        """What is there of the photos as they are now."""
        places: dict[bytes, tuple[int, int]] = {}
        tables = load_packs(self.folder)
        for pack, rows in enumerate(tables.values()):
            for row, key in enumerate(rows["key"]):
                places[bytes(key)] = (pack, row)
        entries = np.zeros(len(self._files), CACHED)
        entries["pack"] = -1
        all_rows = list(tables.values())
        for number, file in enumerate(self._files):
            identity = _identity(file)
            place = places.get(_key(file, identity)) if identity else None
            if identity and place:
                row = all_rows[place[0]][place[1]]
                where = tuple(row[name] for name in ("offset", "length", "height", "width", "checksum"))
                entries[number] = (place[0], *where, *identity)
        found = entries["length"][entries["pack"] >= 0]
        return Matched(entries, list(tables), int(found.sum()))

    def fill(
        self, *, max_pixels: int, room_bytes: int, threads: int, progress: Progress
    ) -> tuple[str, list[tuple[str, str]]]:
        """Write the photos that are missing, as far as there is room.

        Waits while another process writes to the same folder.

        Returns:
            What kept it from being complete ("" for nothing), and (path, reason) of broken photos.
        """
        from filelock import Timeout

        broken: list[tuple[str, str]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _only_writer(self.folder, progress):
                clean(self.folder)
                problem = self._write_missing(max_pixels, room_bytes, threads, progress, broken)
        except Timeout:
            problem = "another process has been writing it for more than an hour"
        except OSError as error:
            is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            problem = "the disk is full" if is_full else f"{self.folder} cannot be written: {error.strerror or error}"
        return problem, broken

    def _write_missing(
        self, max_pixels: int, room_bytes: int, threads: int, progress: Progress, broken: list[tuple[str, str]]
    ) -> str:
        matched = self.match()
        missing = np.flatnonzero(matched.entries["pack"] < 0).tolist()
        if not missing:
            return ""
        room = room_bytes - self._make_room(matched, room_bytes)
        writer = PackWriter(self.folder, pack_bytes=_PACK_BYTES)
        progress.start(len(self._files), len(self._files) - len(missing))
        problem = ""
        try:
            for made in _in_order(lambda number: self._make(number, max_pixels), missing, threads):
                if isinstance(made, PhotoError):
                    broken.append((made.path, made.reason))
                elif made is not None:
                    key, height, width, data = made
                    room -= len(data)
                    if room < 0:
                        problem = f"cache.disk_gigabytes = {room_bytes / _GIGA:g} is used up"
                        break
                    writer.add(key, height, width, data)
                progress.advance(1)
        except OSError:
            raise
        except BaseException:  # Ctrl-C: keep what is done
            with contextlib.suppress(OSError):
                writer.seal()
            raise
        writer.seal()
        return problem

    def _make(self, number: int, max_pixels: int) -> tuple[bytes, int, int, bytes | memoryview] | PhotoError | None:
        """One photo's key and content; None if it vanished at that moment."""
        file = self._files[number]
        # Taken first: a file that changes while it is read lies under a key that will not be asked for again.
        identity = _identity(file)
        try:
            made = self.preset.make(file, max_pixels)
        except PhotoError as error:
            return error
        return (_key(file, identity), *made) if identity else None

    def _make_room(self, matched: Matched, room_bytes: int) -> int:
        """Bytes of the packs that stay. Packs of photos that are gone go too, once more than half the room is taken."""
        taken = {pack: pack.stat().st_size for pack in matched.packs}
        if sum(taken.values()) > room_bytes / 2:
            used = set(matched.entries["pack"].tolist())
            for place, pack in enumerate(matched.packs):
                if place not in used:
                    remove(pack)
                    del taken[pack]
        return sum(taken.values())


@contextlib.contextmanager
def _only_writer(folder: Path, progress: Progress) -> Generator[None]:
    """Hold the folder's lock. The system takes it back from a process that is killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "writing.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.message("cache: another process is writing it; waiting until it is done")
        lock.acquire(timeout=_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(file)  # noqa: PTH116  # half the time of Path.stat, for every photo
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _key(file: Path, identity: tuple[int, int] | None) -> bytes:
    text = f"{file}\0{identity}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def _in_order(make: Callable[[int], T], numbers: Sequence[int], threads: int) -> Iterator[T]:
    """`make` of each number by threads, in order, a few ahead of the consumer."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(max(threads, 1), "fieldmark-cache") as pool:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
