"""Append-only files of many photos, each whole or absent: what the cache is made of.

A pack is `NAME.pack`, the photos one after another, and `NAME.idx`, a table of where each lies. Both are written as
`.part` and renamed, the table last, so a pack that has a table is complete. Only the holder of the folder's lock
writes; anybody reads at any time. A pack never changes, and may be deleted while others still read it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
ENTRY = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("checksum", "<u4"),
    ]
)


class PackWriter:
    """Appends photos to packs in a folder; what is sealed stays, whatever happens later.

    Args:
        folder: Where packs lie. The caller holds its lock.
        pack_bytes: A pack is sealed when it has grown to this.
    """

    def __init__(self, folder: Path, *, pack_bytes: int) -> None:
        self._folder = folder
        self._pack_bytes = pack_bytes
        self._file: BinaryIO | None = None
        self._part = folder
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []
        self._offset = 0

    def add(self, key: bytes, height: int, width: int, data: bytes | memoryview) -> None:
        """Append one photo.

        Raises:
            OSError: The disk is full, say. Nothing of the unsealed pack is left.
        """
        try:
            if self._file is None:
                self._part = self._folder / f"{uuid.uuid4().hex}.pack.part"
                self._file = self._part.open("wb")
            self._file.write(data)
            self._rows.append((key, self._offset, len(data), height, width, zlib.crc32(data)))
            self._offset += len(data)
            if self._offset >= self._pack_bytes:
                self.seal()
        except OSError:
            self.discard()
            raise

    def seal(self) -> None:
        """Make what was added so far part of the cache.

        Raises:
            OSError: As in `add`.
        """
        if self._file is None:
            return
        pack = self._part.with_suffix("")
        table = pack.with_suffix(".idx")
        table_part = table.with_suffix(".idx.part")
        try:
            self._file.close()
            with table_part.open("wb") as file:
                np.save(file, np.array(self._rows, ENTRY))
            self._part.replace(pack)
            table_part.replace(table)
        except OSError:
            for path in (table_part, pack):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self.discard()
            raise
        self._file, self._rows, self._offset = None, [], 0

    def discard(self) -> None:
        """Forget what is not sealed, and free its space."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
        self._file, self._rows, self._offset = None, [], 0


def load_packs(folder: Path) -> dict[Path, NDArray[np.void]]:
    """The complete packs of a folder and their tables, (photos,) of dtype `ENTRY`; damaged ones are left out."""
    packs: dict[Path, NDArray[np.void]] = {}
    for table in sorted(folder.glob("*.idx")):
        pack = table.with_suffix(".pack")
        try:
            rows: NDArray[np.void] = np.load(table, allow_pickle=False)
            size = pack.stat().st_size
        except (OSError, ValueError, EOFError):
            continue
        is_whole = rows.dtype == ENTRY and rows.ndim == 1 and len(rows) > 0
        if is_whole and int((rows["offset"] + rows["length"]).max()) <= size:
            packs[pack] = rows
    return packs


def clean(folder: Path) -> None:
    """Remove what a writer that was killed has left. The caller holds the folder's lock."""
    whole = load_packs(folder)
    for path in folder.iterdir():
        is_left_over = path.suffix == ".part" or (
            path.suffix in {".pack", ".idx"} and path.with_suffix(".pack") not in whole
        )
        if is_left_over:
            with contextlib.suppress(OSError):  # another system may hold it open: next time
                path.unlink()


def remove(pack: Path) -> None:
    """Delete a pack, its table first."""
    for path in (pack.with_suffix(".idx"), pack):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class PackReader:
    """Reads from packs, opening each when it is first needed. Any number of threads may read at once.

    Reads copy instead of mapping files into memory: a map would count as this process's memory, growing with the data
    set, and would kill the process where a file is cut short or a disk fails. It costs about 40 microseconds a photo.

    Args:
        packs: The files, in the order of their numbers.
    """

    def __init__(self, packs: Sequence[Path]) -> None:
        self._packs = tuple(packs)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, pack: int, offset: int, length: int) -> NDArray[np.uint8] | None:
        """`length` bytes as a new array; None if they cannot be read."""
        data = np.empty(length, np.uint8)
        try:
            file = self._files.get(pack)
            if file is None:
                file = self._open(pack)
            if hasattr(os, "preadv"):
                num_read = os.preadv(file, [data.data], offset)
            else:  # Windows
                with self._lock:
                    os.lseek(file, offset, os.SEEK_SET)
                    chunk = os.read(file, length)
                num_read = len(chunk)
                data[:num_read] = np.frombuffer(chunk, np.uint8)
        except OSError:
            return None
        return data if num_read == length else None

    def _open(self, pack: int) -> int:
        with self._lock:
            if pack not in self._files:
                self._files[pack] = os.open(self._packs[pack], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._files[pack]

    def __del__(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
