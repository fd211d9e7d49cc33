"""Trainings on a Ray cluster of this machine, of whose workers one is killed."""

# ruff: noqa: F401, F811, fixtures of other tests

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from tests.inference.test_remote import _fresh, s3
from tests.runs.test_train import TINY, assert_same_result, photos
from typer.testing import CliRunner

from fieldmark.cli.app import app
from fieldmark.config import load_config
from fieldmark.errors import (
    DataError,
    MissingExtraError,
    NonFiniteError,
    PhotoError,
    ReportedElsewhereError,
    ResourceError,
    RunError,
)
from fieldmark.progress import Quiet
from fieldmark.runs import workers
from fieldmark.runs.cluster import share_out
from fieldmark.runs.folder import Run
from fieldmark.runs.train import train
from fieldmark.runs.workers import train_on_ray

SETTINGS = (*TINY, "probe.epochs=2", "train.epochs=60", "train.devices=2")
WITHIN = ("train.batch_size=2", "model.freeze_batchnorm=true", "train.save_minutes=0.0001", "train.epochs=30")


class Told(Quiet):
    """Keeps the lines that a training tells."""

    def __init__(self, on_message=lambda _: None):
        self.lines, self.on_message = [], on_message

    def message(self, text):
        self.lines.append(text)
        self.on_message(text)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class Machines:
    """A cluster, as far as a plan of its room asks."""

    def __init__(self, *machines):
        self.machines = [dict(zip(("CPU", "GPU"), machine, strict=False)) for machine in machines]

    def nodes(self):
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def cluster_resources(self):
        return {kind: sum(machine.get(kind, 0) for machine in self.machines) for kind in ("CPU", "GPU")}


@pytest.mark.parametrize(
    ("machines", "workers", "needs"),
    [
        ([(8,)], 2, {"CPU": 4}),
        ([(8,), (8,)], 2, {"CPU": 8}),
        ([(8,), (8,)], 3, {"CPU": 4}),
        ([(1,), (1,)], 2, {"CPU": 1}),
        ([(8, 2), (8, 2)], 4, {"CPU": 4, "GPU": 1}),
        ([(8, 2), (8, 2)], 2, {"CPU": 4, "GPU": 1}),
    ],
)
def test_workers_share_the_cores_of_a_cluster_or_take_a_gpu_each(machines, workers, needs):
    assert share_out(Machines(*machines), workers, at_least=workers) == needs


