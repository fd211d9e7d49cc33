from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.study.grid import parse_grid
from fieldmark.study.sweep import run_sweep

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of one core each, as far as Ray can tell."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def _grid(probs):
    return parse_grid({"set": {"train.epochs": 4}, "grid": {"mix.share": probs}}, "grid")


def _behave(out, name, what):
    (out / "behave.json").write_text(f'{{"{name}": "{what}"}}')


def _calls(out):
    return sorted((out / "calls.txt").read_text().splitlines())


def _kill_the_waiting_worker(out):
    def kill():
        end = time.monotonic() + 120
        while not (out / "waiting").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(int((out / "waiting").read_text()), signal.SIGKILL)
        (out / "go").touch()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    return killer


def test_a_cell_whose_worker_dies_resumes_on_the_cluster_and_no_other_is_repeated(tmp_path, cluster):
    _behave(tmp_path, "mix.share=0.2", "wait")
    killer = _kill_the_waiting_worker(tmp_path)
    seen = []
    status = run_sweep(
        _grid([0.0, 0.2, 0.4]), tmp_path, ray=cluster.address, trainer="synthetic_trainer", on_status=seen.append
    )
    killer.join()
    assert status.num("finished") == 3
    assert max(status.num("running") for status in seen) == 2
    assert _calls(tmp_path) == ["mix.share=0 0", "mix.share=0.2 0", "mix.share=0.2 1", "mix.share=0.4 0"]


def test_a_cell_that_fails_on_the_cluster_is_reported(tmp_path, cluster):
    _behave(tmp_path, "mix.share=0.2", "fail")
    status = run_sweep(_grid([0.2, 0.4]), tmp_path, ray=cluster.address, trainer="synthetic_trainer")
    assert [cell.error for cell in status.cells] == ["the loss is not finite", ""]


def test_a_cell_larger_than_any_machine_is_refused(tmp_path, cluster):
    with pytest.raises(ResourceError, match="needs 2 CPUs and 0 GPUs on one machine, and no machine"):
        run_sweep(_grid([0.2]), tmp_path, ray=cluster.address, ray_cpus=2, trainer="synthetic_trainer")


def test_a_cluster_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    with pytest.raises(ResourceError, match=r"no Ray cluster at 'auto'.*ray start --head"):
        run_sweep(_grid([0.2]), tmp_path, ray="auto", trainer="synthetic_trainer")


def test_missing_ray_is_answered_with_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"fieldmark\[ray\]"):
        run_sweep(_grid([0.2]), tmp_path, ray="", trainer="synthetic_trainer")
