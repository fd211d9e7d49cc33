"""Progress: one line per ten seconds off a terminal, a bar on one, and the time to finish in both."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from fieldmark.progress import NotebookProgress, Quiet, StreamProgress, format_seconds, open_progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_progress_writes_at_most_one_line_per_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    progress = StreamProgress("training", stream=stream, clock=clock)
    progress.start(1000, 0)
    for _ in range(250):
        clock.now += 0.1
        progress.advance(1)
    assert len(stream.getvalue().splitlines()) == 2


def test_time_to_finish_counts_only_what_this_process_did():
    stream, clock = io.StringIO(), Clock()
    progress = StreamProgress("training", stream=stream, clock=clock)
    progress.start(1000, 900)
    clock.now = 20.0
    progress.advance(20)
    assert stream.getvalue() == "training: 920/1000, 1 min 20 s to finish\n"


def test_messages_are_written_at_once_and_unchanged():
    stream = io.StringIO()
    with StreamProgress("x", stream=stream, clock=Clock()) as progress:
        progress.message("epoch 1 [red]top-1[/red]")
        assert stream.getvalue() == "epoch 1 [red]top-1[/red]\n"


def test_a_terminal_gets_a_bar_and_messages_without_markup():
    stream = Terminal()
    progress = open_progress("training", stream=stream)
    with progress:
        progress.start(10, 0)
        progress.advance(3)
        progress.message("class [b]robin[/b]")
    assert "[b]robin[/b]" in stream.getvalue()
    assert "training" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min"), (-3, "0 s")]
)
def test_durations_roll_over_at_the_minute_and_the_hour(seconds, text):
    assert format_seconds(seconds) == text


def test_a_notebook_gets_a_bar_that_is_renewed_in_place_and_messages_that_stay(monkeypatch, capsys):
    """IPython's display gives a handle; a shell with a kernel is a notebook, one without is a terminal."""
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data))
    shell = SimpleNamespace(kernel=None)
    modules = {
        "IPython": SimpleNamespace(get_ipython=lambda: shell),
        "IPython.display": SimpleNamespace(display=lambda data, raw, display_id: handle),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert not isinstance(open_progress("train"), NotebookProgress)
    shell.kernel = object()
    monkeypatch.setattr(NotebookProgress, "seconds_between", 0.0)
    with open_progress("<train>") as progress:
        assert isinstance(progress, NotebookProgress)
        progress.start(10, 0)
        progress.advance(5)
        progress.message("epoch 1")
    assert shown[0]["text/html"].startswith('<progress value="5" max="10"></progress> &lt;train&gt;: 5/10, ')
    assert shown[-1] == {"text/plain": ""}
    assert capsys.readouterr() == ("epoch 1\n", "")


@pytest.fixture
def logger():
    """The library's logger, as a program finds it."""
    found = logging.getLogger("fieldmark")
    yield found
    found.setLevel(logging.NOTSET)


def test_messages_go_to_the_logger_and_a_level_silences_what_is_shown(logger, caplog):
    stream = io.StringIO()
    logger.setLevel(logging.WARNING)
    with StreamProgress("x", stream=stream, clock=Clock()) as progress:
        progress.message("epoch 1")
    assert (stream.getvalue(), caplog.text) == ("", "")
    Quiet().message("100 % of nothing")
    assert caplog.records == []


def test_a_program_that_handles_the_logger_has_the_messages_and_the_terminal_has_not(logger, caplog):
    stream = io.StringIO()
    logger.setLevel(logging.INFO)  # the handlers are those of `caplog`
    with StreamProgress("x", stream=stream, clock=Clock()) as progress:
        progress.message("epoch 1: 100 %")
    Quiet().message("epoch 2")
    assert [record.getMessage() for record in caplog.records] == ["epoch 1: 100 %", "epoch 2"]
    assert stream.getvalue() == ""


def test_without_a_handler_messages_are_shown_as_ever(logger, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger.setLevel(logging.INFO)
    with StreamProgress("x", stream=stream, clock=Clock()) as progress:
        progress.message("epoch 1")
    assert stream.getvalue() == "epoch 1\n"
