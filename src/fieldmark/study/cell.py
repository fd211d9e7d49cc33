"""One cell of a sweep: its folder, and the process that trains it: `python -m fieldmark.study.cell JOB.json`.

All that a cell needs is in its job file, and all that it reports is in its run folder and its outcome file: so a cell
may run on another machine that shares the folder, and a sweep that was killed goes on by reading.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fieldmark.config import Config, load_config, parse_config
from fieldmark.errors import ConfigError, FieldmarkError, RunError
from fieldmark.files import exclusive_lock, write_whole
from fieldmark.runs.folder import METRICS, RECIPE, SUMMARY, flatten, run_status

BOOKS = ".sweep"  # folder inside a sweep's for job files, logs, locks and outcomes
# Keys that change how fast a run is, or how it is described, but not what it learns.
NO_EFFECT = {"description", "loader.workers", "cache.folder", "cache.disk_gigabytes", "train.threads",
             "train.save_minutes", "train.trackers"}  # fmt: skip
SECONDS_TO_WAIT = 3600.0

State = Literal["waiting", "running", "finished", "failed"]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; the name is its folder's, readable and safe on every system."""

    name: str
    config: Config


@dataclass(frozen=True)
class Job:
    """Holds what a process needs to know to train a cell."""

    sweep: str
    name: str
    settings: dict[str, Any]
    trainer: str  # module with `train(config, out)` and `resume(out)`
    parent: int  # process without which to stop after the epoch under way; 0 for none

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.sweep) / self.name

    @property
    def path(self) -> Path:
        """The job file."""
        return book(self.sweep, self.name, "job.json")


def book(sweep: str | Path, name: str, kind: str) -> Path:
    """Path of what a sweep keeps of a cell beside its run folder: job, outcome, log, lock."""
    return Path(sweep) / BOOKS / f"{name}.{kind}"


def is_settled(out: Path, cell: Cell) -> bool:
    """Whether nothing is left to do for a cell, by its folder."""
    path = out / cell.name
    if not (path / RECIPE).is_file() or _other_settings(path, cell) or run_status(path) != "finished":
        return False
    is_scored = cell.config.data.train_on == "train+val" or (path / "predictions" / "val.parquet").is_file()
    return is_scored and (path / METRICS).is_file()


def _other_settings(path: Path, cell: Cell) -> list[str]:
    """Settings that matter in which the run in a folder, if there is one, is not the cell's."""
    try:
        there = flatten(load_config(path / RECIPE))
    except ConfigError:
        return []
    return [
        f"{key} {there.get(key)!r} → {value!r}"
        for key, value in flatten(cell.config).items()
        if key not in NO_EFFECT and there.get(key) != value
    ]


def refuse_other_recipe(out: Path, cell: Cell) -> None:
    """Check that a cell's folder does not hold a run of other settings, or say which they are."""
    if others := _other_settings(out / cell.name, cell):
        raise RunError(
            f"{out / cell.name} holds a run of other settings than the grid asks for ({'; '.join(others[:5])}). "
            "Give the sweep another folder, or remove that one"
        )


def clear_broken(out: Path, cell: Cell) -> None:
    """Remove what a cell of this sweep left that can be neither used nor resumed."""
    path = out / cell.name
    if not path.is_dir() or not any(path.iterdir()):
        return
    status = run_status(path)
    if status == "missing" and (path / RECIPE).is_file():
        (path / SUMMARY).unlink(missing_ok=True)  # torn or absent: the run's state says how far it is
    elif status == "finished" or not (path / RECIPE).is_file():
        if not book(out, cell.name, "job.json").is_file():
            raise RunError(f"{path} is not empty and was not made by this sweep: remove it, or choose another folder")
        shutil.rmtree(path)


def run_job(job: Job) -> str:
    """Train or resume a cell, and return its error, "" for none, which is also written beside the job file."""
    outcome = book(job.sweep, job.name, "outcome")
    outcome.unlink(missing_ok=True)
    busy = f"another process has been at work on {job.out} for an hour: end it, and sweep again"
    error = ""
    try:
        # A process that outlived its sweep may still be at this cell: it leaves after its epoch.
        with exclusive_lock(book(job.sweep, job.name, "lock"), busy=busy, wait_seconds=SECONDS_TO_WAIT):
            _train(job)
    except FieldmarkError as problem:
        error = str(problem)
    except Exception as bug:  # one cell's bug must not end the others; its traceback is in the cell's log
        traceback.print_exc()
        error = f"{type(bug).__name__}: {bug}"
    write_whole(outcome, error)
    return error


def _train(job: Job) -> None:
    if run_status(job.out) == "finished":
        return
    config = parse_config(job.settings, job.name)
    trainer = importlib.import_module(job.trainer)
    for report in trainer.resume(job.out) if (job.out / RECIPE).is_file() else trainer.train(config, job.out):
        if job.parent and os.getppid() != job.parent and report.epoch < config.train.epochs:
            return  # the sweep is gone: the next one goes on with this cell


def main(path: str) -> int:
    """Run the cell of a job file; 0 unless it failed."""
    return 1 if run_job(Job(**json.loads(Path(path).read_text(encoding="utf-8")))) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
