"""One cell of a sweep, trained in a process of its own: `python -m fieldmark.study.cell JOB.json`.

All that a cell is told is in its job file, and all that it tells is in its run folder and its outcome file: so a cell
may run on another machine that shares the folder, and whoever restarts the sweep finds out by reading.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from fieldmark.config import Config, parse_config
from fieldmark.errors import FieldmarkError, InterruptedRunError
from fieldmark.runs.folder import METRICS, RECIPE, read_json_lines, run_status, write_json

BOOKS = ".sweep"
"""Folder inside a sweep's for job files, logs and outcomes."""

OutcomeState = Literal["finished", "stopped", "failed", "interrupted"]


@dataclass(frozen=True)
class Job:
    """What a process needs to know to train a cell.

    Attributes:
        sweep: The sweep's folder.
        name: Of the cell, and of its run folder in the sweep's.
        settings: Its resolved recipe.
        trainer: Module with `train(config, out)` and `resume(out)`.
        min_epochs: First rung of successive halving; 0 is off.
        factor: Of successive halving.
        parent: Process without which to stop after the epoch under way; 0 for none.
    """

    sweep: str
    name: str
    settings: dict[str, Any]
    trainer: str
    min_epochs: int
    factor: int
    parent: int

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.sweep) / self.name

    @property
    def path(self) -> Path:
        """The job file."""
        return Path(self.sweep) / BOOKS / f"{self.name}.job.json"

    def save(self) -> None:
        """Write the job file."""
        write_json(self.path, asdict(self))


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `stopped` by successive halving, `failed` with an error."""

    state: OutcomeState
    error: str
    seconds: float

    def save(self, sweep: Path, name: str) -> None:
        """Write it beside the job file."""
        write_json(sweep / BOOKS / f"{name}.outcome.json", asdict(self))


def load_outcome(sweep: Path, name: str) -> Outcome | None:
    """How a cell ended last time; None if it did not, or was killed."""
    try:
        return Outcome(**json.loads((sweep / BOOKS / f"{name}.outcome.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def run_job(job: Job) -> Outcome:
    """Train or resume a cell, and write down how it ended."""
    sweep, started = Path(job.sweep), time.monotonic()
    (sweep / BOOKS / f"{job.name}.outcome.json").unlink(missing_ok=True)
    # A process that outlived its sweep may still be at this cell: it leaves after its epoch.
    with FileLock(sweep / BOOKS / f"{job.name}.lock", timeout=3600):
        try:
            state, error = _train(job), ""
        except InterruptedRunError as interruption:
            state, error = "interrupted", str(interruption)
        except FieldmarkError as problem:
            state, error = "failed", str(problem)
        except Exception as bug:  # one cell's bug must not end the others; its traceback is in the cell's log
            traceback.print_exc()
            state, error = "failed", f"{type(bug).__name__}: {bug}"
    outcome = Outcome(state, error, time.monotonic() - started)
    outcome.save(sweep, job.name)
    return outcome


def _train(job: Job) -> OutcomeState:
    if run_status(job.out) == "finished":
        return "finished"
    config = parse_config(job.settings, job.name)
    module = importlib.import_module(job.trainer)
    train: Callable[[Config, Path], Iterable[Any]] = module.train
    resume: Callable[[Path], Iterable[Any]] = module.resume
    reports = resume(job.out) if (job.out / RECIPE).is_file() else train(config, job.out)
    for report in reports:
        if report.epoch < config.train.epochs and _is_poor(job, config, report.epoch):
            return "stopped"
        if job.parent and os.getppid() != job.parent and report.epoch < config.train.epochs:
            return "interrupted"
    return "finished"


def _is_poor(job: Job, config: Config, epoch: int) -> bool:
    if not job.min_epochs or not is_rung(epoch, min_epochs=job.min_epochs, factor=job.factor):
        return False
    return is_poor(values_at(Path(job.sweep), config.train.metric, epoch), job.name, factor=job.factor)


def is_rung(epoch: int, *, min_epochs: int, factor: int) -> bool:
    """Whether cells are compared after this epoch: at min_epochs · factor^k."""
    rung = min_epochs
    while rung < epoch:
        rung *= factor
    return rung == epoch


def is_poor(values: dict[str, float], name: str, *, factor: int) -> bool:
    """Whether a cell is not among the best one in `factor` of those that came as far.

    Args:
        values: Cell name to value at the rung, higher is better, this cell's included.
        name: This cell.
        factor: Of successive halving; with fewer values than this nothing is stopped.

    Source:
        Li et al., "A System for Massively Parallel Hyperparameter Tuning", arXiv:1810.05934, section 3, in the form
        that stops at a rung instead of pausing (as in Ray Tune's AsyncHyperBandScheduler).
    """
    if len(values) < factor or name not in values:
        return False
    num_better = sum(value > values[name] for value in values.values())
    return num_better >= len(values) // factor


def values_at(sweep: Path, metric: str, epoch: int) -> dict[str, float]:
    """Best value up to an epoch of every cell that came as far; higher is better."""
    from fieldmark.training.metrics import LOWER_IS_BETTER

    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    values: dict[str, float] = {}
    for path in sweep.glob(f"*/{METRICS}"):
        rows = read_json_lines(path)
        if rows and rows[-1]["epoch"] >= epoch:
            seen = [sign * row["val"][metric] for row in rows if row["epoch"] <= epoch and row.get("val")]
            if seen:
                values[path.parent.name] = max(seen)
    return values


def main(path: str) -> int:
    """Run the cell of a job file; 0 unless it failed."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    return 0 if run_job(job).state != "failed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
