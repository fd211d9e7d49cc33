from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fieldmark.config import load_config
from fieldmark.errors import RunError
from fieldmark.study.grid import BOOKS, Job, parse_grid, run_job
from fieldmark.study.sweep import LocalCells, run_sweep

HERE = Path(__file__).parent


class InProcess:
    """Trains a cell at once, here: what a sweep decides does not depend on where its cells run."""

    num_slots = 1

    def start(self, job):
        run_job(dataclasses.replace(job, parent=0))
        return lambda: ""

    def stop(self):
        pass


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch, request):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    if "processes" not in request.fixturenames:
        monkeypatch.setattr("fieldmark.study.sweep._open_executor", lambda *_, **__: InProcess())


@pytest.fixture
def processes():
    """Ask for cells in processes of their own, as users have them."""


def _grid(probs=(0.0, 0.2, 0.4), **more):
    return parse_grid({"set": {"train.epochs": 4}, "grid": {"mix.share": list(probs)}, **more}, "grid")


def _run(grid, out, **options):
    return run_sweep(grid, out, trainer="synthetic_trainer", poll_seconds=0.02, **options)


def _calls(out):
    return (out / "calls.txt").read_text().splitlines()


def _behave(out, **cells):
    out.mkdir(exist_ok=True)
    (out / "behave.json").write_text(json.dumps({f"mix.share={prob}": what for prob, what in cells.items()}))


def _states(status):
    return {cell.name: cell.state for cell in status.cells}


def test_cells_become_run_folders_and_a_second_sweep_repeats_none(tmp_path):
    status = _run(_grid(), tmp_path)
    assert [run.name for run in status.runs] == ["mix.share=0", "mix.share=0.2", "mix.share=0.4"]
    assert load_config(tmp_path / "mix.share=0.2" / "recipe.toml").mix.share == 0.2
    again = _run(_grid(), tmp_path)
    assert _states(again) == _states(status)
    assert _calls(tmp_path) == ["mix.share=0 0", "mix.share=0.2 0", "mix.share=0.4 0"]


@pytest.mark.usefixtures("processes")
def test_a_failing_cell_is_reported_and_the_rest_go_on(tmp_path):
    _behave(tmp_path, **{"0": "fail", "0.2": "bug", "0.4": "crash"})
    status = _run(_grid((0.0, 0.2, 0.4, 0.1)), tmp_path)
    assert list(_states(status).values()) == ["failed", "failed", "failed", "finished"]
    errors = [cell.error for cell in status.failed]
    assert errors[0] == "the loss is not finite"
    assert errors[1] == "ZeroDivisionError: division by zero"
    assert errors[2] == "its process ended with SIGKILL (out of memory?)"
    assert "Traceback" in (tmp_path / BOOKS / "mix.share=0.2.log").read_text()


def test_a_restart_resumes_what_failed_and_repeats_nothing_else(tmp_path):
    _behave(tmp_path, **{"0.2": "fail"})
    _run(_grid(), tmp_path)
    _behave(tmp_path)
    status = _run(_grid(), tmp_path)
    assert status.num("finished") == 3
    assert _calls(tmp_path)[3:] == ["mix.share=0.2 1"]


@pytest.mark.parametrize("damage", ["summary", "predictions", "recipe", "folder"])
def test_a_broken_cell_is_trained_again_and_no_other(tmp_path, damage):
    _run(_grid(), tmp_path)
    cell = tmp_path / "mix.share=0.2"
    if damage == "summary":
        (cell / "summary.json").write_text('{"status": "fin')
    elif damage == "predictions":
        (cell / "predictions" / "val.parquet").unlink()
    elif damage == "recipe":
        (cell / "recipe.toml").unlink()
    else:
        cell.rename(tmp_path.with_name("elsewhere"))
    status = _run(_grid(), tmp_path)
    assert status.num("finished") == 3
    resumed_at = 4 if damage == "summary" else 0
    assert _calls(tmp_path)[3:] == [f"mix.share=0.2 {resumed_at}"]


@pytest.mark.usefixtures("processes")
def test_a_killed_sweep_resumes_where_it_was(tmp_path):
    _behave(tmp_path, **{"0.2": "wait"})
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from fieldmark.study.grid import parse_grid\n"
        "from fieldmark.study.sweep import run_sweep\n"
        "grid = parse_grid({'set': {'train.epochs': 4}, 'grid': {'mix.share': [0.0, 0.2, 0.4]}}, 'grid')\n"
        "run_sweep(grid, sys.argv[1], trainer='synthetic_trainer', poll_seconds=0.02)\n"
    )
    sweeper = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(HERE)])
    try:
        _wait_for(tmp_path / "waiting")
        with pytest.raises(RunError, match="another sweep is at work in"):
            _run(_grid(), tmp_path)
    finally:
        sweeper.send_signal(signal.SIGKILL)
        sweeper.wait()
    _behave(tmp_path)
    # The orphan is still at its cell; it goes on, sees that its sweep is gone, and leaves the cell to the next.
    (tmp_path / "go").touch()
    status = _run(_grid(), tmp_path)
    assert status.num("finished") == 3
    assert _calls(tmp_path) == ["mix.share=0 0", "mix.share=0.2 0", "mix.share=0.2 2", "mix.share=0.4 0"]


