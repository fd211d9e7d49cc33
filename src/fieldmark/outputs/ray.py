"""Parts of a prediction made by Ray Data, on a cluster whose machines share the folder of the parts and the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.experiment.ray import count_slots, open_cluster
from fieldmark.outputs.part_worker import PartDone, PartTask, PartWorker


class RayParts:
    """Makes each part in one of as many actors as the cluster has room for, each with a predictor of its own.

    Ray Data hands the numbers of missing parts to an actor pool and starts actors anew that died; the part of a dead
    actor is made again from its piece, as often as `PartWorker` has it. Photos, pixels and predictions do not pass
    through Ray: a piece is a list of names, or a shard, which the worker reads, and a part is a file, which it writes.

    Args:
        address: As in `open_cluster`.
        cpus: Cores of an actor, where the cluster has no GPU; with GPUs each actor has one, and its share of the cores.

    Raises:
        MissingExtraError: Ray is not installed.
        ResourceError: There is no cluster at the address, or no machine in it has room for an actor.
    """

    def __init__(self, address: str, *, cpus: int) -> None:
        self._ray, self._owns = open_cluster(address)
        total = self._ray.cluster_resources()
        num_gpus = total.get("GPU", 0.0)
        self._needs = {"CPU": float(cpus), "GPU": 0.0}
        if num_gpus:
            self._needs = {"CPU": float(max(total.get("CPU", 0.0) // num_gpus, 1)), "GPU": 1.0}
        self._num_slots = count_slots(self._ray, self._needs)
        if not self._num_slots:
            self.stop()
            raise ResourceError(
                f"a worker needs {self._needs['CPU']:g} CPUs and {self._needs['GPU']:g} GPUs on one machine, and no "
                "machine of the Ray cluster has them"
            )

    @property
    def threads(self) -> int:
        """Of one worker."""
        return int(self._needs["CPU"])

    def run(self, task: PartTask, numbers: Sequence[int]) -> Iterator[PartDone]:
        """Make these parts, in any order."""
        try:
            import ray.data as ray_data
        except ImportError as error:
            raise MissingExtraError(error.name or "ray[data]", "ray") from None
        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # A block a part: what is done is told at once, and a worker that dies loses no more than one.
        waiting = ray_data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers))
        made = waiting.map_batches(
            _PartActor,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=ray_data.ActorPoolStrategy(size=min(self._num_slots, len(numbers))),
            num_cpus=self._needs["CPU"],
            num_gpus=self._needs["GPU"] or None,
        )
        for row in made.iter_rows():
            yield PartDone(int(row["number"]), int(row["rows"]), str(row["problem"]))

    def stop(self) -> None:
        """Leave the cluster."""
        if self._owns:
            self._ray.shutdown()


class _PartActor:
    """`PartWorker` as Ray Data calls it."""

    def __init__(self, task: PartTask) -> None:
        self._worker = PartWorker(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._worker(int(number)) for number in batch["number"]]
        return {
            "number": np.array([part.number for part in done]),
            "rows": np.array([part.rows for part in done]),
            "problem": np.array([part.problem for part in done], dtype=object),
        }
