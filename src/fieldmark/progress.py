"""Progress on stderr: a bar with the time to finish on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


SECONDS_BETWEEN_LINES = 10.0


def open_progress(title: str, *, stream: TextIO | None = None) -> TerminalProgress | PlainProgress:
    """Progress fit for where it is seen.

    Args:
        title: What is going on, such as "train".
        stream: Where to write; None is stderr, as it is when called.
    """
    # Windows programs without a console have no stderr at all.
    target = stream or sys.stderr or io.StringIO()
    if target.isatty():
        return TerminalProgress(title, stream=target)
    return PlainProgress(title, stream=target, clock=time.monotonic)


class TerminalProgress:
    """A bar with share, count and time to finish, that messages scroll above."""

    def __init__(self, title: str, *, stream: TextIO) -> None:
        self._title = title
        self._stream = stream
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Show the bar; `done` of `total` were finished before (a resumed run). A second call starts anew."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("to finish"),
                console=Console(file=self._stream),
                transient=True,
                redirect_stdout=False,  # results may be piped elsewhere
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._title, total=total, completed=done)

    def advance(self, n: int) -> None:
        """`n` more are finished."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)

    def message(self, text: str) -> None:
        """One line that stays, above the bar."""
        if self._bar is None:
            self._stream.write(text + "\n")
        else:
            # Not rich's print: a class name in brackets is not markup, and colours would differ from plain lines.
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


class PlainProgress:
    """A line at most each ten seconds, for log files and pipes.

    Args:
        title: What is going on.
        stream: Where to write.
        clock: Seconds from any fixed moment; an argument so that tests need not wait.
    """

    def __init__(self, title: str, *, stream: TextIO, clock: Callable[[], float]) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._total = 0
        self._done = 0
        self._done_at_start = 0
        self._started = clock()
        self._last_line = self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.flush()

    def start(self, total: int, done: int) -> None:
        """Count from here; `done` of `total` were finished before (a resumed run)."""
        self._total = total
        self._done = self._done_at_start = done
        self._started = self._last_line = self._clock()

    def advance(self, n: int) -> None:
        """`n` more are finished."""
        self._done += n
        now = self._clock()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        per_second = (self._done - self._done_at_start) / max(now - self._started, 1e-9)
        left = format_seconds((self._total - self._done) / per_second) if per_second > 0 else "unknown time"
        self._write(f"{self._title}: {self._done}/{self._total}, {left} to finish")

    def message(self, text: str) -> None:
        """One line."""
        self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def format_seconds(seconds: float) -> str:
    """A duration as people say it.

    >>> format_seconds(8.2), format_seconds(250), format_seconds(7380)
    ('8 s', '4 min 10 s', '2 h 3 min')
    """
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress(Protocol):
    """Where long work tells how far it is."""

    def start(self, total: int, done: int) -> None:
        """Work of `total` units begins, `done` of which were finished before."""

    def advance(self, n: int) -> None:
        """`n` more units are finished."""

    def message(self, text: str) -> None:
        """One line that stays."""


class Quiet:
    """Progress that nobody watches."""

    def start(self, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, n: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


class Logged:
    """Progress whose messages are kept in a file too, with the time.

    Args:
        inner: Who watches.
        path: The file; lines are added to it.
    """

    def __init__(self, inner: Progress, path: Path) -> None:
        self._inner = inner
        self._path = path

    def start(self, total: int, done: int) -> None:
        """As `Progress`."""
        self._inner.start(total, done)

    def advance(self, n: int) -> None:
        """As `Progress`."""
        self._inner.advance(n)

    def message(self, text: str) -> None:
        """As `Progress`, and into the file."""
        self.write(text)
        self._inner.message(text)

    def write(self, text: str) -> None:
        """Into the file alone."""
        with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
