"""The server as replicas on a Ray cluster: the plain server's answers, also after a replica was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import httpx
import psutil
import pytest
from tests.inference.test_bulk import model  # noqa: F401, a fixture
from tests.serve.conftest import LIMITS, ask, make_photo, upload

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.serve.app import open_app
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.server import _own_serve, _reason, count_replicas, run_on_ray, share_cores


def cluster_of(*machines):
    """As much of Ray as tells what a cluster has."""
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    total = {kind: sum(machine.get(kind, 0) for machine in machines) for kind in ("CPU", "GPU")}
    return SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: total)


@pytest.mark.parametrize(
    ("machines", "count", "expected"),
    [
        ([{"CPU": 16.0}], 1, (16, 0)),
        ([{"CPU": 16.0}], 3, (5, 0)),
        ([{"CPU": 4.0}, {"CPU": 16.0}], 2, (8, 0)),
        ([{"CPU": 4.0}, {"CPU": 6.0}], 3, (3, 0)),
        ([{"CPU": 16.0, "GPU": 2.0}], 2, (8, 1)),
    ],
)
def test_replicas_share_the_cores_of_the_machines_that_hold_them(machines, count, expected):
    assert share_cores(cluster_of(*machines), count) == expected


def test_replicas_suit_the_cluster_or_are_refused():
    assert count_replicas(cluster_of({"CPU": 4.0}, {"CPU": 4.0}, {})) == 2
    assert count_replicas(cluster_of({"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0})) == 2
    with pytest.raises(ResourceError, match=r"3 replicas need a CPU each and 0 GPUs each.*has 2 CPUs.*--replicas"):
        share_cores(cluster_of({"CPU": 2.0}), 3)


@pytest.mark.parametrize("package", ["ray", "ray.serve"])
def test_missing_ray_is_answered_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    settings = {"host": "127.0.0.1", "port": 0, "max_requests": 1, "drain_seconds": 1, "on_ready": print}
    with pytest.raises(MissingExtraError, match=r"fieldmark\[ray\]"):
        run_on_ray(open_app, address="", replicas=1, **settings)


def test_a_cluster_that_serves_already_is_not_taken_over():
    running = SimpleNamespace(status=lambda: SimpleNamespace(applications={"theirs": ""}, proxies={}))
    with pytest.raises(ResourceError, match=r"runs on this cluster already.*make_application"), _own_serve(running):
        raise AssertionError("the block must not run")


def test_replicas_that_do_not_start_are_told_by_the_last_line_of_their_traceback():
    def serve_with(message):
        deployments = {"fieldmark": SimpleNamespace(message=message)}
        applications = {"fieldmark": SimpleNamespace(deployments=deployments)}
        return SimpleNamespace(status=lambda: SimpleNamespace(applications=applications))

    assert _reason(serve_with("Traceback:\n  x\nRunError: none is there\n"), RuntimeError("failed")) == (
        "RunError: none is there"
    )
    assert _reason(serve_with(""), RuntimeError("failed")) == "failed"


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


@pytest.fixture
def served(model, tmp_path):  # noqa: F811
    """The command line with two replicas: process, and a client that knows the key."""
    words = ["serve", str(model), "--ray", "--replicas", "2", "--port", "0", "--max-megabytes", "0.5"]
    program = "import ray; ray.init(num_cpus=2, log_to_driver=False); from fieldmark.cli.app import main; main()"
    surroundings = {**os.environ, "FIELDMARK_API_KEY": "secret", "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=err, env=surroundings)
        try:

            def address():
                text = (tmp_path / "err").read_text()
                assert process.poll() is None, text
                return re.search(r"serving .*replicas: 2 x 1 CPUs and 0 GPUs at (http://\S+)", text)

            wait_until(address)
            yield process, partial(httpx.Client, base_url=address()[1], headers={"x-api-key": "secret"}, timeout=60)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_answer_as_the_plain_server_and_survive_the_death_of_one(model, served):  # noqa: F811
    process, make_client = served
    photo = make_photo((200, 120, 40))
    expected = plain_answer(model, photo)
    with make_client() as client:

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

        # At the end, what is in hand is answered.
        children = psutil.Process(process.pid).children(recursive=True)
        answers = []
        many = upload(*[make_photo((200, 120, 40), (4000, 3000), "PNG")] * 8)  # a second to decode
        asking = threading.Thread(target=lambda: answers.append(client.post("/predict", files=many).status_code))
        asking.start()
        time.sleep(0.3)
        process.terminate()
        assert not answers
        assert process.wait(60) == 0
        asking.join()
        assert answers == [200]
        assert not [child for child in psutil.wait_procs(children, timeout=20)[1] if child.is_running()]
