"""Many runs from one plan: each cell an ordinary run folder, restarted where it is missing or broken.

What has been done is read from the folders, never from a list kept beside them: so a sweep that was killed, moved or
extended goes on with exactly the cells that it lacks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fieldmark.data.storage import resolve
from fieldmark.errors import first_line
from fieldmark.files import exclusive_lock
from fieldmark.runs.cluster import count_slots, open_cluster, require_slots
from fieldmark.runs.environment import start_module, usable_cores
from fieldmark.runs.folder import read_metrics, write_json
from fieldmark.study.grid import BOOKS, Cell, Grid, Job, State, base_settings, book, grid_cells, load_grid, run_job

MAX_RETRIES = 3
SECONDS_TO_SAVE = 120.0

# Asked again and again whether a cell that was started has ended: None where it has not, else what is amiss, or "".
Ended = Callable[[], str | None]


@dataclass(frozen=True)
class CellStatus:
    """Says how far one cell is: `epoch` of `epochs`, and why it failed if it did."""

    name: str
    state: State
    epoch: int
    epochs: int
    error: str


@dataclass(frozen=True)
class SweepStatus:
    """Says how far a sweep is."""

    out: Path
    cells: tuple[CellStatus, ...]  # in order
    seconds_left: float | None  # at the speed so far; None while that is not known

    def num(self, state: State) -> int:
        """Cells in a state."""
        return sum(cell.state == state for cell in self.cells)

    @property
    def failed(self) -> list[CellStatus]:
        """Cells that failed, with their errors."""
        return [cell for cell in self.cells if cell.state == "failed"]

    @property
    def runs(self) -> list[Path]:
        """Run folders of the finished cells."""
        return [self.out / cell.name for cell in self.cells if cell.state == "finished"]


def run_sweep(
    grid: Grid | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    ray: str | None = None,
    ray_cpus: int = 1,
    trainer: str = "fieldmark.runs.train",
    on_status: Callable[[SweepStatus], None] | None = None,
    poll_seconds: float = 0.5,
) -> SweepStatus:
    """Train every cell of a grid that is not finished yet.

    Args:
        grid: The plan, its path, the name of a shipped one, or what a file of one holds.
        out: Folder of the run folders; the same again to go on.
        data: `data.path` of all cells; None is what recipe and overrides say.
        overrides: `key=value` pairs over recipe and grid, for all cells.
        jobs: Cells at a time on this machine; None is one per device.
        ray: Address of a Ray cluster, "" for one on this machine, None for no Ray.
        ray_cpus: Cores of a cell on the cluster.
        trainer: Module with `train(config, out)` and `resume(out)`.
        on_status: Called whenever something changed.
        poll_seconds: How often to look.

    Returns:
        How every cell ended. Cells that failed are among them; they raise nothing.

    Raises:
        ConfigError: The grid or a cell's settings are not valid.
        RunError: A cell's folder holds a run of other settings, or another sweep is at work in `out`.

    Examples:
        >>> status = fieldmark.run_sweep("grid.toml", "sweeps/mixing", data="photos")  # or {"grid": {"mix.share": ...}}
        >>> [run.name for run in status.runs]
        ['mix.share=0', 'mix.share=0.4']
    """
    grid = load_grid(grid)
    base = base_settings(grid, overrides)
    if data is not None:
        base["data"]["path"] = resolve(data)
    out = Path(out).resolve()
    cells = grid_cells(grid, base)
    for cell in cells:
        cell.refuse_other_recipe(out)
    busy = f"another sweep is at work in {out}: wait for it, or give another folder"
    with exclusive_lock(out / BOOKS / "sweep.lock", busy=busy):
        executor = _open_executor(base["train"]["devices"], jobs=jobs, ray=ray, ray_cpus=ray_cpus)
        work = _Work(out, iter(cells), executor, trainer, on_status or (lambda _: None))
        try:
            return work.run(cells, poll_seconds)
        finally:
            executor.stop()


@dataclass(eq=False)
class _Work:
    """A sweep under way."""

    out: Path
    cells: Iterator[Cell]
    executor: LocalCells | RayCells
    trainer: str
    on_status: Callable[[SweepStatus], None]
    statuses: dict[str, CellStatus] = field(default_factory=dict[str, CellStatus])
    running: dict[str, tuple[Cell, Ended]] = field(default_factory=dict[str, tuple["Cell", "Ended"]])
    epochs_before: dict[str, int] = field(default_factory=dict[str, int])
    started: float = field(default_factory=time.monotonic)

    def run(self, known: Sequence[Cell], poll_seconds: float) -> SweepStatus:
        """Until nothing is left to do."""
        for cell in known:
            self.note(cell, "waiting")
        shown: SweepStatus | None = None
        while True:
            self.start_cells()
            status = self.status()
            if shown is None or status.cells != shown.cells:
                shown = status
                self.on_status(status)
            if not self.running:
                return status
            time.sleep(poll_seconds)
            for cell, has_ended in list(self.running.values()):
                if (trouble := has_ended()) is None:
                    self.note(cell, "running")
                else:
                    del self.running[cell.name]
                    self.end(cell, trouble)

    def start_cells(self) -> None:
        """Fill the slots that are free; cells that are done take none."""
        while len(self.running) < max(self.executor.num_slots, 1) and (cell := next(self.cells, None)):
            if cell.is_settled(self.out):
                self.note(cell, "finished")
            else:
                self.start(cell)

    def start(self, cell: Cell) -> None:
        cell.refuse_other_recipe(self.out)
        cell.clear_broken(self.out)
        self.note(cell, "running")
        settings = cell.config.model_dump(mode="json")
        job = Job(str(self.out), cell.name, settings, self.trainer, parent=os.getpid())
        write_json(book(self.out, cell.name, "job.json"), asdict(job))
        self.running[cell.name] = cell, self.executor.start(job)

    def end(self, cell: Cell, trouble: str) -> None:
        try:
            trouble = trouble or book(self.out, cell.name, "outcome").read_text(encoding="utf-8")
        except OSError:
            trouble = "its process ended without reporting a result"
        self.note(cell, "failed" if trouble else "finished", trouble)

    def note(self, cell: Cell, state: State, error: str = "") -> None:
        """Keep the status of one cell, with the epochs that its folder reports now."""
        rows = read_metrics(self.out / cell.name)
        epoch = int(rows[-1]["epoch"]) if rows else 0
        self.epochs_before[cell.name] = min(epoch, self.epochs_before.get(cell.name, epoch))
        self.statuses[cell.name] = CellStatus(cell.name, state, epoch, cell.config.train.epochs, error)

    def status(self) -> SweepStatus:
        cells = tuple(self.statuses.values())
        done = sum(cell.epoch for cell in cells) - sum(self.epochs_before.values())
        left = sum(cell.epochs - cell.epoch for cell in cells if cell.state in ("waiting", "running"))
        seconds = (time.monotonic() - self.started) * left / done if done else None
        return SweepStatus(self.out, cells, seconds)


def _open_executor(devices: int, *, jobs: int | None, ray: str | None, ray_cpus: int) -> LocalCells | RayCells:
    if ray is not None:
        return RayCells(ray, cpus=ray_cpus, gpus=devices)
    groups = _find_gpus(devices)
    return LocalCells(groups if jobs is None else [groups[number % len(groups)] for number in range(max(jobs, 1))])


class LocalCells:
    """Trains each cell in a process of its own, so that a crash or a leak of memory harms no other.

    There is one group of GPUs for each cell that may run at a time; an empty one leaves the choice to the cell.
    """

    def __init__(self, groups: Sequence[tuple[str, ...]]) -> None:
        self.num_slots = len(groups)
        self._free = list(groups)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, job: Job) -> Ended:
        """Begin a cell."""
        gpus = self._free.pop(0)
        env = {"OMP_NUM_THREADS": str(max(usable_cores() // self.num_slots, 1))}  # unless there is one already
        env |= os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        with book(job.sweep, job.name, "log").open("ab") as log:
            # Ctrl-C reaches this process alone, which then asks the cells to save.
            path = book(job.sweep, job.name, "job.json")
            process = start_module("fieldmark.study.grid", str(path), output=log, env=env)
        self._processes.append(process)

        def has_ended() -> str | None:
            if (code := process.poll()) is None:
                return None
            self._processes.remove(process)
            self._free.append(gpus)
            return "" if code in (0, 1) else f"its process ended with {_describe_exit(code)}"

        return has_ended

    def stop(self) -> None:
        """Ask all cells to save and end, and wait for it; a cell that takes longer than two minutes is killed."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _find_gpus(devices_per_cell: int) -> list[tuple[str, ...]]:
    """Groups of GPUs for cells to run on at a time; one group without a name where there are too few."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(torch.cuda.device_count())))
    if visible is not None:
        names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    groups = [tuple(names[start : start + devices_per_cell]) for start in range(0, len(names), devices_per_cell)]
    return [group for group in groups if len(group) == devices_per_cell] or [()]


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return name + (" (out of memory?)" if name == "SIGKILL" else "")


class RayCells:
    """Trains each cell as a Ray task.

    Tasks, not Ray Tune: the sweep already knows what to run and keeps its state in the run folders, and Ray's own retry
    restarts a cell whose worker or machine died; the cell finds its folder and resumes.
    """

    def __init__(self, address: str, *, cpus: int, gpus: int) -> None:
        self._running: list[Any] = []
        with ExitStack() as stack:
            self._ray = stack.enter_context(open_cluster(address))
            self._needs = {"CPU": float(cpus), "GPU": float(gpus) if self._ray.cluster_resources().get("GPU") else 0.0}
            require_slots(self._ray, self._needs, "a cell")
            self._task: Any = self._ray.remote(max_calls=1, max_retries=MAX_RETRIES)(_train_cell)
            self._cluster = stack.pop_all()

    @property
    def num_slots(self) -> int:
        """Cells that the cluster, as it is now, has room for."""
        return count_slots(self._ray, self._needs)

    def start(self, job: Job) -> Ended:
        """Begin a cell."""
        # Whether the parent lives is Ray's to watch: a worker's parent is the cluster's, not the sweep's.
        alone = replace(job, parent=0)
        options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "name": job.name}
        reference = self._task.options(**options).remote(alone)
        self._running.append(reference)

        def has_ended() -> str | None:
            if not self._ray.wait([reference], timeout=0)[0]:
                return None
            self._running.remove(reference)
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                return f"its worker was lost {MAX_RETRIES + 1} times: {first_line(error)}"
            return ""

        return has_ended

    def stop(self) -> None:
        """Give up what is running, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._cluster.close()


def _train_cell(job: Job) -> str:
    path = book(job.sweep, job.name, "log")
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        return run_job(job)
