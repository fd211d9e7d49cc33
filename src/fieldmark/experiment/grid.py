"""The plan of a sweep: which settings, with which seeds, from one base recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fieldmark.config import Section
from fieldmark.errors import ConfigError


class Range(Section):
    """A distribution to draw a setting's value from."""

    choices: tuple[Any, ...] = ()
    """Values to choose from; then `low` and `high` are not given."""

    low: float | None = None
    """Smallest value."""

    high: float | None = None
    """Largest value."""

    log: bool = False
    """Draw evenly on a logarithmic scale."""

    integer: bool = False
    """Draw whole numbers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("give either choices = [...], or low and high")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low must be below high; got {self.low:g} and {self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"log needs low > 0; got {self.low:g}")
        return self


def uniform(low: float, high: float) -> Range:
    """Draw evenly between two numbers."""
    return Range(low=low, high=high)


def log_uniform(low: float, high: float) -> Range:
    """Draw evenly between two numbers > 0 on a logarithmic scale."""
    return Range(low=low, high=high, log=True)


def choice(*values: Any) -> Range:
    """Draw one of the values."""
    return Range(choices=values)


class Search(Section):
    """Settings drawn one after another instead of listed."""

    method: Literal["random", "bayesian"] = "bayesian"
    """`random`, or the tree-structured Parzen estimator, which learns from the trials before (arXiv:2304.11127)."""

    trials: PositiveInt
    """How many combinations to try."""

    seed: NonNegativeInt = 0
    """Seed of the draws."""

    space: dict[str, Range]
    """Dotted key to distribution."""


class Halving(Section):
    """Stop poor cells early: asynchronous successive halving in its stopping form (ASHA, arXiv:1810.05934)."""

    min_epochs: PositiveInt = 1
    """No cell is stopped before; the first rung."""

    factor: Annotated[int, Field(ge=2)] = 3
    """Each rung is this many times later than the one before, and keeps the best one in so many."""


class Grid(Section):
    """A sweep's file: a base recipe and one of `grid`, `cells` and `search`."""

    description: str = ""
    """What the sweep is to find out."""

    recipe: str | None = None
    """Name of a shipped recipe or path of a TOML file, relative to the grid's; none is the defaults."""

    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Every combination is trained once with each of these as `train.seed`."""

    set: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Settings over the recipe's, for all cells."""

    grid: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Dotted key to list of values; all combinations."""

    cells: tuple[dict[str, Any], ...] = ()
    """Combinations one by one: dotted key to value, and `name` if the cell is to have one."""

    search: Search | None = None
    """Combinations drawn from distributions."""

    halving: Halving | None = None
    """Stop poor cells early."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(map(bool, (self.grid, self.cells, self.search))) != 1:
            raise ValueError("give exactly one of [grid], [[cells]] and [search]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")
        for key, values in dotted(self.grid).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key} must be a list of values; got {values!r}")
        return self


def grid_names() -> list[str]:
    """Names of the grids that are shipped, sorted."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def load_grid(grid: str | Path) -> Grid:
    """Read a grid by the name of a shipped one or by path.

    Raises:
        ConfigError: No such grid, not TOML, or not a valid grid. Names every problem.
    """
    path = Path(grid)
    text = ""
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        elif (_shipped() / f"{grid}.toml").is_file():
            text = (_shipped() / f"{grid}.toml").read_text(encoding="utf-8")
        else:
            names = ", ".join(grid_names())
            raise ConfigError(f"no grid {str(grid)!r}: it is neither a file nor a shipped grid ({names})")
        loaded = parse_grid(tomllib.loads(text), path.name)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    if loaded.recipe and (path.parent / loaded.recipe).is_file():
        return loaded.model_copy(update={"recipe": str(path.parent / loaded.recipe)})
    return loaded


def parse_grid(content: Mapping[str, Any], name: str) -> Grid:
    """Check a grid given as a mapping.

    Raises:
        ConfigError: It is not valid; `name` says where.
    """
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc'])) or 'grid'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ConfigError(f"{name} is not a valid grid:\n  " + "\n  ".join(lines)) from None


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables and dotted keys alike, as dotted keys: TOML reads `mix.prob = 0` as a table in a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shipped() -> Any:
    return resources.files("fieldmark") / "experiment" / "grids"
