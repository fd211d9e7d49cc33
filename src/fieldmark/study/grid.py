"""The plan of a sweep, and its cells: each a run folder, trained by `python -m fieldmark.study.grid JOB.json`.

All that a cell needs is in its job file, and all that it reports is in its run folder and its outcome file: so a cell
may run on another machine that shares the folder, and a sweep that was killed goes on by reading.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from fieldmark.config import Config, Section, apply_overrides, load_config, parse_config, read_toml, recipe_names
from fieldmark.errors import ConfigError, FieldmarkError, RunError
from fieldmark.files import exclusive_lock, write_whole
from fieldmark.overrides import find_setting, parse_value
from fieldmark.runs.folder import METRICS, RECIPE, SUMMARY, flatten, format_value, run_status

MAX_NAME = 120
SHIPPED = resources.files("fieldmark") / "study" / "grids"
BOOKS = ".sweep"  # folder inside a sweep's for job files, logs, locks and outcomes
# Keys that change how fast a run is, or how it is described, but not what it learns.
NO_EFFECT = {"description", "loader.workers", "cache.folder", "cache.disk_gigabytes", "train.threads",
             "train.save_minutes", "train.trackers"}  # fmt: skip
SECONDS_TO_WAIT = 3600.0

State = Literal["waiting", "running", "finished", "failed"]


class Grid(Section):
    """A sweep's file: a base recipe and one of `grid` and `cells`."""

    description: str = ""  # what the sweep is to find out
    # Name of a shipped recipe or path of a TOML file, relative to the grid's; none is the defaults.
    recipe: str | None = None
    # Every combination is trained once with each of these as `train.seed`; by default with that of the settings.
    seeds: tuple[NonNegativeInt, ...] = (0,)
    set: dict[str, Any] = Field(default_factory=dict[str, Any])  # settings over the recipe's, for all cells
    grid: dict[str, Any] = Field(default_factory=dict[str, Any])  # dotted key to list of values; all combinations
    # Combinations one by one: dotted key to value, and `name` if the cell is to have one.
    cells: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.grid) == bool(self.cells):
            raise ValueError("give either [grid] or [[cells]]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")
        for key, values in flatten(self.grid).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key} must be a list of values; got {values!r}")
        return self


def load_grid(grid: Grid | Mapping[str, Any] | str | Path) -> Grid:
    """Read a grid by the name of a shipped one, by path, or as a file holds it; a ConfigError names every problem."""
    if isinstance(grid, Grid):
        return grid
    if isinstance(grid, Mapping):
        return parse_grid(grid, "the sweep")
    path = Path(grid)
    hint = ". To vary a recipe without a file: fieldmark sweep RECIPE --vary optim.lr=1e-4,1e-3 --seeds 3"
    content = read_toml(str(grid), SHIPPED / f"{grid}.toml", "grid", recipe_names(SHIPPED), hint)
    loaded = parse_grid(content, path.name)
    if loaded.recipe and (path.parent / loaded.recipe).is_file():
        return loaded.model_copy(update={"recipe": str(path.parent / loaded.recipe)})
    return loaded


def vary_recipe(recipe: str, vary: Iterable[str], *, seeds: int | None) -> Grid:
    """A grid without a file: a recipe, all combinations of `key=value,value` pairs, and the seeds 0 to `seeds` - 1.

    Without `seeds` it is trained with that of the settings.
    """
    load_config(recipe)
    axes: dict[str, list[Any]] = {}
    for pair in vary:
        key, _, text = (part.strip() for part in pair.partition("="))
        if not key or not text:
            raise ConfigError(f"--vary takes key=value,value, such as optim.lr=1e-4,1e-3; got {pair!r}")
        if key in axes:
            raise ConfigError(f"--vary {key} is given twice: list all its values in one")
        several = parse_value(f"[{text}]")  # lists as values have commas of their own
        axes[key] = several if isinstance(several, list) else [parse_value(part.strip()) for part in text.split(",")]
    content: dict[str, Any] = {"grid": axes} if axes else {"cells": [{"name": "base"}]}
    content |= {"seeds": list(range(seeds))} if seeds else {}
    return parse_grid({"recipe": recipe, **content}, "the sweep")


def parse_grid(content: Mapping[str, Any], name: str) -> Grid:
    """Check a grid given as a mapping; a ConfigError says by `name` where it is not valid."""
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc'])) or 'grid'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ConfigError(f"{name} is not a valid grid:\n  " + "\n  ".join(lines)) from None


def base_settings(grid: Grid, overrides: Iterable[str]) -> dict[str, Any]:
    """The settings that all cells start from: recipe, the grid's `set`, overrides; paths absolute, for any process."""
    settings = load_config(grid.recipe).model_dump(mode="json")
    apply_overrides(settings, flatten(grid.set))
    apply_overrides(settings, overrides)
    if settings["data"]["path"]:
        settings["data"]["path"] = str(Path(settings["data"]["path"]).resolve())
    if Path(settings["model"]["weights"]).is_file():
        settings["model"]["weights"] = str(Path(settings["model"]["weights"]).resolve())
    return settings


