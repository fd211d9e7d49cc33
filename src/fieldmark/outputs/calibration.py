"""The calibration of a run: fitted on its stored validation predictions, kept in its folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fieldmark.engine.calibrate import Calibration, calibrate
from fieldmark.errors import RunError

if TYPE_CHECKING:
    from fieldmark.experiment.folder import Run

FILE = "calibration.json"


def calibrate_run(
    run: Run, *, wanted: str, wanted_value: float, assurance: float, folds: int, seed: int
) -> Calibration:
    """Fit temperature and threshold on the validation photos of a run and keep them in its folder.

    predict, serve and export use them from then on. See `engine.calibrate.calibrate` for the arguments.

    Raises:
        RunError: No validation predictions are stored.
        DataError: What is wanted cannot be had.
    """
    from fieldmark.experiment.folder import write_json

    stored = run.predictions("val")
    found = calibrate(
        log_probabilities(stored.probabilities),
        stored.labels,
        wanted=wanted,
        wanted_value=wanted_value,
        assurance=assurance,
        folds=folds,
        seed=seed,
    )
    write_json(run.path / FILE, found.to_dict())
    return found


def load_calibration(run: Run) -> Calibration | None:
    """The calibration in a run's folder, or None if there is none.

    Raises:
        RunError: It cannot be read.
    """
    path = run.path / FILE
    if not path.is_file():
        return None
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON: {error}; remove it and calibrate again") from None


def log_probabilities(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K) logits up to a constant per row. Probabilities that float32 rounds to 0 count as its smallest number."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
