"""Progress on stderr: a bar with the time to finish on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Takes reports of how far long work is."""

    def start(self, total: int, done: int) -> None:
        """Work of `total` units begins, `done` of which were finished before (a resumed run)."""

    def advance(self, n: int) -> None:
        """`n` more units are finished."""

    def message(self, text: str) -> None:
        """One line that stays."""


class Quiet(Progress):
    """Progress that is shown nowhere."""


class Logged(Progress):
    """Progress whose messages are added to a file too, with the time."""

    def __init__(self, inner: Progress, path: Path) -> None:
        self._inner = inner
        self._path = path

    def start(self, total: int, done: int) -> None:  # noqa: D102
        self._inner.start(total, done)

    def advance(self, n: int) -> None:  # noqa: D102
        self._inner.advance(n)

    def message(self, text: str) -> None:  # noqa: D102
        self.write(text)
        self._inner.message(text)

    def write(self, text: str) -> None:
        """Add a line to the file alone."""
        with self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def open_progress(title: str, *, stream: TextIO | None = None) -> TerminalProgress | PlainProgress:
    """Progress for a terminal or a file, under a title such as "train"; on stderr unless told otherwise."""
    # Windows programs without a console have no stderr at all.
    target = stream or sys.stderr or io.StringIO()
    return TerminalProgress(title, stream=target) if target.isatty() else PlainProgress(title, stream=target)


class TerminalProgress(Progress):
    """A bar with share, count and time to finish, that messages scroll above."""

    def __init__(self, title: str, *, stream: TextIO) -> None:
        self._title = title
        self._stream = stream
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Show the bar; a second call starts anew."""
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

    def advance(self, n: int) -> None:  # noqa: D102
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)

    def message(self, text: str) -> None:  # noqa: D102
        if self._bar is None:
            self._stream.write(text + "\n")
        else:
            # Not rich's print: a class name in brackets is not markup, and colors would differ from plain lines.
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


class PlainProgress(Progress):
    """A line at most each ten seconds, for log files and pipes."""

    def __init__(self, title: str, *, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock  # an argument so that tests need not wait
        self.start(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.flush()

    def start(self, total: int, done: int) -> None:  # noqa: D102
        self._total = total
        self._done = self._done_at_start = done
        self._started = self._last_line = self._clock()

    def advance(self, n: int) -> None:  # noqa: D102
        self._done += n
        now = self._clock()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        per_second = (self._done - self._done_at_start) / max(now - self._started, 1e-9)
        left = format_seconds((self._total - self._done) / per_second) if per_second > 0 else "unknown time"
        self.message(f"{self._title}: {self._done}/{self._total}, {left} to finish")

    def message(self, text: str) -> None:  # noqa: D102
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
