"""The plan of a sweep: which settings, with which seeds, from one base recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fieldmark.config import Config, Section, apply_overrides, load_config, parse_config
from fieldmark.errors import ConfigError, MissingExtraError
from fieldmark.overrides import parse_value
from fieldmark.runs.folder import flatten, format_value
from fieldmark.study.cell import BOOKS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


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

    def scaled(self, factor: float) -> Range:
        """The same distribution of values `factor` times as large."""
        limits = {name: None if (value := getattr(self, name)) is None else value * factor for name in ("low", "high")}
        return self.model_copy(update={"choices": tuple(value * factor for value in self.choices), **limits})


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
            raise ConfigError(
                f"no grid {str(grid)!r}: it is neither a file nor a shipped grid ({names}). To vary a recipe "
                "without a file: fieldmark sweep RECIPE --vary optim.lr=1e-4,1e-3 --seeds 3"
            )
        loaded = parse_grid(tomllib.loads(text), path.name)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    if loaded.recipe and (path.parent / loaded.recipe).is_file():
        return loaded.model_copy(update={"recipe": str(path.parent / loaded.recipe)})
    return loaded


def vary_recipe(recipe: str, vary: Iterable[str], *, seeds: int) -> Grid:
    """A grid without a file: a recipe, all combinations of `key=value,value` pairs, and the seeds 0 to `seeds` - 1.

    Raises:
        ConfigError: No such recipe, a key twice, or a pair without values.
    """
    load_config(recipe)
    axes: dict[str, list[Any]] = {}
    for pair in vary:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip() or not text.strip():
            raise ConfigError(f"--vary takes key=value,value, such as optim.lr=1e-4,1e-3; got {pair!r}")
        if key.strip() in axes:
            raise ConfigError(f"--vary {key.strip()} is given twice: list all its values in one")
        several = parse_value(f"[{text}]")  # lists as values have commas of their own
        axes[key.strip()] = (
            several if isinstance(several, list) else [parse_value(part.strip()) for part in text.split(",")]
        )
    content: dict[str, Any] = {"grid": axes} if axes else {"cells": [{"name": "base"}]}
    return parse_grid({"recipe": recipe, "seeds": list(range(seeds)), **content}, "the sweep")


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
    """Nested tables and dotted keys alike, as dotted keys: TOML reads `mix.share = 0` as a table in a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shipped() -> Any:
    return resources.files("fieldmark") / "study" / "grids"


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
    apply_overrides(settings, overrides)
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
    try:
        settings = _with_changes(base, {**changes, "train.seed": seed})
    except ConfigError as error:
        raise ConfigError(f"cell {full}: {error}") from None
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
    apply_overrides(changed, changes)
    return changed


class ListedCells:
    """The cells of a grid or a list, in order."""

    def __init__(self, grid: Grid, base: Mapping[str, Any]) -> None:
        self._cells = grid_cells(grid, base)
        self._next = 0

    @property
    def total(self) -> int:
        """Cells in all."""
        return len(self._cells)

    def known(self) -> list[Cell]:
        """Cells that are certain to come."""
        return self._cells

    def next_cell(self, values: Mapping[str, float | None]) -> Cell | None:
        """The next cell, or None after the last; `values` do not matter."""
        del values
        if self._next == len(self._cells):
            return None
        self._next += 1
        return self._cells[self._next - 1]


