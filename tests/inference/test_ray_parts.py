"""Parts made on a Ray cluster of this machine, of whose workers one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from tests.inference.test_bulk import model, photos, plain, predict  # noqa: F401, fixtures

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.inference.predict import make_parts_on_ray


def test_missing_ray_is_answered_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"fieldmark\[ray\]"):
        next(make_parts_on_ray(None, iter([]), address=""))


def on_a_cluster(test):
    """Slow, more so on a busy machine: a start takes from five seconds to a minute."""
    return pytest.mark.slow(pytest.mark.timeout(900)(pytest.mark.filterwarnings("ignore")(test)))


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of one core each, as far as Ray can tell."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    made.wait_for_nodes()
    yield made
    made.shutdown()


class Watched:
    """Tells which parts were made."""

    def __init__(self, address):
        self.address, self.made = address, []

    def __call__(self, task, pieces):
        for done in make_parts_on_ray(task, pieces, address=self.address):
            self.made.append(done[0])
            yield done


def workers():
    """Processes that make parts."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::make_part"):
            found.append(process.pid)
    return found


def kill_a_worker_when(is_time):
    """SIGKILL to one of the workers as soon as `is_time`; gives the thread and whom it killed."""
    killed = []

    def kill():
        end = time.monotonic() + 500
        while time.monotonic() < end and not killed:
            if is_time() and (alive := workers()):
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
            time.sleep(0.005)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread, killed


@on_a_cluster
def test_a_killed_worker_loses_no_photo_and_repeats_none(model, photos, tmp_path, cluster):  # noqa: F811
    from tests.inference.test_bulk import save_photo

    for number in range(11, 80):
        save_photo(photos / f"{number}.png", number)
    plain(model, photos, tmp_path / "plain.csv")
    parts = tmp_path / "p.csv.parts"
    thread, killed = kill_a_worker_when(lambda: len(list(parts.glob("part-*.parquet"))) >= 3)
    executor = Watched(cluster.address)
    done, made = predict(model, photos, tmp_path / "p.csv", executor)
    thread.join()
    assert killed
    assert sorted(made) == list(range(20))
    assert (done.count, [p.path for p in done.failed]) == (80, ["5.png"])
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


@on_a_cluster
def test_a_killed_call_goes_on_with_the_parts_that_are_missing(model, photos, tmp_path):  # noqa: F811
    """By the command line, from start to `kill -9` to the end, on a cluster that each call starts for itself."""
    from tests.inference.test_bulk import save_photo

    for number in range(11, 40):
        save_photo(photos / f"{number}.png", number)
    program = (
        "from fieldmark.inference import predict; predict.PIECE_PHOTOS = 4; from fieldmark.cli.app import main; main()"
    )
    out = tmp_path / "parts"
    words = [sys.executable, "-c", program, "predict", str(model), str(photos), "--out", str(out), "--ray"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while len(list(out.glob("part-*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(3)  # its workers end by themselves
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 2 <= len(before) < 10
    finished = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, f"wrote 40 rows to {out}\n"), finished.stderr
    assert "1 of 40 photos could not be read" in finished.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.glob("part-*.parquet"))) == 10


@on_a_cluster
def test_a_worker_larger_than_any_machine_is_refused(cluster):
    with pytest.raises(ResourceError, match=r"needs 2 CPUs and 0 GPUs on one machine"):
        next(make_parts_on_ray(None, iter([]), address=cluster.address, cpus=2))
