"""Photos kept at the size that training needs, decoded or as small JPEGs, for the next epoch and the next run.

A photo is found again by its path, size and modification time. It is written whole or not at all, checked when a
process reads it for the first time, and counts as absent when anything is wrong: the cache can cost time, never a
wrong pixel.

Shape letters: N photos; H, W height and width of a cached photo, in pixels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.decode import RGB, Pixels, decode
from fieldmark.data.packs import KEY_BYTES, PackReader, PackWriter, clean, load_packs, remove
from fieldmark.errors import PhotoError

FORMAT = 1
"""Raised when the content or the meaning of a pack changes; older packs are then not found."""

_GIGA = 1e9


@dataclass(frozen=True)
class CacheReport:
    """What the cache did, what it holds and what it cost. `str()` is one readable sentence."""

    mode: str
    """`uint8`, `jpeg` or `off`."""

    photos: int
    """Photos that are cached now."""

    total: int
    """Photos that were asked for."""

    bytes: int
    """Of the cached photos on disk."""

    seconds: float
    """From asking to having."""

    hits: int
    """Photos that were cached before."""

    reason: str
    """Why this mode, or why not all photos are there."""

    broken: tuple[tuple[str, str], ...] = ()
    """(path, reason) of photos that cannot be decoded; they are not cached."""

    def __str__(self) -> str:
        if self.mode == "off":
            return f"cache: off ({self.reason})"
        broken = f", {len(self.broken)} broken" if self.broken else ""
        return (
            f"cache: {self.mode}, {self.photos} of {self.total} photos{broken}, {self.bytes / _GIGA:.2f} GB, "
            f"{self.hits} from before, {self.seconds:.1f} s ({self.reason})"
        )


class PhotoCache:
    """Cached photos by number. Picklable; any number of threads and processes may read at once.

    Args:
        files: N originals.
        entries: (N,) of dtype `filling.CACHED`; `pack` is -1 for photos that are not cached.
        packs: The packs that entries refer to.
        is_jpeg: Whether entries are JPEG files, else pixels.
    """

    def __init__(self, files: Sequence[Path], entries: NDArray[np.void], packs: Sequence[Path], is_jpeg: bool) -> None:
        self._state = (tuple(files), entries, tuple(packs), is_jpeg, uuid.uuid4().hex)
        self._attach()

    def __len__(self) -> int:
        """Number of photos that are cached."""
        return int((self._entries["pack"] >= 0).sum())

    def get(self, number: int) -> Pixels | None:
        """One cached photo, or None where the original must be decoded.

        None means: not cached, the original has changed or vanished since, or the cached copy is damaged.

        Returns:
            (H, W, 3) uint8, writable and the caller's own; the whole upright photo, with the short side of the cache or
            the photo's own if that is smaller.
        """
        pack, offset, length, height, width, checksum, size, mtime_ns = self._entries[number].item()
        if pack < 0 or self._shared.checked[number] == _DAMAGED:
            return None
        try:
            status = os.stat(self._files[number])  # noqa: PTH116  # half the time of Path.stat, for every photo
        except OSError:
            return None
        if status.st_size != size or status.st_mtime_ns != mtime_ns:
            return None
        data = self._shared.reader.read(pack, offset, length)
        if data is None:
            return None
        if self._shared.checked[number] != _SOUND:
            is_sound = zlib.crc32(data.data) == checksum
            self._shared.checked[number] = _SOUND if is_sound else _DAMAGED
            if not is_sound:
                return None
        if not self._is_jpeg:
            return data.reshape(height, width, 3)
        import simplejpeg

        return simplejpeg.decode_jpeg(data, colorspace="RGB")

    def _attach(self) -> None:
        self._files, self._entries, packs, self._is_jpeg, identity = self._state
        shared = _SHARED.get(identity)
        if shared is None:
            shared = _SHARED[identity] = _Shared(PackReader(packs), bytearray(len(self._files)))
        self._shared = shared

    def __getstate__(self) -> tuple[Any, ...]:
        return self._state

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state
        self._attach()


class _Shared:
    """Open files and what was checked: shared by the copies of a cache that reach a process, epoch after epoch."""

    def __init__(self, reader: PackReader, checked: bytearray) -> None:
        self.reader = reader
        self.checked = checked


_SHARED: weakref.WeakValueDictionary[str, _Shared] = weakref.WeakValueDictionary()
_SOUND, _DAMAGED = 1, 2


def open_cache(
    files: Sequence[Path],
    *,
    sizes: NDArray[np.int64],
    mode: str,
    short_side: int,
    folder: Path,
    disk_gigabytes: float,
    background: RGB,
    max_pixels: int,
    threads: int,
    progress: Progress,
) -> tuple[PhotoCache | None, CacheReport]:
    """Open the cache of a data set and write what is missing.

    If another process is writing the same cache, waits for it and then finds its photos. Nothing that goes wrong with
    the cache is an error: the report says what was done instead.

    Args:
        files: N originals. Their common folder names the cache, so keep handing in the whole data set.
        sizes: (N, 2) upright width and height; 0 for broken photos.
        mode: `uint8` keeps pixels, `jpeg` JPEGs of quality 90, `off` nothing. `auto` is `uint8` if it fits
            `disk_gigabytes`, half the free disk and half of this machine's memory; else `jpeg` if that fits the disk;
            else `off`.
        short_side: Of a cached photo, in pixels; photos are never enlarged.
        folder: Where caches live.
        disk_gigabytes: The most that this data set's cache may take, in 10^9 bytes.
        background: As in `decode`.
        max_pixels: As in `decode`.
        threads: That decode while filling.
        progress: Told of each photo that is written.

    Returns:
        The cache, None if there is none; and the report.
    """
    started = time.perf_counter()
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100  # Path.resolve would follow links

    def off(reason: str) -> tuple[None, CacheReport]:
        return None, CacheReport("off", 0, len(files), 0, time.perf_counter() - started, 0, reason)

    if mode == "off" or not absolute:
        return off("as asked" if absolute else "no photos")
    home = folder / f"v{FORMAT}" / _folder_name(absolute)
    modes = ("uint8", "jpeg") if mode == "auto" else (mode,)
    presets = [Preset(one, short_side, background) for one in modes]
    preset, reason = choose_mode(mode, presets, sizes, folder=home, disk_gigabytes=disk_gigabytes)
    if preset is None:
        return off(reason)
    there = CacheFolder(absolute, home / preset.name, preset)
    matched = there.match()
    hits = int((matched.entries["pack"] >= 0).sum())
    broken: list[tuple[str, str]] = []
    if hits < len(files):
        room = int(disk_gigabytes * _GIGA)
        problem, broken = there.fill(max_pixels=max_pixels, room_bytes=room, threads=threads, progress=progress)
        reason = problem or reason
        matched = there.match()
    cache = PhotoCache(absolute, matched.entries, matched.packs, is_jpeg=preset.mode == "jpeg")
    if not len(cache):
        return off(reason)
    seconds = time.perf_counter() - started
    report = CacheReport(preset.mode, len(cache), len(files), matched.num_bytes, seconds, hits, reason, tuple(broken))
    return cache, report


def _folder_name(files: Sequence[Path]) -> str:
    """Of the data set: readable, and its own for each common folder of the photos."""
    try:
        root = os.path.commonpath([file.parent for file in files])
    except ValueError:  # several drives of Windows
        root = str(files[0].parent)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", Path(root).name)[:40]
    return f"{readable}-{hashlib.blake2b(root.encode(errors='surrogateescape'), digest_size=6).hexdigest()}"


_PACK_BYTES = 128 * 2**20  # what a kill while writing loses at most
_WAIT_SECONDS = 3600.0
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


JPEG_QUALITY = 90
_JPEG_BYTES_PER_PIXEL = 0.35  # photographs at quality 90 and 320 pixels: 45 KB each


@dataclass(frozen=True)
class Preset:
    """In which form photos are kept."""

    mode: str  # "uint8" or "jpeg"
    short_side: int
    background: RGB

    @property
    def name(self) -> str:
        """Of the folder of photos in this form."""
        return f"{self.mode}-{self.short_side}-{bytes(self.background).hex()}"

    def num_bytes(self, sizes: NDArray[np.int64]) -> int:
        """Of all photos in this form, estimated from their (N, 2) sizes."""
        short = np.maximum(sizes.min(axis=1), 1).astype(np.float64)
        scale = np.minimum(self.short_side / short, 1.0)
        pixels = float((sizes.prod(axis=1) * scale**2).sum())
        return int(pixels * (3 if self.mode == "uint8" else _JPEG_BYTES_PER_PIXEL))

    def make(self, file: Path, max_pixels: int) -> tuple[int, int, bytes | memoryview]:
        """Height, width and content of one photo in this form.

        Raises:
            PhotoError: It cannot be decoded.
        """
        photo = decode(file, min_short_side=self.short_side, background=self.background, max_pixels=max_pixels)
        pixels = reduce_photo(photo, self.short_side)
        height, width, _ = pixels.shape
        if self.mode == "uint8":
            return height, width, pixels.data.cast("B")
        import simplejpeg

        return height, width, simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")


def reduce_photo(pixels: Pixels, short_side: int) -> Pixels:
    """Reduce a photo to a short side, antialiased; a smaller one comes back as it is.

    Bilinear with antialiasing on uint8: 78 dB against Pillow's, in a quarter of its time.
    """
    height, width, _ = pixels.shape
    if min(height, width) <= short_side:
        return pixels
    import cv2
    import torch
    from torch.nn.functional import interpolate

    scale = short_side / min(height, width)
    size = (max(round(height * scale), short_side), max(round(width * scale), short_side))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    planes = interpolate(images, size=size, mode="bilinear", antialias=True)[0].numpy()
    return cv2.merge([*planes])  # pyright: ignore[reportReturnType]  # 25 times as fast as numpy's transposed copy


def choose_mode(
    mode: str, presets: Sequence[Preset], sizes: NDArray[np.int64], *, folder: Path, disk_gigabytes: float
) -> tuple[Preset | None, str]:
    """The first preset that fits, and why.

    Args:
        mode: As in `open_cache`; not "off".
        presets: The candidates in order of preference.
        sizes: (N, 2) width and height.
        folder: Whose disk must hold it; what is there of it already counts as fitting.
        disk_gigabytes: As in `open_cache`.
    """
    import psutil

    reasons: list[str] = []
    for preset in presets:
        num_bytes = preset.num_bytes(sizes)
        there = sum(path.stat().st_size for path in (folder / preset.name).glob("*.pack"))
        half_free = shutil.disk_usage(_existing(folder)).free / 2
        half_memory = psutil.virtual_memory().total / 2
        if num_bytes > disk_gigabytes * _GIGA:
            limit = f"cache.disk_gigabytes = {disk_gigabytes:g}"
        elif num_bytes - there > half_free:
            limit = f"half of the free disk, {half_free / _GIGA:.2f} GB"
        elif mode == "auto" and preset.mode == "uint8" and num_bytes > half_memory:
            limit = f"half of the memory, {half_memory / _GIGA:.2f} GB"
        else:
            asked = "as asked" if mode != "auto" else f"{num_bytes / _GIGA:.2f} GB fit the disk"
            return preset, "; ".join([*reasons, asked])
        reasons.append(f"{preset.mode} would take {num_bytes / _GIGA:.2f} GB, more than {limit}")
    return None, "; ".join(reasons)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
