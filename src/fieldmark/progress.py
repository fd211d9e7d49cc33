"""Progress: a bar with the time to finish on a terminal or in a notebook, plain lines anywhere else.

All messages of the library go through the logger `fieldmark`: those on how work goes at level INFO, what a user should
know of a setting's name as a WARNING. What no program handles there, and no level silences, is shown beside the bar.
"""

from __future__ import annotations

import html
import io
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

SECONDS_BETWEEN_LINES = 10.0
_LOG = logging.getLogger("fieldmark")


@cache
def note(text: str) -> None:
    """Say once in a process what a user should know of a setting's name."""
    _LOG.warning("note: %s", text)


class Progress(Protocol):
    """Takes reports of how far long work is."""

    def start(self, total: int, done: int) -> None:
        """Work of `total` units begins, `done` of which were finished before (a resumed run)."""

    def advance(self, n: int) -> None:
        """`n` more units are finished."""

    def message(self, text: str) -> None:
        """One line that stays."""
        _LOG.info("%s", text)


class Quiet(Progress):
    """Progress that is shown nowhere; its messages go to the logger alone."""


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
        """Add a line to the file alone. A full disk is told by whoever saves more than a line."""
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def open_progress(title: str, *, stream: TextIO | None = None) -> StreamProgress:
    """Progress under a title such as "train", for a terminal, a notebook or a file; on stderr unless told otherwise."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if stream is None and getattr(shell, "kernel", None) is not None:
        return NotebookProgress(title)
    # Windows programs without a console have no stderr at all.
    return StreamProgress(title, stream=stream or sys.stderr or io.StringIO())


class StreamProgress(Progress, AbstractContextManager["StreamProgress"]):
    """On a terminal a bar with count and time to finish; in log files and pipes a line at most each ten seconds."""

    seconds_between = SECONDS_BETWEEN_LINES

    def __init__(self, title: str, *, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._clock = clock  # an argument so that tests need not wait
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("to finish"),
            console=Console(file=stream),
            transient=True,
            redirect_stdout=False,  # results may be piped elsewhere
            get_time=clock,
            disable=not stream.isatty(),
        )
        self._task = self._bar.add_task(title, total=0, visible=False)
        self._done_at_start, self._last_line = 0, clock()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Show how far the work is; a second call starts anew."""
        self._done_at_start, self._last_line = done, self._clock()
        self._bar.reset(self._task, total=total, completed=done, visible=True)
        self._bar.start()

    def advance(self, n: int) -> None:  # noqa: D102
        self._bar.advance(self._task, n)
        if not self._bar.disable or self._clock() - self._last_line < self.seconds_between:
            return
        self._last_line = self._clock()
        task = self._bar.tasks[0]
        done = task.completed - self._done_at_start
        left = format_seconds((task.elapsed or 0) * (task.remaining or 0) / done) if done else "unknown time"
        self._show(f"{task.description}: {task.completed:.0f}/{task.total:.0f}, {left} to finish")

    def _show(self, state: str) -> None:
        self.message(state)

    def message(self, text: str) -> None:  # noqa: D102
        super().message(text)
        is_handled = _LOG.isEnabledFor(logging.INFO) and _LOG.hasHandlers()
        if _LOG.level <= logging.INFO and not is_handled:
            self._print(text)

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._bar.console.print(Text(text), soft_wrap=True)  # a class name in brackets is no markup


class NotebookProgress(StreamProgress):
    """A bar in the output of a notebook's cell, renewed in place; messages stay as lines."""

    seconds_between = 0.5

    def __init__(self, title: str) -> None:
        super().__init__(title, stream=io.StringIO())
        display: Any = import_module("IPython.display").display
        self._output = display({"text/plain": title}, raw=True, display_id=True)

    def __exit__(self, *_: object) -> None:
        self._output.update({"text/plain": ""}, raw=True)

    def _show(self, state: str) -> None:
        task = self._bar.tasks[0]
        bar = f'<progress value="{task.completed}" max="{task.total}"></progress> {html.escape(state)}'
        self._output.update({"text/html": bar, "text/plain": state}, raw=True)

    def _print(self, text: str) -> None:
        sys.stdout.write(text + "\n")  # notebooks show stderr as if it were an error


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
