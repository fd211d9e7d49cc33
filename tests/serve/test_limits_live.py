"""Laws that need a real socket: drain on SIGTERM, malformed uploads by the thousand, good requests meanwhile."""

from __future__ import annotations

import contextlib
import io
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
import zlib
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from tests.data.test_malformed import CASES
from tests.serve.conftest import LIMITS, make_photo, upload

from fieldmark.errors import ResourceError
from fieldmark.serve.server import is_local, listen

_PROGRAM = textwrap.dedent(
    """
    import faulthandler, signal, sys, time
    faulthandler.register(signal.SIGUSR1)  # so that a test can ask a server that stands still what it is at
    sys.path.insert(0, {root!r})
    from tests.serve.conftest import ColorModel, make_app
    from fieldmark.serve.server import run_server

    class Slow(ColorModel):
        def probabilities(self, images):
            time.sleep({seconds})
            return super().probabilities(images)

    run_server(make_app(Slow(), max_queued=64, body_seconds=1.0), host="127.0.0.1", port={port}, drain_seconds=10,
               max_connections=200)
    """
)


@contextlib.contextmanager
def server(seconds=0.0):
    """A server in a process of its own: (URL, process), which logs to the file `process.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    code = _PROGRAM.format(root=root, seconds=seconds, port=port)
    url = f"http://127.0.0.1:{port}"
    # Not a pipe: one that nobody reads is full after 64 kB, and the server stands still.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=log, text=True)
        process.log = log
        yield from wait_until_answered(url, process)


def wait_until_answered(url, process):
    try:
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None, log_of(process)
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def stacks_of(process):
    """Say in the error of a client that got no answer what each thread of the server was at."""
    try:
        yield
    except httpx.TransportError as error:
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        raise AssertionError(f"{error!r}: {log_of(process)}") from error


def log_of(process):
    process.log.seek(0)
    return process.log.read()


def polyglots():
    """Files that are two things at once: the photo in front is answered, what hangs on it is never run or read."""
    jpeg, png, gif = (make_photo((200, 30, 30), (64, 48), kind) for kind in ("JPEG", "PNG", "GIF"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil.sh", "rm -rf /")
    page = b"<html><script>alert(1)</script></html>"
    comment = b"*/=1;alert(1);/*" + page
    return [
        *(photo + tail for photo in (jpeg, png, gif) for tail in (archive.getvalue(), page, b"%PDF-1.7\n", jpeg)),
        jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:],
        page + jpeg,
        archive.getvalue() + png,
        jpeg[: len(jpeg) // 2] + png,
    ]


def malformed(count, seed):
    """Bodies that no client should send, drawn from (seed)."""
    rng = random.Random(seed)
    whole = [make_photo((200, 30, 30), (64, 48), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    files = [data for _, data in CASES if len(data) < LIMITS["max_body_bytes"] - 20_000]
    doubles = polyglots()
    makers = [
        lambda: rng.choice(whole)[: rng.randrange(60)],
        lambda: rng.choice(whole)[: rng.randrange(1, 400)],
        lambda: flipped(rng, rng.choice(whole)),
        lambda: rng.randbytes(rng.randrange(2000)),
        lambda: rng.choice(files),
        lambda: rng.choice(files),
        lambda: flipped(rng, rng.choice(files) or b"x"),
        lambda: rng.choice(doubles),
        lambda: flipped(rng, rng.choice(doubles)),
        lambda: bomb.getvalue(),
        lambda: bytes(rng.randrange(LIMITS["max_body_bytes"], 2 * LIMITS["max_body_bytes"])),
        lambda: zlib.compress(bytes(100_000)),
    ]
    for _ in range(count):
        yield rng.choice(makers)()


def flipped(rng, photo):
    changed = bytearray(photo)
    for _ in range(rng.randrange(1, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


FORM = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=a\r\n"
RAW = [
    FORM + b"X-Large: " + b"z" * 200_000 + b"\r\n\r\n",
    FORM + b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n",
    FORM.replace(b"boundary=a", b"boundary=" + b"a" * 20_000) + b"Content-Length: 3\r\n\r\n--a",
    FORM + b"Content-Length: -1\r\n\r\n",
    FORM + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
    FORM + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    FORM + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    FORM + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    FORM + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\0",
    FORM + b"Content-Length: 90\r\n\r\n" + b"--a\r\n" * 18,
    b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /predict HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    bytes(range(256)) * 8,
]
ALLOWED = {200, 400, 401, 404, 405, 408, 413, 415, 422, 431}  # 200: some flipped bits leave a photo


def statuses_of(port, request):
    """Status codes of everything that comes back on one connection, which the server may also just close."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        with contextlib.suppress(OSError):
            raw.sendall(request)
            raw.shutdown(socket.SHUT_WR)
        while part := raw.recv(65_536):
            answer += part
    return {int(code) for code in re.findall(rb"^HTTP/1.1 (\d{3})", answer, re.MULTILINE)}


