"""The process's surroundings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fieldmark.runs.environment import limit_threads, usable_cores

CODE = """
import resource, sys
import numpy as np
from fieldmark.training.evaluate import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(7):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="not on this system")
def test_freed_memory_is_used_again_without_new_page_faults():
    def faults(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("default")


@pytest.mark.parametrize(("asked", "cores"), [("1", 1), ("3", 3), ("64", 8), ("4,2", 4), ("many", 8), ("0", 8)])
def test_threads_that_the_user_asked_for_are_the_most_that_is_used(monkeypatch, asked, cores):
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_cores() == cores


def test_a_container_with_a_quota_counts_as_few_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    assert usable_cores() == 2


@pytest.mark.parametrize(("asked", "processes", "cores"), [("1", "2", 4), ("3", "2", 3), ("1", "1", 1)])
def test_the_one_thread_that_torchrun_sets_by_itself_leaves_no_core_idle(monkeypatch, asked, processes, cores):
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    for name, value in {"OMP_NUM_THREADS": asked, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, value)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("torch_has", "cores", "workers", "left"), [(64, 2, 0, 2), (8, 8, 2, 6), (2, 8, 2, 2), (4, 2, 4, 1)]
)
def test_answers_take_no_more_threads_than_there_are_cores(monkeypatch, torch_has, cores, workers, left):
    taken = []
    monkeypatch.setattr("fieldmark.runs.environment.usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_has)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    limit_threads(workers)
    assert taken == [left]
