"""Whether runs can be combined into one model or one ensemble: the checks before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError
from fieldmark.experiment.ensemble import class_order
from fieldmark.experiment.folder import WEIGHTS, Run
from fieldmark.experiment.results import find_runs
from fieldmark.vision.model import check_parameter_budget

# They act in training alone, so weights that differ in them still fit one another.
TRAINING_ONLY = frozenset({"head_dropout", "feature_dropout", "drop_path"})


def open_combinable(paths: Sequence[str | Path]) -> list[Run]:
    """The finished runs among `paths` and in folders of them, at least two, that judged the same photos.

    Raises:
        RunError: They are fewer, not finished, or do not fit together; says which and in what.
    """
    runs = [Run(path) for path in find_runs(paths)]
    if len(runs) < 2:
        raise RunError(f"combining takes at least two runs; got {runs[0].path}. Give more run folders, or a sweep")
    for run in runs:
        if run.is_ensemble:
            raise RunError(f"{run.path} is an ensemble already: give the runs that it was made of")
        if not (run.path / WEIGHTS).is_file():
            raise RunError(f"{run.path} has no weights ({WEIGHTS}): leave it out, or train it again")
    for other in runs[1:]:
        _refuse_different_classes(runs[0], other)
        _refuse_different_photos(runs[0], other)
        _refuse_different_background(runs[0], other)
    return runs


def check_budget(counts: Sequence[tuple[str, int]], runs: Sequence[Run], *, max_millions: float | None) -> float | None:
    """Hold what is to be made against the budget.

    Args:
        counts: (name, parameters) of each model that will be asked.
        runs: What it is made of; where no budget is given, the smallest that one of their recipes names counts.
        max_millions: The budget, in 1e6 parameters, or None.

    Returns:
        The budget that held; None where there is none.

    Raises:
        ConfigError: More parameters in all than the budget; names each count.
    """
    named = [run.config.model.max_parameters_millions for run in runs]
    smallest = min((value for value in named if value is not None), default=None)
    budget = smallest if max_millions is None else max_millions
    if budget is not None:
        check_parameter_budget(counts, max_millions=budget)
    return budget


def refuse_different_networks(runs: Sequence[Run]) -> None:
    """Check that the weights of the runs can be averaged: one architecture, one order of classes, one kind of picture.

    Raises:
        RunError: Two of them differ; says in what.
    """
    first = runs[0]
    for other in runs[1:]:
        differing = [
            f"{key} ({_shown(own)} and {_shown(others)})"
            for key, own, others in _pairs(_network(first), _network(other))
            if own != others
        ]
        if first.classes != other.classes:
            differing.append("the order of classes")
        if differing:
            raise RunError(
                f"{first.path} and {other.path} cannot be one soup: they differ in {', '.join(differing)}, and only "
                "weights of one architecture can be averaged. Combine them with `--method ensemble`"
            )


def validation_rows(run: Run) -> dict[str, str | None]:
    """Path -> label of a run's validation photos.

    Raises:
        RunError: It has none.
    """
    rows = {photo.path: photo.label for photo in run.split.photos if photo.split == "val"}
    if not rows:
        raise RunError(f"{run.path} has no validation photos, and what is combined is judged on them: leave it out")
    return rows


def aligned_order(run: Run, classes: Sequence[str]) -> NDArray[np.int64]:
    """(K,) the run's class number of each name of `classes`, which were checked to be the same names."""
    order = class_order(run.classes, classes)
    assert order is not None
    return order


def _refuse_different_classes(first: Run, other: Run) -> None:
    if class_order(other.classes, first.classes) is None:
        odd = min(set(first.classes) ^ set(other.classes))
        raise RunError(
            f"{first.path} and {other.path} know different classes ({len(first.classes)} and {len(other.classes)}; "
            f"{odd!r} is in one alone): only runs on the same classes can be combined"
        )


def _refuse_different_photos(first: Run, other: Run) -> None:
    own, others = validation_rows(first), validation_rows(other)
    if first.data_info.get("fingerprint") == other.data_info.get("fingerprint") and own == others:
        return
    way_out = "Combine runs on the same split: same data, data.split_seed and fold"
    if own.keys() != others.keys():
        odd = min(own.keys() ^ others.keys())
        raise RunError(
            f"{first.path} and {other.path} have different validation photos ({len(own)} and {len(others)}, "
            f"{len(own.keys() & others.keys())} in common; {odd!r} is in one alone), so no accuracy of the combination "
            f"would be honest: one has learnt from what judges the other. {way_out}"
        )
    for path, label in own.items():
        if others[path] != label:
            raise RunError(
                f"{first.path} and {other.path} disagree on the label of {path!r} ({label!r} and {others[path]!r}). "
                f"{way_out}, and the same corrections"
            )
    for path in own:
        sizes = {_num_bytes(run.split.root / path) for run in (first, other)} - {None}
        if len(sizes) > 1:
            raise RunError(f"{path!r} is another file for {other.path} than for {first.path}. {way_out}")


def _refuse_different_background(first: Run, other: Run) -> None:
    own, others = first.config.data.background, other.config.data.background
    if own != others:
        raise RunError(
            f"{first.path} and {other.path} differ in data.background ({own} and {others}), and a photo is decoded "
            "once for all members: combine runs that agree in it"
        )


def _num_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _network(run: Run) -> dict[str, Any]:
    info = run.model_info
    create = {key: value for key, value in info["create"].items() if key not in TRAINING_ONLY}
    return create | {f"eval.{key}": value for key, value in info["eval"].items()}


def _pairs(own: dict[str, Any], others: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, own.get(key), others.get(key)) for key in dict.fromkeys([*own, *others])]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
