"""Ray clusters, for predictions, sweeps and trainings: joined or started here, measured, and left."""

import logging
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from fieldmark.errors import ResourceError, needs_extra


@contextmanager
def open_cluster(address: str) -> Generator[Any]:
    """Join the Ray cluster at an address, or with "" start one here, and leave it at the end; a caller's own stays."""
    # Ray would report its usage to its makers, and a lost worker, which we tell of, in a hundred lines on stdout.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    with needs_extra("ray", "ray"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, or leave the address out"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def require_slots(ray: Any, needs: Mapping[str, float], what: str) -> int:
    """`count_slots`, at least one; the ResourceError says that there is no room for `what`, such as "a worker"."""
    if slots := count_slots(ray, needs):
        return slots
    raise ResourceError(
        f"{what} needs {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs on one machine, and no machine of the Ray "
        "cluster has them"
    )


def count_slots(ray: Any, needs: Mapping[str, float]) -> int:
    """Count the workers of these needs ("CPU", "GPU") that fit into the cluster now, each on one machine."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(math.floor(node.get(kind, 0.0) / n) for kind, n in needs.items() if n) for node in alive)


def worker_needs(ray: Any, *, cpus: int) -> dict[str, float]:
    """What a worker takes: a GPU and its share of the cores, or `cpus` cores where the cluster has no GPU."""
    total = ray.cluster_resources()
    if gpus := total.get("GPU", 0.0):
        return {"CPU": float(max(total.get("CPU", 0.0) // gpus, 1)), "GPU": 1.0}
    return {"CPU": float(cpus), "GPU": 0.0}


def share_out(ray: Any, workers: int, *, at_least: int) -> dict[str, float]:
    """What each of so many workers takes, or of fewer where there is no room: a GPU, or all cores that there are."""
    cores = int(ray.cluster_resources().get("CPU", 0))
    for count in range(workers, at_least - 1, -1):
        for cpus in range(max(cores // count, 1), 0, -1):
            needs = worker_needs(ray, cpus=cpus)
            if count_slots(ray, needs) >= count:
                return {kind: amount for kind, amount in needs.items() if amount}
    raise ResourceError(f"the Ray cluster has no room for {at_least} workers: give fewer --workers, or add machines")
