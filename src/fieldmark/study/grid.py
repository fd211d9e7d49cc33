"""The plan of a sweep: which settings, with which seeds, from one base recipe."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fieldmark.config import Section, apply_overrides, load_config, parse_config, read_toml, recipe_names
from fieldmark.errors import ConfigError, needs_extra
from fieldmark.overrides import OLD_KEYS, parse_value
from fieldmark.runs.folder import flatten, format_value, read_metrics
from fieldmark.study.cell import Cell, load_drawn, settled_state
from fieldmark.training.metrics import best_value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_NAME = 120
SHIPPED = resources.files("fieldmark") / "study" / "grids"


class Range(Section):
    """A distribution to draw a setting's value from."""

    choices: tuple[Any, ...] = ()  # values to choose from; then `low` and `high` are not given
    low: float | None = None  # smallest value
    high: float | None = None  # largest value
    log: bool = False  # draw evenly on a logarithmic scale
    integer: bool = False  # draw whole numbers

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
    """Draw evenly between two numbers.

    Examples:
        >>> space = {"model.drop_path": fieldmark.uniform(0.0, 0.3)}  # for fieldmark.sweep
    """
    return Range(low=low, high=high)


def log_uniform(low: float, high: float) -> Range:
    """Draw evenly between two numbers > 0 on a logarithmic scale.

    Examples:
        >>> space = {"optim.lr": fieldmark.log_uniform(1e-5, 1e-2)}  # for fieldmark.sweep
    """
    return Range(low=low, high=high, log=True)


def choice(*values: Any) -> Range:
    """Draw one of the values.

    Examples:
        >>> space = {"optim.name": fieldmark.choice("adamw", "sgd")}  # for fieldmark.sweep
    """
    return Range(choices=values)


class Search(Section):
    """Settings drawn one after another instead of listed."""

    # `random`, or the tree-structured Parzen estimator, which learns from the trials before (arXiv:2304.11127).
    method: Literal["random", "bayesian"] = "bayesian"
    trials: PositiveInt  # how many combinations to try
    seed: NonNegativeInt = 0  # seed of the draws
    space: dict[str, Range]  # dotted key to distribution

    @model_validator(mode="after")
    def _check(self) -> Self:
        if old := set(OLD_KEYS).intersection(self.space):
            raise ValueError(f"{min(old)} is of earlier versions: draw mix.share, the share of batches that are mixed")
        return self


class Halving(Section):
    """Stop poor cells early: asynchronous successive halving in its stopping form (ASHA, arXiv:1810.05934)."""

    min_epochs: PositiveInt = 1  # no cell is stopped before; the first rung
    # Each rung is this many times later than the one before, and keeps the best one in so many.
    factor: Annotated[int, Field(ge=2)] = 3


class Grid(Section):
    """A sweep's file: a base recipe and one of `grid`, `cells` and `search`."""

    description: str = ""  # what the sweep is to find out
    # Name of a shipped recipe or path of a TOML file, relative to the grid's; none is the defaults.
    recipe: str | None = None
    seeds: tuple[NonNegativeInt, ...] = (0,)  # every combination is trained once with each of these as `train.seed`
    set: dict[str, Any] = Field(default_factory=dict[str, Any])  # settings over the recipe's, for all cells
    grid: dict[str, Any] = Field(default_factory=dict[str, Any])  # dotted key to list of values; all combinations
    # Combinations one by one: dotted key to value, and `name` if the cell is to have one.
    cells: tuple[dict[str, Any], ...] = ()
    search: Search | None = None  # combinations drawn from distributions
    halving: Halving | None = None  # stop poor cells early

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(map(bool, (self.grid, self.cells, self.search))) != 1:
            raise ValueError("give exactly one of [grid], [[cells]] and [search]")
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
    name = _add_seed(name or changed or "base", grid, seed)
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    try:
        apply_overrides(settings, {**changes, "train.seed": seed})
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None
    return Cell(safe_name(name), parse_config(settings, f"cell {name}"))


def _add_seed(name: str, grid: Grid, seed: int) -> str:
    return f"{name},seed={seed}" if len(grid.seeds) > 1 else name


def safe_name(text: str) -> str:
    """A folder name of letters, digits and `=,._+-`; what had to be changed is told apart by a few hash digits."""
    safe = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", text).strip(".-") or "cell"
    if safe == text and len(safe) <= MAX_NAME:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: MAX_NAME - 9]}-{digest}"


def search_cells(grid: Grid, search: Search, base: Mapping[str, Any], out: Path) -> Iterator[Cell]:
    """The trials of a search, each as many cells as there are seeds; a trial is drawn when its first cell is asked for.

    What earlier trials drew is read from their job files, so that a search that was interrupted goes on with the same.
    """
    past: list[tuple[dict[str, Any], list[Cell]]] = []
    for number in range(search.trials):
        name = f"trial-{number:03d}"
        changes = load_drawn(out, safe_name(_add_seed(name, grid, grid.seeds[0])), search.space)
        if changes is None:
            changes = propose(search, [(drawn, _mean_value(out, cells)) for drawn, cells in past])
        cells = [_make_cell(grid, base, name, changes, seed) for seed in grid.seeds]
        past.append((changes, cells))
        yield from cells


def _mean_value(out: Path, cells: Sequence[Cell]) -> float | None:
    """Mean over a trial's cells that ended well, higher is better; None if none did."""
    settled = [cell for cell in cells if settled_state(out, cell)]
    values = [best_value(read_metrics(out / cell.name), cell.config.train.metric) for cell in settled]
    seen = [value for value in values if value is not None]
    return sum(seen) / len(seen) if seen else None


def propose(search: Search, past: Sequence[tuple[Mapping[str, Any], float | None]]) -> dict[str, Any]:
    """The next combination, from those before with their values; higher is better, None is failed or not done.

    Nothing is kept between calls: a study is made anew from `past`, seeded by its length, so that a sweep that was
    interrupted goes on as it would have.
    """
    with needs_extra("optuna", "sweep"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = search.seed * 100_003 + len(past)
    samplers = {"random": optuna.samplers.RandomSampler, "bayesian": optuna.samplers.TPESampler}
    study = optuna.create_study(direction="maximize", sampler=samplers[search.method](seed=seed))
    space = {key: _distribution(values) for key, values in search.space.items()}
    # Choices go by their number: Optuna knows no lists as categories.
    choices = {key: [_plain(item) for item in values.choices] for key, values in search.space.items()}
    for changes, value in past:
        if value is not None:
            params = {key: choices[key].index(_plain(at)) if choices[key] else at for key, at in changes.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    return {
        key: search.space[key].choices[drawn] if choices[key] else drawn
        for key, drawn in study.ask(space).params.items()
    }


def _distribution(values: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices:
        return CategoricalDistribution(list(range(len(values.choices))))
    kind = IntDistribution if values.integer else FloatDistribution
    return kind(**values.model_dump(include={"low", "high", "log"}))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
