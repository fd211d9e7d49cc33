"""Photos kept at the size that training needs, decoded or as small JPEGs, for the next epoch and the next run.

A photo is found again by its path, size and modification time. It is written whole or not at all, checked when a
process reads it for the first time, and counts as absent when anything is wrong: the cache can cost time, never a
wrong pixel.

Photos are appended to packs: files of photos one after another, then a table of where each is, and at the end the
table's number of rows and checksum. A pack is written as `.part` and renamed when it is complete. Only the holder of
the folder's lock writes; anybody reads at any time. A pack never changes, and may be deleted while others read it.

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
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.decode import DecodeSpec, Pixels
from fieldmark.data.inspection import map_in_threads
from fieldmark.errors import PhotoError, RunError
from fieldmark.files import exclusive_lock
from fieldmark.progress import Progress

Read = Callable[..., Pixels]  # of (number, min_short_side=pixels), as `DecodeSpec.read`; raises PhotoError

FORMAT = 2  # raised when the content or the meaning of a pack changes; older packs are then not found
JPEG_QUALITY = 90
_JPEG_BYTES_PER_PIXEL = 0.35  # photographs at quality 90 and 320 pixels: 45 KB each
_GIGA = 1e9
_PACK_BYTES = 128 * 2**20  # what a kill while writing loses at most
_WAIT_SECONDS = 3600.0
_KEY_BYTES, _FOOTER_BYTES = 16, 8
_SOUND, _DAMAGED = 1, 2

# Where a photo is in its pack.
ROW = np.dtype(
    [("key", f"V{_KEY_BYTES}"), ("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"),
     ("checksum", "<u4")]
)  # fmt: skip


@dataclass(frozen=True)
class CacheReport:
    """Holds what the cache did, what it holds and what it cost. `str()` is one readable sentence."""

    mode: str  # `uint8`, `jpeg` or `off`
    photos: int  # that are cached now
    total: int  # photos that were asked for
    bytes: int  # of the cached photos on disk
    seconds: float  # from asking to having
    hits: int  # photos that were cached before
    reason: str  # why this mode, or why not all photos are there

    def __str__(self) -> str:
        if self.mode == "off":
            return f"cache: off ({self.reason})"
        return (
            f"cache: {self.mode}, {self.photos} of {self.total} photos, {self.bytes / _GIGA:.2f} GB, "
            f"{self.hits} from before, {self.seconds:.1f} s ({self.reason})"
        )


@dataclass(eq=False)
class PhotoCache:
    """Cached photos of N files by number. Picklable; any number of threads and processes may read at once."""

    files: Sequence[Path]  # N originals, absolute
    rows: NDArray[np.void]  # (N,) of ROW
    pack_of: NDArray[np.int64]  # (N,) number of each photo's pack, -1 for photos that are not cached
    packs: Sequence[Path]
    is_jpeg: bool  # else cached photos are pixels
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)  # shared by copies, as what they checked is

    def __post_init__(self) -> None:
        self._checked = _CHECKED.setdefault(self.identity, bytearray(len(self.files)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def __len__(self) -> int:
        """Number of photos that are cached."""
        return int((self.pack_of >= 0).sum())

    def select(self, numbers: list[int]) -> PhotoCache:
        """Give the cache of some of its photos, which are then numbered in this order."""
        files = [self.files[number] for number in numbers]
        return PhotoCache(files, self.rows[numbers], self.pack_of[numbers], self.packs, self.is_jpeg)

    def get(self, number: int) -> Pixels | None:
        """(H, W, 3) uint8, writable: one whole upright photo, with the short side of the cache or its own if smaller.

        None where the original must be decoded: it is not cached, has changed or vanished, or the copy is damaged.
        """
        pack = int(self.pack_of[number])
        if pack < 0 or self._checked[number] == _DAMAGED:
            return None
        key, offset, length, height, width, checksum = self.rows[number].item()
        if _key(self.files[number]) != key:
            return None
        data = np.empty(length, np.uint8)
        # Copied instead of mapped: a map would count as this process's memory, growing with the data set, and would
        # kill the process where a file is cut short or a disk fails.
        try:
            with self.packs[pack].open("rb", buffering=0) as file:
                file.seek(offset)
                if file.readinto(data.data) != length:
                    return None
        except OSError:
            return None
        if self._checked[number] != _SOUND:
            is_sound = zlib.crc32(data.data) == checksum
            self._checked[number] = _SOUND if is_sound else _DAMAGED
            if not is_sound:
                return None
        if not self.is_jpeg:
            return data.reshape(height, width, 3)
        import simplejpeg

        return simplejpeg.decode_jpeg(data, colorspace="RGB")


_CHECKED: dict[str, bytearray] = {}
"""By identity of a cache, whether the checksum of each photo was looked at in this process, and fitted."""


def open_cache(
    files: Sequence[Path],
    *,
    sizes: NDArray[np.int64],
    mode: str,
    short_side: int,
    folder: Path,
    disk_gigabytes: float,
    decoding: DecodeSpec,
    read: Read,
    threads: int,
    progress: Progress,
) -> tuple[PhotoCache | None, CacheReport]:
    """Open the cache of a data set in a folder of caches, and write what is missing.

    If another process is writing the same cache, waits for it and then finds its photos. Nothing that goes wrong with
    the cache is an error: the report says what was done instead. The common folder of the N originals names the cache,
    so keep handing in the whole data set, with (N, 2) upright sizes, 0 for broken photos. Missing photos are read by
    `read`, which decodes as `decoding` says.

    The mode `uint8` keeps pixels, `jpeg` JPEGs, `off` nothing; `auto` is the first of them that fits `disk_gigabytes`
    (of 10^9 bytes), half the free disk and, as pixels, half of this machine's memory. Photos are never enlarged.
    """
    started = time.perf_counter()
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100  # Path.resolve would follow links
    preset: Preset | None = None
    reason = "as asked" if absolute else "no photos"
    home = folder / f"v{FORMAT}" / _name_folder(absolute) if absolute else folder
    if mode != "off" and absolute:
        presets = [Preset(one, short_side, decoding) for one in (("uint8", "jpeg") if mode == "auto" else (mode,))]
        preset, reason = choose_mode(mode, presets, sizes, folder=home, disk_gigabytes=disk_gigabytes)
    if preset is not None:
        there = CacheFolder(absolute, home / preset.name, preset, read)
        cache = there.match()
        hits = len(cache)
        if hits < len(files):
            reason = there.fill(room_bytes=int(disk_gigabytes * _GIGA), threads=threads, progress=progress) or reason
            cache = there.match()
        if len(cache):
            num_bytes = int(cache.rows["length"].sum())
            seconds = time.perf_counter() - started
            return cache, CacheReport(preset.mode, len(cache), len(files), num_bytes, seconds, hits, reason)
    return None, CacheReport("off", 0, len(files), 0, time.perf_counter() - started, 0, reason)


def _name_folder(files: Sequence[Path]) -> str:
    """Of the data set: readable, and its own for each common folder of the photos."""
    try:
        root = os.path.commonpath([file.parent for file in files])
    except ValueError:  # several drives of Windows
        root = str(files[0].parent)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", Path(root).name)[:40]
    return f"{readable}-{hashlib.blake2b(root.encode(errors='surrogateescape'), digest_size=6).hexdigest()}"


@dataclass(frozen=True)
class Preset:
    """In which form photos are kept."""

    mode: str  # "uint8" or "jpeg"
    short_side: int
    decoding: DecodeSpec

    @property
    def name(self) -> str:
        """Of the folder of photos in this form."""
        return f"{self.mode}-{self.short_side}-{bytes(self.decoding.background).hex()}"

    def num_bytes(self, sizes: NDArray[np.int64]) -> int:
        """Of all photos in this form, estimated from their (N, 2) sizes."""
        short = np.maximum(sizes.min(axis=1), 1).astype(np.float64)
        scale = np.minimum(self.short_side / short, 1.0)
        pixels = float((sizes.prod(axis=1) * scale**2).sum())
        return int(pixels * (3 if self.mode == "uint8" else _JPEG_BYTES_PER_PIXEL))

    def make(self, photo: Pixels) -> tuple[int, int, bytes | memoryview]:
        """Height, width and content of one photo in this form."""
        pixels = reduce_photo(photo, self.short_side)
        height, width, _ = pixels.shape
        if self.mode == "uint8":
            return height, width, pixels.data.cast("B")
        import simplejpeg

        return height, width, simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")


def choose_mode(
    mode: str, presets: Sequence[Preset], sizes: NDArray[np.int64], *, folder: Path, disk_gigabytes: float
) -> tuple[Preset | None, str]:
    """The first preset that fits the disk of `folder`, and why; what is there of it already counts as fitting."""
    import psutil

    reasons: list[str] = []
    half_free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2
    half_memory = psutil.virtual_memory().total / 2
    for preset in presets:
        num_bytes = preset.num_bytes(sizes)
        there = sum(path.stat().st_size for path in (folder / preset.name).glob("*.pack"))
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


@dataclass(frozen=True)
class CacheFolder:
    """The photos of one data set in one form, on disk."""

    files: Sequence[Path]  # N originals, absolute
    folder: Path  # of their packs
    preset: Preset
    read: Read  # of the N originals

    def match(self) -> PhotoCache:
        """Return what is there of the photos as they are now."""
        packs = load_packs(self.folder)
        rows = np.concatenate([*packs.values(), np.zeros(1, ROW)])  # the last is that of photos that are not there
        pack_of = np.repeat([*range(len(packs)), -1], [*map(len, packs.values()), 1])
        row_of = {key: row for row, key in enumerate(rows["key"].tolist())}
        found = [row_of.get(_key(file), -1) for file in self.files]
        is_jpeg = self.preset.mode == "jpeg"
        return PhotoCache(self.files, rows[found], pack_of[found], list(packs), is_jpeg)

    def fill(self, *, room_bytes: int, threads: int, progress: Progress) -> str:
        """Write the photos that are missing and can be read, as far as there is room; "", or what came in between.

        Waits while another process does.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(
                self.folder / "writing.lock",
                busy="another process has been writing it for more than an hour",
                wait_seconds=_WAIT_SECONDS,
                on_wait=lambda: progress.message("cache: another process is writing it; waiting until it is done"),
            ):
                clean(self.folder)
                return self._write_missing(room_bytes, threads, progress)
        except RunError as error:
            return str(error)
        except OSError as error:
            is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            why = f"{self.folder} cannot be written: {error.strerror or error}"
            return "the disk is full" if is_full else why

    def _write_missing(self, room_bytes: int, threads: int, progress: Progress) -> str:
        cache = self.match()
        missing = np.flatnonzero(cache.pack_of < 0).tolist()
        room = room_bytes - _make_room(cache, room_bytes)
        progress.start(len(self.files), len(self.files) - len(missing))
        with PackWriter(self.folder) as writer:
            for made in map_in_threads(self._make, missing, threads):
                if made is not None:
                    room -= len(made[-1])
                    if room < 0:
                        return f"cache.disk_gigabytes = {room_bytes / _GIGA:g} is used up"
                    writer.add(*made)
                progress.advance(1)
        return ""

    def _make(self, number: int) -> tuple[bytes, int, int, bytes | memoryview] | None:
        """One photo's key and content; None if it is broken, or vanished at that moment."""
        # Taken first: a file that changes while it is read is kept under a key that will not be asked for again.
        key = _key(self.files[number])
        with contextlib.suppress(PhotoError):
            photo = self.read(number, min_short_side=self.preset.short_side)
            return (key, *self.preset.make(photo)) if key else None