def grid_cells(grid: Grid, base: Mapping[str, Any]) -> list[Cell]:
    """All cells of a `grid` or of `cells`, seeds innermost; no two have one name."""
    axes = flatten(grid.grid)
    product = [("", dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    listed = [(str(cell.pop("name", "")), flatten(cell)) for cell in map(dict[str, Any], grid.cells)]
    seeds = grid.seeds if "seeds" in grid.model_fields_set else (int(base["train"]["seed"]),)
    cells = [_make_cell(grid, base, name, changes, seed) for name, changes in listed or product for seed in seeds]
    # Folders of one name apart from case are one folder on some systems.
    names: set[str] = set()
    for cell in cells:
        if cell.name.casefold() in names:
            raise ConfigError(f"the grid has two cells named {cell.name!r}: list each combination once, under its own "
                              "name")  # fmt: skip
        names.add(cell.name.casefold())
    return cells


def _make_cell(grid: Grid, base: Mapping[str, Any], name: str, changes: Mapping[str, Any], seed: int) -> Cell:
    """One cell; without a name of its own it is named by its changes."""
    changed = ",".join(f"{key}={format_value(value)}" for key, value in changes.items())
    name = (name or changed or "base") + (f",seed={seed}" if len(grid.seeds) > 1 else "")
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    try:
        if "train.seed" in [find_setting(Config, key) for key in changes]:
            raise ConfigError("train.seed: seeds are counted by --seeds N, or listed by `seeds = [...]` in the plan")
        apply_overrides(settings, {**changes, "train.seed": seed})
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None
    return Cell(safe_name(name), parse_config(settings, f"cell {name}"))


def safe_name(text: str) -> str:
    """A folder name of letters, digits and `=,._+-`; what had to be changed is told apart by a few hash digits."""
    safe = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", text).strip(".-") or "cell"
    if safe == text and len(safe) <= MAX_NAME:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: MAX_NAME - 9]}-{digest}"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; the name is its folder's, readable and safe on every system."""

    name: str
    config: Config

    def is_settled(self, out: Path) -> bool:
        """Whether nothing is left to do for it, by its folder."""
        path = out / self.name
        if not (path / RECIPE).is_file() or self._other_settings(path) or run_status(path) != "finished":
            return False
        is_scored = self.config.data.train_on == "train+val" or (path / "predictions" / "val.parquet").is_file()
        return is_scored and (path / METRICS).is_file()

    def _other_settings(self, path: Path) -> list[str]:
        """Settings that matter in which the run in its folder, if there is one, is another."""
        try:
            there = flatten(load_config(path / RECIPE))
        except ConfigError:
            return []
        return [
            f"{key} {there.get(key)!r} → {value!r}"
            for key, value in flatten(self.config).items()
            if key not in NO_EFFECT and there.get(key) != value
        ]

    def refuse_other_recipe(self, out: Path) -> None:
        """Check that its folder does not hold a run of other settings, or say which they are."""
        if others := self._other_settings(out / self.name):
            raise RunError(
                f"{out / self.name} holds a run of other settings than the grid asks for ({'; '.join(others[:5])}). "
                "Give the sweep another folder, or remove that one"
            )

    def clear_broken(self, out: Path) -> None:
        """Remove what this sweep left in its folder that can be neither used nor resumed."""
        path = out / self.name
        if not path.is_dir() or not any(path.iterdir()):
            return
        status = run_status(path)
        if status == "missing" and (path / RECIPE).is_file():
            (path / SUMMARY).unlink(missing_ok=True)  # torn or absent: the run's state says how far it is
        elif status == "finished" or not (path / RECIPE).is_file():
            if not book(out, self.name, "job.json").is_file():
                raise RunError(
                    f"{path} is not empty and was not made by this sweep: remove it, or choose another folder"
                )
            shutil.rmtree(path)


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


def book(sweep: str | Path, name: str, kind: str) -> Path:
    """Path of what a sweep keeps of a cell beside its run folder: job, outcome, log, lock."""
    return Path(sweep) / BOOKS / f"{name}.{kind}"


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
        if job.parent and report.epoch < config.train.epochs and not _has_ancestor(job.parent):
            return  # the sweep is gone: the next one goes on with this cell


def _has_ancestor(process: int) -> bool:
    """Whether a process still waits for this one, perhaps through a launcher, as Python has one on Windows."""
    return process == os.getppid() or process in {parent.pid for parent in psutil.Process().parents()}


def main(path: str) -> int:
    """Run the cell of a job file; 0 unless it failed."""
    return 1 if run_job(Job(**json.loads(Path(path).read_text(encoding="utf-8")))) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
