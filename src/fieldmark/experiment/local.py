"""Cells as processes on this machine: one at a time on a CPU, one per device where there are GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fieldmark.experiment.cell import BOOKS, Job

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
            [sys.executable, "-m", "fieldmark.experiment.cell", str(job.path)],
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
        """Ask all cells to save and end, and wait for it; what does not heed within two minutes is killed."""
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
