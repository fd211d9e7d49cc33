"""What a cell's folder says of it: whether it is done, what it came to, and whether it may be touched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fieldmark.config import load_config
from fieldmark.errors import ConfigError, RunError
from fieldmark.experiment.cell import BOOKS, load_outcome
from fieldmark.experiment.cells import Cell
from fieldmark.experiment.folder import METRICS, RECIPE, SUMMARY, read_json_lines
from fieldmark.experiment.results import run_status
from fieldmark.experiment.settings import NO_EFFECT, flatten


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
    from fieldmark.engine.metrics import LOWER_IS_BETTER

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