class SearchedCells:
    """Trials of a search; each is as many cells as there are seeds.

    What earlier trials drew is read from their job files, so that a search that was interrupted goes on with the same.
    """

    def __init__(self, grid: Grid, base: Mapping[str, Any], out: Path) -> None:
        if grid.search is None:
            raise ConfigError("the grid has no [search]")
        self._search = grid.search.model_copy(update={"space": _with_new_names(grid.search.space, base)})
        self._grid, self._base, self._out = grid, base, out
        self._trials: list[dict[str, Any]] = []
        self._queue: list[Cell] = []
        from fieldmark.training.metrics import LOWER_IS_BETTER

        self._higher_is_better = base["train"]["metric"] not in LOWER_IS_BETTER

    @property
    def total(self) -> int:
        """Cells in all."""
        return self._search.trials * len(self._grid.seeds)

    def known(self) -> list[Cell]:
        """None are certain before they are drawn."""
        return []

    def next_cell(self, values: Mapping[str, float | None]) -> Cell | None:
        """The next cell; draws a trial when the one before has all of its cells.

        Args:
            values: Name of each cell that ended to its value; None for one that failed.
        """
        if not self._queue:
            if len(self._trials) == self._search.trials:
                return None
            number = len(self._trials)
            changes = self._drawn_before(number) or propose(
                self._search, self._past(values), higher_is_better=self._higher_is_better
            )
            self._trials.append(changes)
            self._queue = self._cells(number, changes)
        return self._queue.pop(0)

    def _cells(self, number: int, changes: Mapping[str, Any]) -> list[Cell]:
        seeds = self._grid.seeds
        return [make_cell(self._base, changes, seed, name=f"trial-{number:03d}", seeds=seeds) for seed in seeds]

    def _drawn_before(self, number: int) -> dict[str, Any] | None:
        # Names do not depend on what was drawn, so any draw finds the job file.
        name = self._cells(number, {})[0].name
        try:
            job = json.loads((self._out / BOOKS / f"{name}.job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        settings = flatten(parse_config(job["settings"], name))
        return {key: settings[key] for key in self._search.space}

    def _past(self, values: Mapping[str, float | None]) -> list[Trial]:
        """Each trial with its mean over seeds, if at least one of its cells ended well."""
        past: list[Trial] = []
        for number, changes in enumerate(self._trials):
            found = [values.get(cell.name) for cell in self._cells(number, changes)]
            seen = [value for value in found if value is not None]
            past.append(Trial(changes, sum(seen) / len(seen) if seen else None))
        return past


def _with_new_names(space: Mapping[str, Range], base: Mapping[str, Any]) -> dict[str, Range]:
    """`mix.prob`, of each method in earlier versions, as the share of all batches that it is."""
    methods = 1 if base["mix"]["cutmix_share"] in (0, 1) else 2
    return {
        "mix.share" if key == "mix.prob" else key: values.scaled(methods) if key == "mix.prob" else values
        for key, values in space.items()
    }


@dataclass(frozen=True)
class Trial:
    """One combination that was tried: dotted key to value, and what it came to (None: failed or not done)."""

    changes: Mapping[str, Any]
    value: float | None


def propose(search: Search, past: Sequence[Trial], *, higher_is_better: bool) -> dict[str, Any]:
    """The next combination, from those before.

    Nothing is kept between calls: a study is made anew from `past`, seeded by its length, so that a sweep that was
    interrupted goes on as it would have.

    Args:
        search: Distributions and method.
        past: All trials before, in order.
        higher_is_better: Whether values are to rise.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = search.seed * 100_003 + len(past)
    samplers = {"random": optuna.samplers.RandomSampler, "bayesian": optuna.samplers.TPESampler}
    study = optuna.create_study(
        direction="maximize" if higher_is_better else "minimize", sampler=samplers[search.method](seed=seed)
    )
    space = {key: _distribution(key, values) for key, values in search.space.items()}
    for trial in past:
        if trial.value is not None:
            inner = {key: _to_optuna(search.space[key], value) for key, value in trial.changes.items()}
            study.add_trial(optuna.trial.create_trial(params=inner, distributions=space, value=trial.value))
    params = study.ask(space).params
    return {key: _from_optuna(search.space[key], value) for key, value in params.items()}


def _distribution(key: str, values: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices:
        return CategoricalDistribution(list(range(len(values.choices))))
    if values.low is None or values.high is None:
        raise ConfigError(f"search.space.{key}: give either choices = [...], or low and high")
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _to_optuna(values: Range, value: Any) -> Any:
    # Choices go by their number: Optuna knows no lists as categories.
    return [_plain(item) for item in values.choices].index(_plain(value)) if values.choices else value


def _from_optuna(values: Range, value: Any) -> Any:
    return values.choices[value] if values.choices else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
