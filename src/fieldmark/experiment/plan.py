"""Which cell comes next: from a list, or from a search that learns from the cells before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fieldmark.config import parse_config
from fieldmark.errors import ConfigError
from fieldmark.experiment.cell import BOOKS
from fieldmark.experiment.cells import Cell, grid_cells, make_cell
from fieldmark.experiment.grid import Grid, Search
from fieldmark.experiment.search import Trial, propose
from fieldmark.experiment.settings import flatten


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
        self._search: Search = grid.search
        self._grid, self._base, self._out = grid, base, out
        self._trials: list[dict[str, Any]] = []
        self._queue: list[Cell] = []
        from fieldmark.engine.metrics import LOWER_IS_BETTER

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
