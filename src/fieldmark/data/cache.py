"""Photos kept at the size that training needs, decoded or as small JPEGs, for the next epoch and the next run.

A photo is found again by its path, size and modification time. It is written whole or not at all, checked when a
process reads it for the first time, and taken away when anything is wrong: the cache can cost time, never a wrong
pixel.

Each photo is a file of its own: its content, then a footer with the content's bytes, height, width and a checksum of
them. It is written as `.part` and renamed when it is complete. Only the holder of a lock writes; anybody reads at any
time.

Shape letters: N photos; H, W height and width of a cached photo, in pixels.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
from numpy.typing import NDArray

from fieldmark.data.decode import DecodeSpec, Pixels
from fieldmark.data.inspection import look_up, map_in_threads, name_folder
from fieldmark.data.shards import PhotoFile, StoredPhoto, expect
from fieldmark.errors import PhotoError, RunError
from fieldmark.files import exclusive_lock
from fieldmark.progress import Progress

Read = Callable[..., Pixels]  # of (number, min_short_side=pixels), as `DecodeSpec.read`; raises PhotoError

FORMAT = 3  # raised when the content or the meaning of a stored photo changes; older ones are then not found
JPEG_QUALITY = 90
_JPEG_BYTES_PER_PIXEL = 0.35  # photographs at quality 90 and 320 pixels: 45 KB each
_GIGA = 1e9
_WAIT_SECONDS = 3600.0
_FOOTER = struct.Struct("<4I")  # bytes of the content, height, width, checksum


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

    files: Sequence[PhotoFile]  # N originals, absolute
    folder: Path  # of the stored photos
    is_jpeg: bool  # else they are pixels
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)  # shared by copies, as what they checked is

    def __post_init__(self) -> None:
        self._checked = _CHECKED.setdefault(self.identity, bytearray(len(self.files)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def select(self, numbers: list[int]) -> PhotoCache:
        """Give the cache of some of its photos, which are then numbered in this order."""
        return PhotoCache([self.files[number] for number in numbers], self.folder, self.is_jpeg)

    def get(self, number: int) -> Pixels | None:
        """(H, W, 3) uint8, writable: one whole upright photo, with the short side of the cache or its own if smaller.

        None where the original must be decoded: it is not cached, has changed or vanished, or the copy is damaged.
        """
        name, _ = look_up(self.files[number])
        # Copied instead of mapped: a map would count as this process's memory, growing with the data set, and would
        # kill the process where a file is cut short or a disk fails.
        if not name:
            return None
        try:
            with open(f"{self.folder}/{name}", "rb", buffering=0) as file:  # noqa: PTH123  # a third less time
                stored = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
                file.readinto(stored.data)
        except OSError:
            return None
        data, footer = stored[: -_FOOTER.size], stored[-_FOOTER.size :].tobytes()
        length, height, width, checksum = _FOOTER.unpack(footer.rjust(_FOOTER.size, b"\xff"))
        if length != len(data) or not (self._checked[number] or _checksum(data, height, width) == checksum):
            _remove(self.folder / name)
            return None
        self._checked[number] = True
        if not self.is_jpeg:
            return data.reshape(height, width, 3)
        return simplejpeg.decode_jpeg(data, colorspace="RGB")


# By identity of a cache, whether the checksum of each photo was found right in this process.
_CHECKED: dict[str, bytearray] = {}


def open_cache(
    files: Sequence[PhotoFile],
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
    absolute = [file if isinstance(file, StoredPhoto) else Path(os.path.abspath(file)) for file in files]  # noqa: PTH100
    preset: Preset | None = None
    reason = "as asked" if absolute else "no photos"
    home = folder / f"v{FORMAT}" / name_folder(_common_folder(absolute))
    if mode != "off" and absolute:
        presets = [Preset(one, short_side, decoding) for one in (("uint8", "jpeg") if mode == "auto" else (mode,))]
        preset, reason = choose_mode(mode, presets, sizes, folder=home, disk_gigabytes=disk_gigabytes)
    if preset is not None:
        place, names = home / preset.name, [look_up(file)[0] for file in absolute]
        stored = list_stored(place)
        hits = sum(name in stored for name in names)
        if hits < len(files):
            room_bytes, make = int(disk_gigabytes * _GIGA), partial(_make, preset, read)
            fault = _fill(place, names, files, make, room_bytes=room_bytes, threads=threads, progress=progress)
            reason, stored = fault or reason, list_stored(place)
        sizes_there = [stored[name] for name in names if name in stored]
        if sizes_there:
            cache, seconds = PhotoCache(absolute, place, preset.mode == "jpeg"), time.perf_counter() - started
            report = (preset.mode, len(sizes_there), len(files), sum(sizes_there), seconds, hits, reason)
            return cache, CacheReport(*report)
    return None, CacheReport("off", 0, len(files), 0, time.perf_counter() - started, 0, reason)


def _common_folder(files: Sequence[PhotoFile]) -> str:
    places = (f"/{file.location}" if isinstance(file, StoredPhoto) else file for file in files)  # a URL is no path
    try:
        return os.path.commonpath({os.path.dirname(place) for place in places})  # noqa: PTH120
    except ValueError:  # several drives of Windows, or no files
        return os.path.dirname(str(files[0])) if files else ""  # noqa: PTH120


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

    def make(self, photo: Pixels) -> bytes:
        """Content and footer of one photo in this form."""
        pixels = reduce_photo(photo, self.short_side)
        height, width, _ = pixels.shape
        if self.mode == "uint8":
            data = pixels.tobytes()
        else:
            data = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")
        return data + _FOOTER.pack(len(data), height, width, _checksum(data, height, width))


def choose_mode(
    mode: str, presets: Sequence[Preset], sizes: NDArray[np.int64], *, folder: Path, disk_gigabytes: float
) -> tuple[Preset | None, str]:
    """The first preset that fits the disk of `folder`, and why; what is there of it already counts as fitting."""
    reasons: list[str] = []
    half_free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2
    half_memory = psutil.virtual_memory().total / 2
    for preset in presets:
        num_bytes = preset.num_bytes(sizes)
        if num_bytes > disk_gigabytes * _GIGA:
            limit = f"cache.disk_gigabytes = {disk_gigabytes:g}"
        elif num_bytes > half_free and num_bytes - sum(list_stored(folder / preset.name).values()) > half_free:
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


def _fill(
    place: Path,
    names: Sequence[str],
    files: Sequence[PhotoFile],
    make: Callable[[int], bytes],
    *,
    room_bytes: int,
    threads: int,
    progress: Progress,
) -> str:
    """Write the photos that are missing and can be read, as far as there is room; "", or what came in between.

    Waits while another process does. `make` gives what is stored of one of the N photos, b"" where it is broken.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        busy = "another process has been writing it for more than an hour"
        tell = partial(progress.message, "cache: another process is writing it; waiting until it is done")
        with exclusive_lock(place.parent / "writing.lock", busy=busy, wait_seconds=_WAIT_SECONDS, on_wait=tell):
            stored = _make_room(place, names, room_bytes)
            room = room_bytes - sum(stored.values())
            missing = [number for number, name in enumerate(names) if name and name not in stored]
            progress.start(len(names), len(names) - len(missing))
            for number, content in zip(missing, map_in_threads(make, expect(missing, files), threads), strict=True):
                room -= len(content)
                if room < 0:
                    return f"cache.disk_gigabytes = {room_bytes / _GIGA:g} is used up"
                if content:
                    _store(place / names[number], content)
                progress.advance(1)
        return ""
    except RunError as error:
        return str(error)
    except OSError as error:
        is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        return "the disk is full" if is_full else f"{place} cannot be written: {error.strerror or error}"


