"""One process at a time in a folder that outlives it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fieldmark.errors import RunError


@contextmanager
def alone(lock: Path, *, busy: str) -> Generator[None]:
    """Hold a lock to the end of the block; the system lets go of a dead process's.

    Args:
        lock: File of the lock, in a folder that exists.
        busy: What to say if another process holds it.

    Raises:
        RunError: Another process holds it.
    """
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise RunError(busy) from None
    try:
        yield
    finally:
        held.release()
