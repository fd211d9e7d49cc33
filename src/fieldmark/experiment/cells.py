"""The cells of a sweep: settings, seeds and the names of their folders."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldmark.config import Config, load_config, parse_config, parse_value
from fieldmark.errors import ConfigError
from fieldmark.experiment.grid import Grid, dotted
from fieldmark.experiment.settings import format_value

MAX_NAME = 120


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Of its folder: readable, and safe on every system.
        changes: Dotted key to value, over the base recipe.
        seed: Its `train.seed`.
        config: All its settings.
    """

    name: str
    changes: Mapping[str, Any]
    seed: int
    config: Config


def base_settings(grid: Grid, overrides: Iterable[str]) -> dict[str, Any]:
    """The settings that all cells start from: recipe, then the grid's `set`, then overrides.

    Paths are made absolute, since a cell may be trained by a process with another working directory.

    Raises:
        ConfigError: No such recipe, or an override without a `=`.
    """
    settings = _with_changes(load_config(grid.recipe).model_dump(mode="json"), dotted(grid.set))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, such as train.epochs=20; got {override!r}")
        settings = _with_changes(settings, dotted({key.strip(): parse_value(text.strip())}))
    if settings["data"]["path"]:
        settings["data"]["path"] = str(Path(settings["data"]["path"]).resolve())
    if Path(settings["model"]["weights"]).is_file():
        settings["model"]["weights"] = str(Path(settings["model"]["weights"]).resolve())
    return settings


def grid_cells(grid: Grid, base: Mapping[str, Any]) -> list[Cell]:
    """All cells of a `grid` or of `cells`, seeds innermost.

    Raises:
        ConfigError: A cell's settings are not valid; or two cells are the same.
    """
    cells = [
        make_cell(base, changes, seed, name=name, seeds=grid.seeds)
        for name, changes in _combinations(grid)
        for seed in grid.seeds
    ]
    # Folders of one name apart from case are one folder on some systems.
    twins = [cell.name for number, cell in enumerate(cells) if cell.name.casefold() in _folded(cells[:number])]
    if twins:
        raise ConfigError(f"the grid has two cells named {twins[0]!r}: list each combination once, under its own name")
    return cells


def make_cell(
    base: Mapping[str, Any], changes: Mapping[str, Any], seed: int, *, name: str, seeds: Sequence[int]
) -> Cell:
    """One cell; the seed is in its name where there are several."""
    stem = name or ",".join(f"{key}={format_value(value)}" for key, value in changes.items()) or "base"
    full = f"{stem},seed={seed}" if len(seeds) > 1 else stem
    settings = _with_changes(base, {**changes, "train.seed": seed})
    return Cell(safe_name(full), dict(changes), seed, parse_config(settings, f"cell {full}"))


def safe_name(text: str) -> str:
    """A folder name of letters, digits and `=,._+-`; what had to be changed is told apart by a few hash digits."""
    safe = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", text).strip(".-") or "cell"
    if safe == text and len(safe) <= MAX_NAME:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: MAX_NAME - 9]}-{digest}"


def _combinations(grid: Grid) -> Iterator[tuple[str, dict[str, Any]]]:
    if grid.cells:
        for cell in grid.cells:
            changes = dotted({key: value for key, value in cell.items() if key != "name"})
            yield str(cell.get("name", "")), changes
        return
    axes = dotted(grid.grid)
    for values in itertools.product(*axes.values()):
        yield "", dict(zip(axes, values, strict=True))


def _folded(cells: Iterable[Cell]) -> set[str]:
    return {cell.name.casefold() for cell in cells}


def _with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for key, value in changes.items():
        table, dot, name = key.partition(".")
        if not dot:
            changed[key] = value
        elif isinstance(section := changed.setdefault(table, {}), dict):
            section[name] = value
    return changed