def _make(preset: Preset, read: Read, number: int) -> bytes:
    """What is stored of a photo; b"" if it is broken, vanished at that moment, or is too long for a JPEG."""
    with contextlib.suppress(PhotoError, ValueError):
        return preset.make(read(number, min_short_side=preset.short_side))
    return b""


def _make_room(place: Path, names: Sequence[str], room_bytes: int) -> dict[str, int]:
    """Give the bytes of the photos that stay: those that are gone go too, once more than half of the room is taken.

    Also removes what a writer that was killed has left. The caller holds the folder's lock.
    """
    for part in place.glob("*.part"):
        _remove(part)
    stored = list_stored(place)
    if sum(stored.values()) > room_bytes / 2:
        for name in stored.keys() - set(names):
            _remove(place / name)
            del stored[name]
    return stored


def _checksum(data: Any, height: int, width: int) -> int:
    return zlib.crc32(data, zlib.crc32(b"%d %d" % (height, width)))


def list_stored(place: Path) -> dict[str, int]:
    """Give the bytes of each whole photo in a folder, by its name."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if not entry.name.endswith(".part")}
    return {}


def _store(path: Path, content: bytes) -> None:
    """Write a stored photo, whole or not at all. A power cut may leave less: its footer shows it."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another system may hold it open: next time
        path.unlink(missing_ok=True)
