"""Photos kept at the size that training needs, decoded or as small JPEGs, for the next epoch and the next run.

A photo is found again by its path, size and modification time. It is written whole or not at all, checked when a
process reads it for the first time, and counts as absent when anything is wrong: the cache can cost time, never a
wrong pixel.

Shape letters: N photos; H, W height and width of a cached photo, in pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.filling import CacheFolder, Progress
from fieldmark.data.formats import RGB, Pixels
from fieldmark.data.packs import PackReader
from fieldmark.data.presets import Preset, choose_mode

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
