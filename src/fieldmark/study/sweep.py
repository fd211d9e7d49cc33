"""Many runs from one plan: each cell an ordinary run folder, restarted where it is missing or broken.

What has been done is read from the folders, never from a list kept beside them: so a sweep that was killed, moved or
extended goes on with exactly the cells that it lacks.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from fieldmark.config import Config, load_config
from fieldmark.errors import ConfigError, ResourceError, RunError
from fieldmark.files import exclusive_lock
from fieldmark.runs.folder import METRICS, RECIPE, SUMMARY, flatten, read_json_lines, run_status
from fieldmark.study.cell import BOOKS, Job, Outcome, load_outcome
from fieldmark.study.grid import Cell, Grid, ListedCells, Range, SearchedCells, base_settings, load_grid, parse_grid
from fieldmark.study.variants import NO_EFFECT

MAX_INTERRUPTIONS = 3


class Executor(Protocol):
    """Where cells are trained: processes here, or tasks on a cluster."""

    @property
    def num_slots(self) -> int:
        """Cells that may run at a time."""
        ...

    def start(self, job: Job) -> None:
        """Begin a cell."""
        ...

    def collect(self) -> dict[str, str]:
        """Cells that ended since the last call, with what went wrong outside of them."""
        ...

    def stop(self) -> None:
        """Let running cells save and end."""
        ...


def sweep(
    config: Config,
    space: Mapping[str, Any],
    *,
    out: str | Path,
    trials: int | None = None,
    seeds: Sequence[int] = (0,),
    on_status: Callable[[SweepStatus], None] | None = None,
) -> SweepStatus:
    """Train variations of a recipe: all combinations of lists of values, or `trials` draws from distributions.

    Args:
        config: The base.
        space: Dotted key to a list of values, or to `uniform`, `log_uniform` or `choice`.
        out: Folder of the run folders.
        trials: Draws, for distributions; None for lists.
        seeds: Each combination is trained with each.
        on_status: Called whenever something changed.

    Raises:
        ConfigError: `space` mixes lists and distributions, or `trials` does not fit it.
    """
    content: dict[str, Any] = {"set": config.model_dump(mode="json"), "seeds": list(seeds)}
    if trials is None:
        drawn = [key for key, values in space.items() if isinstance(values, Range)]
        if drawn:
            raise ConfigError(f"{drawn[0]} is drawn from a distribution: say how often with trials=20, say")
        content["grid"] = {key: list(values) for key, values in space.items()}
    else:
        listed = [key for key, values in space.items() if not isinstance(values, Range)]
        if listed:
            raise ConfigError(f"{listed[0]} is a list of values: with trials, use fieldmark.choice(...) for it")
        content["search"] = {"trials": trials, "space": dict(space)}
    return run_sweep(parse_grid(content, "sweep"), out, on_status=on_status)


def run_sweep(
    grid: Grid | str | Path,
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
        grid: The plan, its path, or the name of a shipped one.
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
    """
    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    base = base_settings(grid, overrides)
    if data is not None:
        base["data"]["path"] = str(Path(data).resolve())
    out = Path(out).resolve()
    plan = SearchedCells(grid, base, out) if grid.search else ListedCells(grid, base)
    for cell in plan.known():
        refuse_other_recipe(out, cell)
    try:
        (out / BOOKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{out} cannot be created: {error.strerror}") from None
    busy = f"another sweep is at work in {out}: wait for it, or give another folder"
    with exclusive_lock(out / BOOKS / "sweep.lock", busy=busy):
        executor = _open_executor(base, jobs=jobs, ray=ray, ray_cpus=ray_cpus)
        work = _Work(grid, out, plan, executor, trainer, on_status or _ignore)
        try:
            return work.run(poll_seconds)
        finally:
            executor.stop()


def _open_executor(base: Mapping[str, Any], *, jobs: int | None, ray: str | None, ray_cpus: int) -> Executor:
    devices = int(base["train"]["devices"])
    if ray is not None:
        from fieldmark.study.executors import RayCells

        return RayCells(ray, cpus=ray_cpus, gpus=devices)
    from fieldmark.study.executors import LocalCells, find_places

    places = find_places(devices)
    return LocalCells(places if jobs is None else [places[number % len(places)] for number in range(max(jobs, 1))])


def _ignore(status: SweepStatus) -> None:
    del status


class _Work:
    """A sweep under way."""

    def __init__(
        self,
        grid: Grid,
        out: Path,
        plan: ListedCells | SearchedCells,
        executor: Executor,
        trainer: str,
        on_status: Callable[[SweepStatus], None],
    ) -> None:
        self._grid, self._out, self._plan, self._executor = grid, out, plan, executor
        self._trainer, self._on_status = trainer, on_status
        self._statuses: dict[str, CellStatus] = {}
        self._running: dict[str, Cell] = {}
        self._interruptions: dict[str, int] = {}
        self._started = time.monotonic()
        self._epochs_before = 0
        self._shown: SweepStatus | None = None

    def run(self, poll_seconds: float) -> SweepStatus:
        """Until nothing is left to do."""
        for cell in self._plan.known():
            self._note(cell, "waiting")
        while True:
            self._fill()
            self._tell()
            if not self._running:
                return self._status()
            time.sleep(poll_seconds)
            for name, trouble in self._executor.collect().items():
                self._end(self._running.pop(name), trouble)
            for cell in self._running.values():
                self._note(cell, "running")

    def _fill(self) -> None:
        while len(self._running) < max(self._executor.num_slots, 1):
            cell = self._plan.next_cell(self._values())
            if cell is None:
                return
            done = settled_state(self._out, cell)
            if done:
                self._note(cell, done)
                self._epochs_before += self._statuses[cell.name].epoch
                continue
            self._start(cell)

    def _start(self, cell: Cell) -> None:
        refuse_other_recipe(self._out, cell)
        clear_broken(self._out, cell)
        halving = self._grid.halving
        self._note(cell, "running")
        if cell.name not in self._interruptions:
            self._epochs_before += self._statuses[cell.name].epoch
        job = Job(
            sweep=str(self._out),
            name=cell.name,
            settings=cell.config.model_dump(mode="json"),
            trainer=self._trainer,
            min_epochs=halving.min_epochs if halving else 0,
            factor=halving.factor if halving else 2,
            parent=os.getpid(),
        )
        job.save()
        self._executor.start(job)
        self._running[cell.name] = cell

    def _end(self, cell: Cell, trouble: str) -> None:
        outcome = load_outcome(self._out, cell.name)
        if trouble or outcome is None:
            outcome = Outcome("failed", trouble or "its process ended without reporting a result", 0.0)
            outcome.save(self._out, cell.name)
        if outcome.state == "interrupted":
            # Not by us, or we would not be here: a machine is shutting down, say. It goes on elsewhere.
            self._interruptions[cell.name] = self._interruptions.get(cell.name, 0) + 1
            if self._interruptions[cell.name] < MAX_INTERRUPTIONS:
                self._start(cell)
                return
            outcome = replace(outcome, state="failed")
            outcome.save(self._out, cell.name)
        state: State = outcome.state if outcome.state in ("finished", "stopped") else "failed"
        self._note(cell, state, outcome.error)

    def _note(self, cell: Cell, state: State, error: str = "") -> None:
        epoch = completed_epochs(self._out / cell.name)
        self._statuses[cell.name] = CellStatus(cell.name, state, epoch, cell.config.train.epochs, error)

    def _values(self) -> dict[str, float | None]:
        """What each cell that ended came to; None for one that failed."""
        ended = ("finished", "stopped", "failed")
        return (
            {
                name: cell_value(self._out / name) if status.state != "failed" else None
                for name, status in self._statuses.items()
                if status.state in ended
            }
            if self._grid.search
            else {}
        )

    def _status(self) -> SweepStatus:
        cells = tuple(self._statuses.values())
        done = sum(cell.epoch for cell in cells) - self._epochs_before
        left = sum(cell.epochs - cell.epoch for cell in cells if cell.state in ("waiting", "running"))
        mean_epochs = sum(cell.epochs for cell in cells) / len(cells) if cells else 0
        left += mean_epochs * (self._plan.total - len(cells))
        seconds = (time.monotonic() - self._started) * left / done if done else None
        return SweepStatus(self._out, cells, self._plan.total, seconds)

    def _tell(self) -> None:
        status = self._status()
        if self._shown is None or status.cells != self._shown.cells:
            self._shown = status
            self._on_status(status)


def settled_state(out: Path, cell: Cell) -> Literal["finished", "stopped"] | None:
    """How a cell ended, by its folder, if nothing is left to do for it."""
    path = out / cell.name
    if not (path / RECIPE).is_file() or _other_keys(path, cell):
        return None
    if run_status(path) == "finished":
        judged = cell.config.data.train_on == "train+val" or (path / "predictions" / "val.parquet").is_file()
        return "finished" if judged and (path / METRICS).is_file() else None
    outcome = load_outcome(out, cell.name)
    return "stopped" if outcome and outcome.state == "stopped" else None


def cell_value(path: Path) -> float | None:
    """Best value of the run's own metric over its epochs so far; None before the first."""
    from fieldmark.training.metrics import LOWER_IS_BETTER

    metric = load_config(path / RECIPE).train.metric
    rows = read_json_lines(path / METRICS) if (path / METRICS).is_file() else []
    values = [float(row["val"][metric]) for row in rows if row.get("val")]
    if not values:
        return None
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def completed_epochs(path: Path) -> int:
    """Epochs that a run folder tells of."""
    rows = read_json_lines(path / METRICS) if (path / METRICS).is_file() else []
    return int(rows[-1]["epoch"]) if rows else 0


def _other_keys(path: Path, cell: Cell) -> list[str]:
    """Settings in which the run in a folder is not the cell's."""
    try:
        there = flatten(load_config(path / RECIPE))
    except ConfigError:
        return []
    wanted = flatten(cell.config)
    return [f"{key} {there.get(key)!r} → {wanted[key]!r}" for key in wanted if _differ(key, there, wanted)]


def _differ(key: str, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return key not in NO_EFFECT and there.get(key) != wanted[key]


def refuse_other_recipe(out: Path, cell: Cell) -> None:
    """Check that a cell's folder does not hold a run of other settings.

    Raises:
        RunError: It does; the message says which.
    """
    keys = _other_keys(out / cell.name, cell) if (out / cell.name / RECIPE).is_file() else []
    if keys:
        raise RunError(
            f"{out / cell.name} holds a run of other settings than the grid asks for ({'; '.join(keys[:5])}). "
            "Give the sweep another folder, or remove that one"
        )


def clear_broken(out: Path, cell: Cell) -> None:
    """Remove what a cell left that can be neither used nor resumed.

    Raises:
        RunError: The folder was not made by this sweep.
    """
    path = out / cell.name
    if not path.is_dir() or not any(path.iterdir()):
        return
    is_ours = (out / BOOKS / f"{cell.name}.job.json").is_file()
    status = run_status(path)
    if status == "missing" and (path / RECIPE).is_file():
        (path / SUMMARY).unlink(missing_ok=True)  # torn or absent: the run's state says how far it is
    elif status == "finished" or not (path / RECIPE).is_file():
        if not is_ours:
            raise RunError(f"{path} is not empty and was not made by this sweep: remove it, or choose another folder")
        shutil.rmtree(path)


State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class CellStatus:
    """How far one cell is.

    Attributes:
        name: Of its run folder.
        state: `stopped` by successive halving; `failed` with `error`.
        epoch: Completed epochs.
        epochs: Epochs asked for.
        error: Why it failed; "" otherwise.
    """

    name: str
    state: State
    epoch: int
    epochs: int
    error: str


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        out: Its folder.
        cells: All cells known so far, in order.
        total: Cells in all; a search finds its cells as it goes.
        seconds_left: Time to finish at the speed so far; None while that is not known.
    """

    out: Path
    cells: tuple[CellStatus, ...]
    total: int
    seconds_left: float | None

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