def test_a_cell_knows_its_sweep_through_a_launcher_and_when_it_is_gone():
    """Python's launcher on Windows waits between the two, as a wrapper does elsewhere."""
    ask = f"from fieldmark.study.grid import _has_ancestor; print(_has_ancestor({os.getpid()}))"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}])"
    assert subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True).stdout == "True\n"
    # A launcher that ends: whom it began asks for it then.
    later = "import os, sys, time; from fieldmark.study.grid import _has_ancestor; sys.stdin.read(); "
    later += "print(_has_ancestor(int(sys.argv[1])), flush=True)"
    launcher = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {later!r}, str(os.getpid())])"
    gone = subprocess.Popen([sys.executable, "-c", launcher], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    gone.wait()
    assert gone.communicate("")[0] == "False\n"


def test_cells_side_by_side_share_the_cores(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("fieldmark.study.sweep.usable_cores", lambda: 8)
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: started.append(env["OMP_NUM_THREADS"]))
    (tmp_path / BOOKS).mkdir()
    job = Job(sweep=str(tmp_path), name="cell", settings={}, trainer="", parent=0)
    for asked in (None, "1"):
        monkeypatch.setenv("OMP_NUM_THREADS", asked) if asked else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        LocalCells([()] * 3).start(job)
    assert started == ["2", "1"]


def _wait_for(path, seconds=30.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


def test_a_folder_with_a_run_of_other_settings_is_refused_before_anything_runs(tmp_path):
    _run(_grid((0.2,)), tmp_path)
    longer = parse_grid({"set": {"train.epochs": 9}, "grid": {"mix.share": [0.1, 0.2]}}, "grid")
    with pytest.raises(RunError, match=r"mix\.share=0\.2 holds a run of other settings.*train\.epochs 4 → 9"):
        _run(longer, tmp_path)
    assert not (tmp_path / "mix.share=0.1").exists()


def test_settings_without_effect_on_learning_may_change_between_restarts(tmp_path):
    _run(_grid((0.2,)), tmp_path)
    _run(_grid((0.2,)), tmp_path, overrides=["loader.workers=2"])
    assert _calls(tmp_path) == ["mix.share=0.2 0"]


def test_a_folder_that_is_not_the_sweeps_is_not_touched(tmp_path):
    (tmp_path / "mix.share=0.2").mkdir()
    (tmp_path / "mix.share=0.2" / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match="was not made by this sweep"):
        _run(_grid((0.2,)), tmp_path)
    assert (tmp_path / "mix.share=0.2" / "thesis.txt").read_text() == "dear"


def test_the_status_tells_of_every_cell_and_the_time_left(tmp_path):
    seen = []
    _run(_grid(), tmp_path, on_status=seen.append)
    assert list(_states(seen[0]).values()) == ["running", "waiting", "waiting"]
    assert all(cell.state == "finished" and cell.epoch == 4 for cell in seen[-1].cells)
    left = [status.seconds_left for status in seen if status.seconds_left is not None]
    assert left[-1] == 0
    assert max(left) > 0


def test_epochs_of_an_earlier_sweep_are_no_measure_of_the_speed(tmp_path):
    _behave(tmp_path, **{"0.2": "fail"})
    _run(_grid((0.2,)), tmp_path)
    _behave(tmp_path)
    seen = []
    status = _run(_grid((0.1, 0.2)), tmp_path, on_status=seen.append)
    assert [cell.epoch for cell in seen[0].cells] == [0, 1]
    assert seen[0].seconds_left is None
    assert status.num("finished") == 2


@pytest.mark.slow
@pytest.mark.usefixtures("processes")
def test_two_cells_run_at_a_time_when_asked(tmp_path):
    _behave(tmp_path, **{"0": "wait"})
    seen = []

    def release(status):
        seen.append(status)
        if _states(status).get("mix.share=0.4") == "finished":
            (tmp_path / "go").touch()

    status = _run(_grid(), tmp_path, jobs=2, on_status=release)
    assert status.num("finished") == 3
    assert max(status.num("running") for status in seen) == 2


def test_a_plan_may_be_a_mapping(tmp_path):
    plan = {"seeds": (1, 2), "set": {"train.epochs": 1}, "grid": {"mix.share": [0.1, 0.2]}}
    status = _run(plan, tmp_path)
    assert [cell.name for cell in status.cells] == [
        f"mix.share={share},seed={seed}" for share in (0.1, 0.2) for seed in (1, 2)
    ]
    assert status.num("finished") == 4
