"""Ctrl-C and SIGTERM become a wish to stop, which training grants after the update under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """Set once a signal came. A second signal is not held back."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; what handled them before does so again afterwards."""
    request = StopRequest()
    # Only the main thread may set handlers: a training in another thread is stopped by its own caller.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()
