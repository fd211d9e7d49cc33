"""What finished run folders say, as plain data: for comparisons, reports and findings. Needs no weights and no torch.

Shape letters: N photos, K classes, E epochs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.config import Config
from fieldmark.errors import RunError
from fieldmark.experiment.folder import EPOCHS, SUMMARY, Run


@dataclass(frozen=True, eq=False)
class RunResults:
    """One run folder's results.

    Attributes:
        path: The folder.
        config: Its resolved recipe.
        classes: K class names in order of class number.
        photos: N paths of the judged photos, in order of path.
        labels: (N,) int64 class numbers.
        probabilities: (N, K) float32.
        epoch_predictions: (E, N) int64 class numbers after each epoch, where they were kept.
        prior: (K,) float64 share of each class in training.
        metrics: One object per epoch, as in metrics.jsonl.
        summary, model, data, environment: The JSON files of the same name.
    """

    path: Path
    config: Config
    classes: tuple[str, ...]
    photos: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    epoch_predictions: NDArray[np.int64] | None
    prior: NDArray[np.float64]
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) most probable class; of equals, the first."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether each photo was right."""
        return self.predicted == self.labels


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The finished run folders among `paths` and, where a path is a sweep or another folder of runs, right under it.

    Raises:
        RunError: A path is neither a run folder nor holds one, or a run that was named is not finished.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / SUMMARY).is_file():
            if run_status(path) != "finished":
                raise RunError(f"{path} is not finished (its status is {run_status(path)!r}): resume it first")
            inside = [path]
        else:
            inside = sorted(
                entry.parent for entry in path.glob(f"*/{SUMMARY}") if run_status(entry.parent) == "finished"
            )
        if not inside:
            what = "holds no finished run" if path.is_dir() else "does not exist"
            raise RunError(f"{path} {what}: give run folders (with a {SUMMARY}) or a folder of them, such as a sweep")
        found.extend(inside)
    return list(dict.fromkeys(found))


def run_status(path: Path) -> str:
    """The status in a run's summary; "missing" where there is none that can be read."""
    try:
        status = json.loads((path / SUMMARY).read_text(encoding="utf-8")).get("status", "missing")
    except (OSError, ValueError, AttributeError):
        return "missing"
    return str(status)


def load_results(path: str | Path, *, split: str) -> RunResults:
    """Read one run folder.

    Args:
        path: The folder.
        split: `val` or `test`: whose predictions to read.

    Raises:
        RunError: A file that is needed is missing or is not what it should be; the message names it.
    """
    run = Run(path)
    try:
        predictions = run.predictions(split)
        order = sorted(range(len(predictions.paths)), key=predictions.paths.__getitem__)
        return RunResults(
            path=run.path,
            config=run.config,
            classes=run.classes,
            photos=tuple(predictions.paths[number] for number in order),
            labels=predictions.labels[order],
            probabilities=predictions.probabilities[order],
            epoch_predictions=_load_epochs(run.path / EPOCHS, order) if split == "val" else None,
            prior=run.prior,
            metrics=tuple(run.metrics),
            summary=run.summary,
            model=run.model_info,
            data=run.data_info,
            environment=run.environment,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} cannot be read as a run folder: {error}") from error


def _load_epochs(path: Path, order: list[int]) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as content:
        predictions = content["predicted"]
    if predictions.ndim != 2 or predictions.shape[1] != len(order):
        raise ValueError(f"{path.name} holds predictions of shape {predictions.shape}, not of {len(order)} photos")
    return predictions[:, order].astype(np.int64)
