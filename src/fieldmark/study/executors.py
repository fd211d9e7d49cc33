"""Cells as processes on this machine: one at a time on a CPU, one per device where there are GPUs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from fieldmark.errors import ResourceError
from fieldmark.runs.environment import count_slots, open_cluster
from fieldmark.study.cell import BOOKS, Job, run_job

SECONDS_TO_SAVE = 120.0


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    place: int
    log: IO[bytes]


class LocalCells:
    """Trains each cell in a process of its own, so that a crash or a leak of memory harms no other.

    Args:
        places: One for each cell that may run at a time: the GPUs it may use, such as ("0",) or ("0", "1"); an empty
            tuple leaves the choice to the cell.
    """

    def __init__(self, places: Sequence[tuple[str, ...]]) -> None:
        self._places = list(places)
        self._children: dict[str, _Child] = {}

    @property
    def num_slots(self) -> int:
        """Cells that may run at a time."""
        return len(self._places)

    def start(self, job: Job) -> None:
        """Begin a cell."""
        place = next(n for n in range(len(self._places)) if n not in {child.place for child in self._children.values()})
        env = dict(os.environ)
        if self._places[place]:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._places[place])
        log = (Path(job.sweep) / BOOKS / f"{job.name}.log").open("ab")
        # A session of its own: Ctrl-C reaches this process alone, which then tells the cells to save.
        process = subprocess.Popen(
            [sys.executable, "-m", "fieldmark.study.cell", str(job.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        self._children[job.name] = _Child(process, place, log)

    def collect(self) -> dict[str, str]:
        """Cells that ended since the last call: name to what the process says of it, "" for nothing amiss."""
        ended: dict[str, str] = {}
        for name, child in list(self._children.items()):
            code = child.process.poll()
            if code is not None:
                child.log.close()
                del self._children[name]
                ended[name] = "" if code in (0, 1) else f"its process ended with {_describe(code)}"
        return ended

    def stop(self) -> None:
        """Ask all cells to save and end, and wait for it; a cell that takes longer than two minutes is killed."""
        for child in self._children.values():
            child.process.terminate()
        for child in self._children.values():
            try:
                child.process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.log.close()
        self._children.clear()


def find_places(devices_per_cell: int) -> list[tuple[str, ...]]:
    """Groups of GPUs for cells to run on at a time; one group without a name where there are too few."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    else:
        names = _gpu_numbers()
    groups = [tuple(names[start : start + devices_per_cell]) for start in range(0, len(names), devices_per_cell)]
    return [group for group in groups if len(group) == devices_per_cell] or [()]


def _gpu_numbers() -> list[str]:
    # Asked of the driver's tool: importing torch for the count takes seconds and a context on the GPU.
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def _describe(code: int) -> str:
    import signal

    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return name + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


MAX_RETRIES = 3


class RayCells:
    """Trains each cell as a Ray task.

    Tasks, not Ray Tune: the sweep already knows what to run, keeps its state in the run folders and stops poor cells by
    them, and Ray's own retry restarts a cell whose worker or machine died; the cell finds its folder and resumes.

    Args:
        address: Of the cluster, such as `auto` or `ray://host:10001`; "" starts one on this machine.
        cpus: Cores that a cell takes.
        gpus: GPUs that a cell takes, where the cluster has any.

    Raises:
        MissingExtraError: Ray is not installed.
        ResourceError: There is no cluster at the address, or no machine in it has room for a cell.
    """

    def __init__(self, address: str, *, cpus: int, gpus: int) -> None:
        self._ray, self._owns = open_cluster(address)
        self._needs = {"CPU": float(cpus), "GPU": float(gpus) if self._ray.cluster_resources().get("GPU") else 0.0}
        self._task: Any = self._ray.remote(max_calls=1, max_retries=MAX_RETRIES)(_train_cell)
        self._running: dict[str, Any] = {}
        if not self.num_slots:
            self.stop()
            raise ResourceError(
                f"a cell needs {cpus} CPUs and {gpus} GPUs on one machine, and no machine of the Ray cluster has them"
            )

    @property
    def num_slots(self) -> int:
        """Cells that the cluster, as it is now, has room for."""
        return count_slots(self._ray, self._needs)

    def start(self, job: Job) -> None:
        """Begin a cell."""
        # Whether the parent lives is Ray's to watch: a worker's parent is the cluster's, not the sweep's.
        alone = replace(job, parent=0)
        options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "name": job.name}
        self._running[job.name] = self._task.options(**options).remote(alone)

    def collect(self) -> dict[str, str]:
        """Cells that ended since the last call: name to what Ray says of it, "" for nothing amiss."""
        if not self._running:
            return {}
        references = list(self._running.values())
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        ended: dict[str, str] = {}
        for name, reference in list(self._running.items()):
            if reference in ready:
                del self._running[name]
                try:
                    self._ray.get(reference)
                    ended[name] = ""
                except self._ray.exceptions.RayError as error:
                    ended[name] = f"its worker was lost {MAX_RETRIES + 1} times: {str(error).splitlines()[0]}"
        return ended

    def stop(self) -> None:
        """Give up what is running, and leave the cluster."""
        for reference in self._running.values():
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._owns:
            self._ray.shutdown()


def _train_cell(job: Job) -> str:
    with (
        (Path(job.sweep) / BOOKS / f"{job.name}.log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return run_job(job).state
