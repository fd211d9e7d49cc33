"""Decisions about photos: keep, relabel or drop, as the table that `data.corrections` takes."""

from __future__ import annotations

import csv
import threading
from dataclasses import dataclass
from pathlib import Path

from fieldmark.errors import DataError
from fieldmark.files import whole_or_absent

ACTIONS = ("keep", "relabel", "drop")
COLUMNS = ("path", "action", "label")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one photo; `label` is the new one of a relabelled photo, else ""."""

    action: str
    label: str


class Corrections:
    """Decisions by path, written to disk after each change. Calls from several threads are safe.

    Args:
        file: CSV table to read, if it is there, and to write.

    Raises:
        DataError: The table is there and cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._decisions: dict[str, Decision] = {}
        # Each change with what was there before; decisions of earlier sessions can be undone too, newest first.
        self._history: list[tuple[str, Decision | None]] = []
        if file.is_file():
            self._read()

    def get(self, path: str) -> Decision | None:
        """The decision about a photo, if there is one."""
        return self._decisions.get(path)

    def paths(self) -> list[str]:
        """Photos with a decision, the oldest first."""
        with self._lock:
            return list(self._decisions)

    def decide(self, path: str, action: str, label: str) -> None:
        """Decide about a photo; an earlier decision is replaced.

        Raises:
            DataError: Not an action, or a relabelling without a label.
            ResourceError: The table cannot be written; the decision is not taken.
        """
        if action not in ACTIONS:
            raise DataError(f"an action is {', '.join(ACTIONS)}; got {action!r}")
        if action == "relabel" and not label:
            raise DataError(f"{path!r} is to be relabelled: say to which class")
        with self._lock:
            before = self._decisions.pop(path, None)
            self._decisions[path] = Decision(action, label if action == "relabel" else "")
            self._write_or_restore(path, before)
            self._history.append((path, before))

    def undo(self) -> str | None:
        """Take back the latest change; its path, or None if there is none."""
        with self._lock:
            if not self._history:
                return None
            path, before = self._history[-1]
            now = self._decisions.pop(path, None)
            if before is not None:
                self._decisions[path] = before
            self._write_or_restore(path, now)
            self._history.pop()
            return path

    def _write_or_restore(self, path: str, before: Decision | None) -> None:
        try:
            self._write()
        except Exception:
            self._decisions.pop(path, None)
            if before is not None:
                self._decisions[path] = before
            raise

    def _read(self) -> None:
        try:
            with self.file.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = list(csv.DictReader(file))
        except (OSError, csv.Error) as error:
            raise DataError(f"the corrections {self.file} cannot be read: {error}") from None
        for row in rows:
            if not set(COLUMNS) <= set(row) or row["action"] not in ACTIONS:
                raise DataError(
                    f"{self.file} is not a table of corrections (path,action,label): give another --out, or mend it"
                )
            self._decisions[row["path"]] = Decision(row["action"], row["label"] or "")
            self._history.append((row["path"], None))

    def _write(self) -> None:
        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                table = csv.writer(file)
                table.writerow(COLUMNS)
                table.writerows((path, it.action, it.label) for path, it in self._decisions.items())

        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole_or_absent(self.file, write)
