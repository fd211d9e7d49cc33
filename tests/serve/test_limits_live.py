"""Laws that need a real socket: drain on SIGTERM, malformed uploads by the hundred, good requests meanwhile."""

from __future__ import annotations

import contextlib
import io
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from tests.serve.conftest import make_photo, upload

from fieldmark.errors import ResourceError
from fieldmark.serve.server import is_local, listen

_PROGRAM = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {root!r})
    from tests.serve.conftest import ColourModel, make_app
    from fieldmark.serve.server import run_server

    class Slow(ColourModel):
        def probabilities(self, images):
            time.sleep({seconds})
            return super().probabilities(images)

    run_server(make_app(Slow(), max_queued=64, body_seconds=1.0), host="127.0.0.1", port={port}, drain_seconds=10,
               max_connections=200)
    """
)


@contextlib.contextmanager
def server(seconds=0.0):
    """A server in a process of its own: (URL, process)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    code = _PROGRAM.format(root=root, seconds=seconds, port=port)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def malformed(count, seed):
    """Bodies and headers that no client should send, drawn from (seed)."""
    rng = random.Random(seed)
    whole = [make_photo((200, 30, 30), (64, 48), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    makers = [
        lambda: rng.choice(whole)[: rng.randrange(60)],
        lambda: rng.choice(whole)[: rng.randrange(1, 400)],
        lambda: flipped(rng, rng.choice(whole)),
        lambda: rng.randbytes(rng.randrange(2000)),
        lambda: bomb.getvalue(),
        lambda: rng.choice(whole)[:50] + b"<script>alert(1)</script>%PDF-1.7 PK\x03\x04" + rng.randbytes(50),
        lambda: zlib.compress(bytes(100_000)),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        lambda: b"",
    ]
    for _ in range(count):
        yield rng.choice(makers)()


def flipped(rng, photo):
    changed = bytearray(photo)
    for _ in range(rng.randrange(1, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def check_malformed(count):
    allowed = {200, 400, 413, 422, 431}  # 200: some flipped bits leave a photo
    with server() as (url, process), httpx.Client(base_url=url, timeout=30) as client:
        slow = socket.create_connection(("127.0.0.1", client.base_url.port))
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        for body in malformed(50, seed=1):
            client.post("/predict", files=upload(body))
        before = psutil.Process(process.pid).memory_info().rss
        good = 0
        for number, body in enumerate(malformed(count, seed=2)):
            status = client.post("/predict", files=upload(body)).status_code
            assert status in allowed, (number, status, body[:80])
            if number % 10 == 0:
                answer = client.post("/predict", files=upload(make_photo((0, 255, 0))))
                good += answer.json()["photos"][0]["label"] == "green"
        raw = [
            {"content": b"x" * 500, "headers": {"content-type": "multipart/form-data; boundary=" + "y" * 5000}},
            {"content": b"x", "headers": {"x-large": "z" * 60_000}},
            {"content": b"{}", "headers": {"content-type": "application/json"}},
            {"content": b"\r\n" * 5000, "headers": {"content-type": "multipart/form-data; boundary=a"}},
        ]
        for request in raw:
            with contextlib.suppress(httpx.TransportError):  # closing the connection is a refusal too
                assert client.post("/predict", **request).status_code in allowed
        assert good == (count + 9) // 10
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < 64 * 2**20, f"{grown / 2**20:.0f} MB more than after the first 50"
        slow.settimeout(5)
        assert b"408" in slow.recv(100)
        slow.close()


def test_malformed_uploads_never_bring_a_5xx_and_good_requests_are_answered_meanwhile():
    check_malformed(80)


@pytest.mark.slow
def test_thousands_of_malformed_uploads_leave_memory_flat():
    check_malformed(5000)


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
