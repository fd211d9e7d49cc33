"""What was found out about files, kept between commands in one SQLite file: forgotten when a file changes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

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
