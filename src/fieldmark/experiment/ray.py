"""A Ray cluster; and cells as its tasks, where its machines share the sweep's folder."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.experiment.cell import BOOKS, Job, run_job

MAX_RETRIES = 3


def open_cluster(address: str) -> tuple[Any, bool]:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: Of the cluster, such as `auto` or `ray://host:10001`; "" starts one here.

    Returns:
        Ray itself; and whether this call joined, so that who called should leave at the end.

    Raises:
        MissingExtraError: Ray is not installed.
        ResourceError: There is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, or leave the address out"
        ) from None
    return ray, True


def count_slots(ray: Any, needs: Mapping[str, float]) -> int:
    """How many workers of these needs ("CPU", "GPU") fit into the cluster as it is now, each on one machine."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(math.floor(node.get(kind, 0.0) / n) for kind, n in needs.items() if n) for node in alive)


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