def test_more_workers_than_a_cluster_has_room_for_are_refused_but_where_fewer_will_do():
    ray = Machines((1,), (1,))
    with pytest.raises(ResourceError, match=r"no room for 3 workers: give fewer --workers, or add machines"):
        share_out(ray, 3, at_least=3)
    assert share_out(ray, 3, at_least=1) == {"CPU": 1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ray", "--workers", "2", "--minutes", "3"], "--minutes go with train.devices=N or torchrun"),
        (["--ray"], "--ray and --workers N go together"),
        (["--workers", "2"], "--ray and --workers N go together"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_a_sentence(words, told):
    answer = CliRunner().invoke(app, ["train", "photos", *words])
    assert answer.exit_code == 2
    assert told in " ".join(answer.output.split())


def test_a_run_within_a_budget_does_not_go_on_on_a_cluster(tmp_path, make_run):
    run = make_run("run", status="interrupted")
    (run / "plan.jsonl").write_text("")
    answer = CliRunner().invoke(app, ["train", "--resume", str(run), "--ray="])
    assert answer.exit_code == 2
    assert "was trained within a budget: --ray and --data don't go with that" in " ".join(answer.output.split())


def test_missing_ray_is_answered_with_its_extra_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"fieldmark\[ray\]"):
        train_on_ray(load_config(None), tmp_path / "run", address="", is_new=True, progress=Quiet())
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_a_cluster_is_asked(tmp_path, make_run):
    with pytest.raises(RunError, match="holds a finished run"):
        train_on_ray(load_config(None), make_run("run"), address="gone", is_new=True, progress=Quiet())


@pytest.mark.parametrize(
    "error", [NonFiniteError(3, [1, 2]), ReportedElsewhereError(2), MissingExtraError("x", "y"), PhotoError("a", "b")]
)
def test_an_error_survives_the_way_back_from_a_worker(error):
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


class FailedError(Exception):
    """As Ray's trainer raises it."""

    def __init__(self, *failures):
        self.worker_failures = dict(enumerate(failures))


def test_a_lost_worker_is_told_from_an_error_of_ours_and_from_a_bug():
    class LostError(Exception):
        __module__ = "ray.exceptions"

    ours, bug = DataError("no photos"), ZeroDivisionError("x")
    assert workers._find_cause(FailedError(ReportedElsewhereError(1), ours)) is ours
    assert workers._find_cause(FailedError(LostError(), ours)) is ours
    assert workers._find_cause(FailedError(RuntimeError("gloo"), LostError())) is None
    assert workers._find_cause(FailedError(ReportedElsewhereError(None))) is None
    assert workers._find_cause(FailedError(ReportedElsewhereError(None), bug)) is bug
    assert workers._find_cause(LostError()) is None


def test_what_a_worker_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("FIELDMARK_STOP_FILE", "")
    job = {"run": str(tmp_path), "books": str(tmp_path), "cwd": str(tmp_path), "command": [], "data": None}
    job["settings"] = {"data": {"path": "/elsewhere/photos"}}
    with pytest.raises(
        DataError, match=rf"a worker on {socket.gethostname()} does not see /elsewhere/photos: all machines"
    ):
        workers._work(job)


def on_a_cluster(test):
    """Slow, more so on a busy machine: a start takes from ten seconds to a minute."""
    return pytest.mark.slow(pytest.mark.timeout(900)(pytest.mark.filterwarnings("ignore")(test)))


@contextmanager
def two_machines():
    """A cluster of two machines of one core each, as far as Ray can tell, and the second of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
        try:
            second = made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
            made.wait_for_nodes()
            yield made, second
        finally:
            made.shutdown()


def find_workers():
    """The processes that train, of this test's cluster alone."""
    ours = psutil.Process().children(recursive=True)
    return [process.pid for process in ours if process.name().startswith("ray::RayTrainW")]


def kill_one_at(epoch):
    """What to do with a message: SIGKILL to a worker once an epoch is over."""
    killed = []

    def kill(text):
        if text.startswith("epoch") and int(text.split()[1]) >= epoch and not killed:
            os.kill(find_workers()[-1], signal.SIGKILL)
            killed.append(epoch)

    return kill


def by_torchrun(data, out, processes, *settings):
    """Train in processes that torchrun starts."""
    recipe = out.parent / "defaults.toml"
    recipe.write_text("")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    train = ["-m", "fieldmark", "train", str(data), "--recipe", str(recipe), "--out", str(out)]
    done = subprocess.run(
        [*launch, *train, *(f"--set={pair}" for pair in settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Run(out)


@on_a_cluster
def test_two_workers_of_whom_one_is_killed_end_as_two_processes_of_torchrun(photos, tmp_path):
    """Also where what was saved last is the middle of an epoch."""
    config = load_config(None, [f"data.path={photos}", *SETTINGS, *WITHIN])
    told = Told(kill_one_at(5))
    with two_machines() as (cluster, _):
        train_on_ray(config, tmp_path / "ray", address=cluster.address, is_new=True, progress=told)
    assert sum("was lost: training goes on from the last save" in line for line in told.lines) == 1
    assert sum(line.startswith("processes: 2 ") for line in told.lines) == 2
    by_torchrun(photos, tmp_path / "torchrun", 2, *SETTINGS, *WITHIN)
    assert_same_result(tmp_path / "ray", tmp_path / "torchrun")
    assert Run(tmp_path / "ray").environment["command"] == sys.argv
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["defaults.toml", "ray", "torchrun"]


def wait_for(is_so, process):
    """Wait until something is so while a process lives."""
    end = time.monotonic() + 400
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


@on_a_cluster
def test_a_run_that_lost_a_machine_goes_on_alone_is_stopped_by_ctrl_c_and_resumed(photos, tmp_path):
    """With the same batches: without BatchNorm and mixing the result is that of one process, to rounding."""
    settings = (*TINY, *ALIKE, "train.epochs=100")
    out, recipe, log = tmp_path / "run", tmp_path / "defaults.toml", tmp_path / "log"
    recipe.write_text("")
    train_words = ["train", str(photos), "--recipe", str(recipe), "--out", str(out), "--workers=2"]

    def count_rows():
        return len(Run(out).metrics) if (out / "recipe.toml").is_file() else 0

    with two_machines() as (cluster, second), log.open("w") as file:

        def start(*words):
            command = [sys.executable, "-m", "fieldmark", *words, f"--ray={cluster.address}"]
            return subprocess.Popen(command, stderr=file, stdout=file)

        process = start(*train_words, *(f"--set={pair}" for pair in settings))
        wait_for(lambda: count_rows() > 2, process)
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: "processes: 1 " in log.read_text(), process)
        rows = count_rows()
        wait_for(lambda: count_rows() > rows, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()
        assert Run(out).summary["status"] == "interrupted"
        assert count_rows() < 100
        told = log.read_text()
        again = f"fieldmark train --resume {out} --ray={cluster.address}"
        assert f"stopped by SIGINT, all is saved. Go on with: {again}" in told
        assert told.count("a worker or its machine was lost") == 1
        assert "Traceback" not in told, told
        assert "raylet" not in told, told
        assert start("train", "--resume", str(out)).wait(600) == 0, log.read_text()
    list(train(load_config(None, [f"data.path={photos}", *settings]), tmp_path / "one"))
    assert_alike(Run(out), Run(tmp_path / "one"))


ALIKE = ("model.name=test_convnext", "mix.share=0", "model.head=linear", "train.batch_size=7", "train.ema_decay=0",
         "train.precision=32-true", "eval.batch_size=5")  # fmt: skip


def assert_alike(one, other):
    """Compare two runs to rounding; each validation photo was counted once."""
    assert [row["step"] for row in one.metrics] == [row["step"] for row in other.metrics]
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["val"]["log_loss"] == pytest.approx(b["val"]["log_loss"], rel=1e-3)
    np.testing.assert_allclose(one.predictions().probabilities, other.predictions().probabilities, atol=1e-3)
    assert len(set(one.predictions().paths)) == len(one.predictions().paths) == 12


def by_slurm(data, out, processes, *settings):
    """Train in processes as srun would start them on one node."""
    recipe = out.parent / "defaults.toml"
    recipe.write_text("")
    words = ["-m", "fieldmark", "train", str(data), "--recipe", str(recipe), "--out", str(out)]
    command = [sys.executable, *words, *(f"--set={pair}" for pair in (*settings, f"train.devices={processes}"))]
    job = {"SLURM_NTASKS": str(processes), "SLURM_NTASKS_PER_NODE": str(processes), "SLURM_NODEID": "0",
           "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "10123", "SLURM_NODELIST": "127.0.0.1"}  # fmt: skip
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
    started = [subprocess.Popen(command, env={**os.environ, **job, **place}) for place in places]
    assert [process.wait(300) for process in started] == [0] * processes
    return Run(out)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes"), [(by_torchrun, 2), (by_torchrun, 4), (by_slurm, 2)])
def test_processes_that_others_start_equal_one(photos, tmp_path, launch, processes):
    settings = (*TINY, *ALIKE, "probe.epochs=2")
    list(train(load_config(None, [f"data.path={photos}", *settings]), tmp_path / "one"))
    assert_alike(launch(photos, tmp_path / "several", processes, *settings), Run(tmp_path / "one"))


@on_a_cluster
def test_birds_from_shards_in_a_store_lose_a_worker_and_end_as_the_unbroken_run(shared, tmp_path, s3):
    birds, part = shared / "data/birds100", tmp_path / "photos"
    for split, count in (("train", 8), ("val", 4)):
        for folder in sorted((birds / split).iterdir())[:6]:
            (part / split / folder.name).mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:count]:
                (part / split / folder.name / photo.name).symlink_to(photo)
    packed = CliRunner().invoke(app, ["pack", str(part), "--out", str(tmp_path / "shards")])
    assert packed.exit_code == 0, packed.output
    bucket = s3()
    bucket.mkdir("birds")
    bucket.put(str(tmp_path / "shards"), "birds/shards", recursive=True)
    settings = (*SETTINGS, "augment.size=48", "eval.size=48")
    config = load_config(None, ["data.path=s3://birds/shards", *settings])
    told = Told(kill_one_at(5))
    with two_machines() as (cluster, _):
        train_on_ray(config, tmp_path / "ray", address=cluster.address, is_new=True, progress=told)
    assert sum("was lost: training goes on from the last save" in line for line in told.lines) == 1
    by_torchrun("s3://birds/shards", tmp_path / "torchrun", 2, *settings)
    assert_same_result(tmp_path / "ray", tmp_path / "torchrun")
    out = tmp_path / "predicted.csv"
    words = ["predict", str(tmp_path / "ray"), "s3://birds/shards/photos-*.tar", "--out", str(out)]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert len(out.read_text().splitlines()) == 1 + sum(entry.is_symlink() for entry in part.rglob("*"))