def _make_room(cache: PhotoCache, room_bytes: int) -> int:
    """Bytes of the packs that stay. Packs of photos that are gone go too, once more than half the room is taken."""
    taken = [pack.stat().st_size for pack in cache.packs]
    if sum(taken) > room_bytes / 2:
        for number, pack in enumerate(cache.packs):
            if number not in cache.pack_of:
                _remove(pack)
                taken[number] = 0
    return sum(taken)


def _key(file: Path) -> bytes | None:
    """Return what a photo as it is now is called in packs; None if it is gone."""
    try:
        status = os.stat(file)  # noqa: PTH116  # half the time of Path.stat, for every photo
    except (OSError, ValueError):
        return None
    text = f"{file}\0{(status.st_size, status.st_mtime_ns)}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=_KEY_BYTES).digest()


class PackWriter:
    """Appends photos to packs in a folder, whose lock the caller holds; what is sealed stays, whatever happens later.

    Leaving the `with` seals what is left, also after Ctrl-C; after a failure to write it is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._part = folder
        self._file: BinaryIO | None = None
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []
        self._offset = 0

    def add(self, key: bytes, height: int, width: int, data: bytes | memoryview) -> None:
        """Append one photo; raises OSError."""
        if self._file is None:
            self._part = self._folder / f"{uuid.uuid4().hex}.pack.part"
            self._file = self._part.open("wb")
            self._rows, self._offset = [], 0
        self._file.write(data)
        self._rows.append((key, self._offset, len(data), height, width, zlib.crc32(data)))
        self._offset += len(data)
        if self._offset >= _PACK_BYTES:
            self.seal()

    def seal(self) -> None:
        """Make what was added so far part of the cache; raises OSError."""
        if self._file is None:
            return
        content = np.array(self._rows, ROW).tobytes()
        self._file.write(content + np.array([len(self._rows), zlib.crc32(content)], "<u4").tobytes())
        self._file.close()
        self._part.replace(self._part.with_suffix(""))
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, OSError):
                with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                    self.seal()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                _remove(self._part)


def load_packs(folder: Path) -> dict[Path, NDArray[np.void]]:
    """The complete packs of a folder and their tables, (photos,) of dtype `ROW`; damaged ones are left out."""
    packs: dict[Path, NDArray[np.void]] = {}
    for pack in sorted(folder.glob("*.pack")):
        with contextlib.suppress(OSError, ValueError), pack.open("rb") as file:
            end = file.seek(-_FOOTER_BYTES, os.SEEK_END)
            num_rows, checksum = np.frombuffer(file.read(), "<u4").tolist()
            file.seek(end - num_rows * ROW.itemsize)
            content = file.read(num_rows * ROW.itemsize)
            if content and zlib.crc32(content) == checksum:
                packs[pack] = np.frombuffer(content, ROW)
    return packs


def clean(folder: Path) -> None:
    """Remove what a writer that was killed has left. The caller holds the folder's lock."""
    whole = load_packs(folder)
    for path in folder.iterdir():
        if path.suffix == ".part" or (path.suffix == ".pack" and path not in whole):
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another system may hold it open: next time
        path.unlink(missing_ok=True)
