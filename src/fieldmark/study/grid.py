"""The plan of a sweep: which settings, with which seeds, from one base recipe."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from fieldmark.config import Section, apply_overrides, load_config, parse_config, read_toml, recipe_names
from fieldmark.errors import ConfigError
from fieldmark.overrides import parse_value
from fieldmark.runs.folder import flatten, format_value
from fieldmark.study.cell import Cell

MAX_NAME = 120
SHIPPED = resources.files("fieldmark") / "study" / "grids"


class Grid(Section):
    """A sweep's file: a base recipe and one of `grid` and `cells`."""

    description: str = ""  # what the sweep is to find out
    # Name of a shipped recipe or path of a TOML file, relative to the grid's; none is the defaults.
    recipe: str | None = None
    seeds: tuple[NonNegativeInt, ...] = (0,)  # every combination is trained once with each of these as `train.seed`
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


def load_grid(grid: str | Path) -> Grid:
    """Read a grid by the name of a shipped one or by path; a ConfigError names every problem."""
    path = Path(grid)
    hint = ". To vary a recipe without a file: fieldmark sweep RECIPE --vary optim.lr=1e-4,1e-3 --seeds 3"
    content = read_toml(str(grid), SHIPPED / f"{grid}.toml", "grid", recipe_names(SHIPPED), hint)
    loaded = parse_grid(content, path.name)
    if loaded.recipe and (path.parent / loaded.recipe).is_file():
        return loaded.model_copy(update={"recipe": str(path.parent / loaded.recipe)})
    return loaded


def vary_recipe(recipe: str, vary: Iterable[str], *, seeds: int) -> Grid:
    """A grid without a file: a recipe, all combinations of `key=value,value` pairs, and the seeds 0 to `seeds` - 1."""
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
    return parse_grid({"recipe": recipe, "seeds": list(range(seeds)), **content}, "the sweep")


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
    listed = [
        (str(cell.get("name", "")), flatten({key: value for key, value in cell.items() if key != "name"}))
        for cell in grid.cells
    ]
    cells = [_make_cell(grid, base, name, changes, seed) for name, changes in listed or product for seed in grid.seeds]
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
