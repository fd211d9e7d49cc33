"""How far a sweep is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class CellStatus:
    """How far one cell is.

    Attributes:
        name: Of its run folder.
        state: `stopped` by successive halving; `failed` with `error`.
        epoch: Completed epochs.
        epochs: Epochs asked for.
        error: Why it failed; "" otherwise.
    """

    name: str
    state: State
    epoch: int
    epochs: int
    error: str


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        out: Its folder.
        cells: All cells known so far, in order.
        total: Cells in all; a search finds its cells as it goes.
        seconds_left: Time to finish at the speed so far; None while that is not known.
    """

    out: Path
    cells: tuple[CellStatus, ...]
    total: int
    seconds_left: float | None

    def num(self, state: State) -> int:
        """Cells in a state."""
        return sum(cell.state == state for cell in self.cells)

    @property
    def failed(self) -> list[CellStatus]:
        """Cells that failed, with their errors."""
        return [cell for cell in self.cells if cell.state == "failed"]

    @property
    def runs(self) -> list[Path]:
        """Run folders of the finished cells."""
        return [self.out / cell.name for cell in self.cells if cell.state == "finished"]