def trickle(port, is_done, statuses):
    """A client that sends a byte now and then, and comes back whenever it is sent away."""
    while not is_done.is_set():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.1) as slow:
            slow.sendall(FORM + b"Content-Length: 1000\r\n\r\n")
            while not is_done.is_set():
                slow.sendall(b"-")
                with contextlib.suppress(TimeoutError):
                    if part := slow.recv(1000):
                        statuses.append(int(part.split()[1]))
                    break


def check_malformed(count, *, senders, slow_clients):
    """Several clients send rubbish, some slowly, while one asks good questions."""
    wrong, statuses, slow_statuses, is_done = [], [], [], threading.Event()
    names = ["a.jpg", "../../etc/passwd", "x" * 3000, "\u202egpj.exe", 'quote".jpg', "", "nul\0.jpg"]
    kinds = ["image/jpeg", "text/html", "application/x-httpd-php", "", "x/" + "y" * 2000]

    def send(bodies, seed):
        rng = random.Random(seed)
        with httpx.Client(base_url=url, timeout=60) as client:
            for number, body in enumerate(bodies):
                if is_done.is_set():  # the good client failed
                    return
                files = [("photos", (rng.choice(names), body, rng.choice(kinds)))]
                with contextlib.suppress(httpx.TransportError):  # a closed connection is a refusal too
                    status = client.post("/predict", files=files).status_code
                    statuses.append(status)
                    if status not in ALLOWED:
                        wrong.append((seed, number, status, body[:80]))
                if number % 10 == 0:
                    found = statuses_of(port, rng.choice(RAW))
                    wrong.extend((seed, number, status) for status in found - ALLOWED)

    with server() as (url, process), httpx.Client(base_url=url, timeout=60) as client:
        port = client.base_url.port
        send(malformed(100, seed=0), seed=0)
        for request in RAW:
            assert statuses_of(port, request) <= ALLOWED, request[:100]
        before = psutil.Process(process.pid).memory_info().rss
        slow = [threading.Thread(target=trickle, args=(port, is_done, slow_statuses)) for _ in range(slow_clients)]
        bad = [
            threading.Thread(target=send, args=(malformed(count // senders, seed), seed))
            for seed in range(1, senders + 1)
        ]
        for thread in [*slow, *bad]:
            thread.start()
        good = []
        try:
            while any(thread.is_alive() for thread in bad) or len(good) < 20 or not slow_statuses:
                start = time.perf_counter()
                with stacks_of(process):
                    answer = client.post("/predict", files=upload(make_photo((0, 255, 0))))
                assert answer.status_code == 200, answer.text
                assert answer.json()["photos"][0]["label"] == "green"
                good.append(time.perf_counter() - start)
                time.sleep(0.02)
        finally:
            is_done.set()
            for thread in [*slow, *bad]:
                thread.join()
        assert wrong == []
        assert len(statuses) > 0.6 * count
        assert {200, 413, 422} <= set(statuses)
        assert set(slow_statuses) == {408}
        assert max(good) < 5, f"a good request waited {max(good):.1f} s"
        assert log_of(process) == ""  # a line for each would fill a disk, or a pipe that nobody reads
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MB more than after the first 100"


def test_malformed_uploads_never_bring_a_5xx_and_good_requests_are_answered_meanwhile():
    check_malformed(120, senders=2, slow_clients=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_malformed_uploads_by_the_thousand_leave_memory_flat(request):
    """6,000 uploads; `pytest --malformed-uploads 100000 -m slow` takes about an hour."""
    check_malformed(request.config.getoption("--malformed-uploads"), senders=3, slow_clients=20)


def test_headers_without_end_are_given_up_whatever_parser_is_installed():
    with server() as (url, process):
        port = int(url.rsplit(":", 1)[1])
        before = psutil.Process(process.pid).memory_info().rss
        sent = 0
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            while sent < 64 * 2**20:
                raw.sendall(b"X-Header: " + b"y" * 65_000 + b"\r\n")
                sent += 65_000
        assert sent < 16 * 2**20  # the connection was closed; what was sent lies in buffers of the system
        assert psutil.Process(process.pid).memory_info().rss - before < 16 * 2**20
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_icon_that_holds_a_bomb_costs_no_memory():
    """A PNG of 13,000 x 13,000 pixels inside an ICO that says 256 x 256."""
    inner = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(inner, "PNG")
    png = inner.getvalue()
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(png), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + png
    with server() as (url, process):
        httpx.post(f"{url}/predict", files=upload(make_photo()))
        before = psutil.Process(process.pid).memory_info().rss
        answer = httpx.post(f"{url}/predict", files=upload(icon))
        assert answer.status_code == 422
        assert psutil.Process(process.pid).memory_info().rss - before < 32 * 2**20


def test_sigterm_answers_what_is_in_hand_and_ends():
    with server(seconds=1.0) as (url, process):
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/predict", files=upload(make_photo()), timeout=20))
        )
        thread.start()
        while not httpx.get(f"{url}/health").json()["waiting"]:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 200
        assert process.wait(10) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_a_port_that_is_taken_is_one_clear_message():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"127.0.0.1:{port} cannot be listened on.*another --host or --port"):
            listen("127.0.0.1", port)


def test_only_loopback_counts_as_local():
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.2", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
