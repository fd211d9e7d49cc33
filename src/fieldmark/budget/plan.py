"""A deadline, and every decision that the clock made, as data that a later run can repeat."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from fieldmark.errors import ResourceError, RunError

PLAN = "plan.jsonl"

CPU_MINUTES_OF_TWO_CORES = 10.0
GPU_MINUTES = 60.0

Value = TypeVar("Value")
Clock = Callable[[], float]


def default_minutes(*, cores: int, has_gpu: bool) -> float:
    """Minutes that suit a machine where the user names none: about ten on two cores, an hour on a GPU."""
    if has_gpu:
        return GPU_MINUTES
    return max(min(CPU_MINUTES_OF_TWO_CORES * 2 / max(cores, 1), 20.0), 5.0)


@dataclass
class Plan:
    """What is left of a budget, and the record of what was decided by it.

    A decision that is on record is taken from there, so that a resumed run goes the same way up to where it was left;
    later ones are made by the clock and added. Everything else in a run depends on its settings alone.

    Attributes:
        path: The record: one JSON object a line, with the seconds spent by then.
        seconds: The budget.
        clock: Seconds from any fixed moment; an argument so that tests need not wait.
        spent_before: Seconds of earlier processes of this run.
    """

    path: Path
    seconds: float
    clock: Clock = time.monotonic
    spent_before: float = 0.0
    started: float = field(init=False)
    _recorded: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _position: int = 0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @classmethod
    def resume(cls, path: Path, *, minutes: float | None, clock: Clock = time.monotonic) -> Plan:
        """Take up a record: with what was left of its budget, or with new minutes from now.

        Raises:
            RunError: There is no record, or nothing is left.
        """
        records = _read(path)
        if not records or records[0]["what"] != "budget":
            raise RunError(f"{path} does not begin with a budget: begin a new run with --minutes")
        spent = max(float(record["at"]) for record in records)
        seconds = float(records[0]["value"])
        seconds = spent + 60 * minutes if minutes is not None else seconds
        plan = cls(path, seconds, clock, spent)
        plan._recorded = records
        plan._position = 1
        return plan

    def begin(self) -> None:
        """Write the first line of a new record."""
        self.decide("budget", lambda: self.seconds)

    @property
    def elapsed(self) -> float:
        """Seconds spent, those of earlier processes of this run included."""
        return self.spent_before + self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - self.elapsed

    @property
    def is_repeating(self) -> bool:
        """Whether the next decision is on record."""
        return self._position < len(self._recorded)

    def decide(self, what: str, choose: Callable[[], Value]) -> Value:
        """The recorded decision of this name, or a new one, which is recorded.

        Args:
            what: Its name; the order of names must be the same in every run of the same settings.
            choose: Makes it, from plain values that JSON holds.

        Raises:
            RunError: The record holds another decision here: it was made by another version or other settings.
        """
        if self.is_repeating:
            record = self._recorded[self._position]
            if record["what"] != what:
                raise RunError(
                    f"{self.path} decides {record['what']!r} where this version decides {what!r}: it was made by "
                    "another version. Begin a new run"
                )
            self._position += 1
            return cast(Value, record["value"])
        value = choose()
        self._append({"at": round(self.elapsed, 3), "what": what, "value": value})
        return value

    def take(self, what: str) -> list[Any]:
        """The values of the recorded decisions of this name that come next, each as a tuple if it is a list."""
        found: list[Any] = []
        while self.is_repeating and self._recorded[self._position]["what"] == what:
            value = self._recorded[self._position]["value"]
            found.append(tuple(cast("list[Any]", value)) if isinstance(value, list) else value)
            self._position += 1
        return found

    def records(self) -> list[dict[str, Any]]:
        """Everything decided so far, in order."""
        return _read(self.path)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise ResourceError(f"{self.path} could not be written: {error.strerror}. Free some space") from None
        self._recorded.append(record)
        self._position = len(self._recorded)


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of a record; a torn last line, as a kill leaves it, is cut off the file too."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; there is no plan to go on with") from None
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON lines: {error}. Begin a new run") from None
