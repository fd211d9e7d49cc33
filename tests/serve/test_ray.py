"""The server as replicas on a Ray cluster: the plain server's answers, also after a replica was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from tests.inference.test_bulk import model  # noqa: F401, a fixture
from tests.serve.conftest import LIMITS, ask, make_photo, upload

from fieldmark.errors import MissingExtraError
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.server import make_application, open_app


@pytest.mark.parametrize("package", ["ray", "ray.serve"])
def test_missing_ray_is_answered_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"fieldmark\[ray\]"):
        make_application("run")


def plain_answer(model, photo):  # noqa: F811
    app = open_app(model, 1, limits=Limits(**LIMITS), access=Access(("test",)))
    return ask(app, lambda client: client.post("/predict", files=upload(photo)))[0].json()


def named(answer):
    """Class names with their probabilities."""
    return {told["label"]: told["probability"] for told in answer["photos"][0]["top"]}


def replicas_of(process):
    """Processes of the replicas, by their titles."""
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::ServeReplica"):
                found.add(child.pid)
        except psutil.Error:
            continue
    return found


def wait_until(is_so, *, seconds=240):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.2)


PROGRAM = """
import sys
import ray
from ray import serve
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.server import make_application

ray.init(num_cpus=2, log_to_driver=False)
serve.start(http_options={"port": int(sys.argv[2])})
limits, access = Limits(max_body_bytes=500_000), Access(api_key="secret")
serve.run(make_application(sys.argv[1], replicas=2, limits=limits, access=access))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.fixture
def served(model):  # noqa: F811
    """Two replicas as Ray's command makes them: process, and a client that knows the key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    words = [sys.executable, "-c", PROGRAM, str(model), str(port)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=surroundings) as process:
        assert any(line == b"ready\n" for line in process.stdout)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": "secret"}, timeout=60) as client:
            yield process, client
        process.stdin.close()
        assert process.wait(120) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_answer_as_the_plain_server_and_survive_the_death_of_one(model, served):  # noqa: F811
    process, client = served
    photo = make_photo((200, 120, 40))
    expected = plain_answer(model, photo)

    def is_answered():
        answer = client.post("/predict", files=upload(photo))
        if answer.status_code != 200:
            return False
        assert named(answer.json()) == pytest.approx(named(expected), abs=1e-6)
        return True

    assert all(is_answered() for _ in range(4))
    refused = client.post("/predict", files=upload(photo), headers={"x-api-key": "wrong"})
    assert refused.status_code == 401
    assert client.post("/predict", files=upload(b"x" * 600_000)).status_code == 413
    assert client.post("/predict", files=upload(b"no photo")).status_code == 422
    assert client.get("/health").json()["model"] == "run"

    before = replicas_of(process)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    failed = sum(not is_answered() for _ in range(20))
    assert failed <= 2  # in hand, or on their way to it
    wait_until(lambda: len(replicas_of(process) - {min(before)}) == 2)
    assert all(is_answered() for _ in range(10))
