"""Laws of `train --watch`: a page before the first epoch, the report from then on, and none when training is over."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from fieldmark.study import watch
from fieldmark.study.watch import LiveReport


def touch(path):
    """Let a file be written anew, whatever the clock of the disk."""
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def test_a_run_without_an_epoch_shows_its_log_and_then_its_report(make_run, tmp_path, monkeypatch):
    written = []
    real = watch.write_report
    monkeypatch.setattr(watch, "write_report", lambda *args, **options: written.append(args) or real(*args, **options))
    folder = tmp_path / "a <b>"
    report = LiveReport(folder)
    assert b"No epoch has ended yet" in report.render()
    folder.mkdir()
    (folder / "log.txt").write_text("2026-01-01 data: 12 photos of <jay>\n")
    assert b"data: 12 photos of &lt;jay&gt;" in report.render()
    (folder / "log.txt").unlink()
    folder.rmdir()
    make_run("a <b>", status="running")
    page = report.render()
    assert b"<svg" in page
    assert b"a &lt;b&gt;</h1>" in page
    assert b"the run still trains" in page
    count = len(written)
    assert report.render() == page
    assert len(written) == count
    touch(folder / "metrics.jsonl")
    report.render()
    assert len(written) == count + 1
    (folder / "predictions/val.parquet").unlink()
    touch(folder / "metrics.jsonl")
    assert b"No epoch has ended yet" in report.render()


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), watch._Answer)
    found.report, found.is_over = SimpleNamespace(render=lambda: b"page"), False
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_the_page_asks_for_itself_until_the_training_is_over(server):
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    with urllib.request.urlopen(address) as answer:
        assert (answer.read(), answer.headers["Refresh"]) == (b"page", "5")
    server.is_over = True
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["Refresh"] is None


@pytest.mark.parametrize(("path", "host"), [("/x", "127.0.0.1:80"), ("/", "evil.example"), ("/", "evil.example:80")])
def test_other_paths_and_names_of_the_machine_are_not_answered(server, path, host):
    address = f"http://127.0.0.1:{server.server_address[1]}{path}"
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": host}))
    refused.value.close()


@pytest.mark.slow
def test_a_training_is_watched_to_its_end(tmp_path, write_photos):
    write_photos(tmp_path / "photos", ("jay", "wren"))
    settings = ["model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "mix.off_epochs=0",
                "loader.workers=0", "train.threads=1", "probe.epochs=2", "train.epochs=3"]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "fieldmark", "train", "photos", "--recipe", "laptop", "--watch", *words]
    training = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = None
    while found is None:
        line = training.stderr.readline()
        assert line, training.wait()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
    training.communicate()
    assert training.returncode == 0
    page = refresh = ""
    while refresh is not None:  # until the page knows that it is the last one
        with urllib.request.urlopen(found[0]) as answer:
            page, refresh = answer.read().decode(), answer.headers["Refresh"]
        time.sleep(0.1)
    assert "still trains" not in page
    assert "<svg" in page
    time.sleep(watch.SECONDS_AFTER + 1)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(found[0])
