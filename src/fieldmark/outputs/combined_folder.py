"""What the folders of ensembles and soups share: how they begin, what they say of themselves."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ResourceError
from fieldmark.experiment import folder

if TYPE_CHECKING:
    from fieldmark.experiment.folder import Run


def member_names(runs: Sequence[Run]) -> list[str]:
    """What to call each run: its folder's name, or its path where names are not enough."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def make_part(out: Path) -> Path:
    """A folder beside `out`, to be renamed when it is whole.

    Raises:
        ResourceError: It cannot be created.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise ResourceError(f"{out} cannot be created: {error.strerror}") from None


def write_summary(part: Path, summary: dict[str, Any]) -> None:
    """summary.json with the figures of the stored validation predictions, and where it was made."""
    from fieldmark.experiment.environment import describe_environment
    from fieldmark.experiment.run import judged

    run = folder.Run(part)
    evaluation = judged(run, run.predictions("val"), split="val")
    summary["val"] = {**evaluation.figures, "top1_interval": list(evaluation.top1_interval)}
    folder.write_json(part / folder.ENVIRONMENT, describe_environment())
    folder.write_json(part / folder.SUMMARY, summary)


def copy_description(run: Run, part: Path) -> None:
    """Recipe, classes and photos of the run that stands for all."""
    for name in (folder.RECIPE, folder.CLASSES, folder.DATA, folder.SPLIT):
        shutil.copyfile(run.path / name, part / name)


def write_model_info(runs: Sequence[Run], part: Path, info: dict[str, Any]) -> None:
    """model.json with the licences and pre-training data of all that went in."""
    weights: dict[str, Any] = dict(info.get("weights", {}))
    for key in ("source", "licence", "pretraining"):
        named = [str(run.model_info.get("weights", {}).get(key) or "unknown") for run in runs]
        weights[key] = "; ".join(dict.fromkeys(named))
    folder.write_json(part / folder.MODEL, info | {"weights": weights})


def copy_member(run: Run, path: Path) -> None:
    """Make a folder of all that a run needs to predict."""
    path.mkdir(parents=True)
    for name in (folder.RECIPE, folder.CLASSES, folder.MODEL):
        shutil.copyfile(run.path / name, path / name)
    try:
        # Not a second gigabyte: a run's weights are replaced by a new file, never changed.
        os.link(run.path / folder.WEIGHTS, path / folder.WEIGHTS)
    except OSError:  # another file system, or one without links
        shutil.copyfile(run.path / folder.WEIGHTS, path / folder.WEIGHTS)


def top1(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of (N, K) probabilities whose largest is at the label, of (N,) labels."""
    return float((probabilities.argmax(axis=1) == labels).mean())
