"""The report of a run while it trains, on a page of this machine: `fieldmark train --watch`.

It is made by a process of its own, at low priority, and only when a browser asks: training loses next to nothing.
"""

import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from fieldmark.errors import FieldmarkError
from fieldmark.files import fill_template
from fieldmark.runs.environment import start_module
from fieldmark.runs.folder import LOG, METRICS, SUMMARY, Run
from fieldmark.study.report import write_report

SECONDS_AFTER = 15.0
"""How long the page stays when the training is over, so that a browser, which asks each five seconds, has the end."""
LINES_SHOWN = 12


def start_watching(run: Path) -> str:
    """Serve the report of a run that this process is about to train; the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    # A session of its own: Ctrl-C reaches the training alone. It ends by itself, some seconds after this process.
    start_module("fieldmark.study.watch", str(run.absolute()), str(port), str(os.getpid()))
    return f"http://127.0.0.1:{port}"


class LiveReport:
    """Renders a run's report again where its results have changed; before its first epoch, what its log says."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._made_of: object = None
        self._page = b""
        self._lock = threading.Lock()

    def render(self) -> bytes:
        """The page as of now."""
        with self._lock:
            files = [self.run / name for name in (METRICS, SUMMARY)]
            now = [file.stat().st_mtime_ns for file in files if file.is_file()]
            if now != self._made_of:
                self._made_of, self._page = now, self._report()
            log = self.run / LOG
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            values = {"name": self.run.name, "lines": lines[-LINES_SHOWN:]}
            return self._page or fill_template("waiting.html", values, package="fieldmark.study").encode()

    def _report(self) -> bytes:
        """The report; nothing while there is none."""
        with TemporaryDirectory() as folder:
            try:
                [page] = write_report([Run(self.run)], Path(folder) / "report.html", title=self.run.name)
            except FieldmarkError:
                self._made_of = None  # its files may be of two epochs: ask again
                return b""
            return page.read_bytes()


class _Answer(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        # A page elsewhere that points its own name here gets nothing (DNS rebinding).
        host = self.headers.get("Host", "").rpartition(":")[0]
        if self.path != "/" or host not in ("127.0.0.1", "localhost"):
            self.send_error(404)
            return
        content = self.server.report.render()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        if not self.server.is_over:
            self.send_header("Refresh", "5")
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve RUN at PORT until the process that trains it is gone, and a little longer."""
    run, port = Path(sys.argv[1]), int(sys.argv[2])
    if hasattr(os, "nice"):
        os.nice(10)
    server: Any = ThreadingHTTPServer(("127.0.0.1", port), _Answer)
    server.report = LiveReport(run)
    server.is_over = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trainer = psutil.Process(int(sys.argv[3]))
    while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.5)
    server.is_over = True
    time.sleep(SECONDS_AFTER)


if __name__ == "__main__":
    main()
