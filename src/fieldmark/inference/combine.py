"""Several runs as one: an ensemble that averages answers, or a soup that averages weights.

Either is a run folder that predicts alone. Shape letters: N photos, K classes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ResourceError, RunError
from fieldmark.inference.predictor import class_order
from fieldmark.models.classifier import check_parameter_budget
from fieldmark.runs import folder
from fieldmark.runs.folder import WEIGHTS, Run, find_runs

if TYPE_CHECKING:
    from fieldmark.progress import Progress
    from fieldmark.runs.folder import Run


Method = Literal["ensemble", "soup"]

ENSEMBLE_NOTE = (
    "The members were chosen and calibrated with an eye on these photos: on photos that nothing has seen the accuracy "
    "may be lower."
)


def combine(
    runs: Sequence[Run | str | Path],
    out: str | Path,
    *,
    method: Method = "ensemble",
    max_parameters_millions: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """Make one predictor of several finished runs.

    Args:
        runs: At least two runs or their folders, or folders of them such as a sweep, with the same classes and the
            same validation photos.
        out: Folder to make; must not exist. It predicts alone, wherever it is moved.
        method: `ensemble` answers with the mean of the members' calibrated probabilities, at the cost of asking each.
            `soup` is one model with the mean of the weights of those members that do not lower the validation accuracy
            (greedily, best first); it takes runs of one architecture, and the validation photos.
        max_parameters_millions: Budget for all parameters together; None is the smallest that a member's recipe names.
        progress: Where to tell how far the work is.

    Returns:
        What was made, as a run with its own validation figures.

    Raises:
        RunError: The runs do not fit together, or `out` exists.
        ConfigError: Too many parameters. Nothing was written.
        PhotoError: A validation photo that a soup needs broke or vanished.
    """
    from fieldmark.progress import Quiet
    from fieldmark.runs.folder import Run

    if method not in get_args(Method):
        raise RunError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    out = Path(out)
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out, or remove it")
    members = open_combinable([run.path if isinstance(run, Run) else run for run in runs])
    if method == "soup":
        refuse_different_networks(members)
    # A soup is one model, however many it is made of.
    asked = members if method == "ensemble" else members[:1]
    counts = [(name, int(run.model_info["parameters"])) for name, run in zip(member_names(asked), asked, strict=True)]
    budget = check_budget(counts, members, max_millions=max_parameters_millions)
    summary = {
        "status": "finished",
        "combined": f"{method} of {len(members)}",
        "method": method,
        "parameters": sum(count for _, count in counts),
        "max_parameters_millions": budget,
    }
    part = make_part(out)
    try:
        if method == "soup":
            write_soup(members, part, summary, progress or Quiet())
        else:
            _write_ensemble(members, part, summary)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Run(out)


def format_combined(run: Run) -> str:
    """What was made, for people."""
    summary, val = run.summary, run.summary["val"]
    members: dict[str, dict[str, Any]] = summary["members"]
    budget = summary["max_parameters_millions"]
    allowed = "no budget was given" if budget is None else f"the budget is {budget:g} M"
    low, high = val["top1_interval"]
    width = max(map(len, members))
    lines = [f"{summary['combined']}: {run.path}, {summary['parameters'] / 1e6:.2f} M parameters in all ({allowed})"]
    for name, row in members.items():
        kept = "" if row.get("kept", True) else "  left out"
        temperature = f"  temperature {row['temperature']:.3f}" if "temperature" in row else ""
        lines.append(f"  {name:{width}}  top-1 {row['top1']:.4f}{temperature}{kept}")
    lines.append(f"validation: top-1 {val['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    temperatures = {name: row.get("temperature", 1.0) for name, row in members.items()}
    as_they_are = [name for name, temperature in temperatures.items() if temperature == 1]
    if 0 < len(as_they_are) < len(members):
        lines.append(
            f"warning: {', '.join(as_they_are)} not calibrated, but the others are: the surest outvote the rest. "
            "Calibrate all members or none, and combine them again"
        )
    return "\n".join([*lines, summary["note"]])


def _write_ensemble(runs: Sequence[Run], part: Path, summary: dict[str, Any]) -> None:
    from fieldmark.inference.calibration import load_calibration
    from fieldmark.inference.predictor import mean_probabilities

    started = time.perf_counter()
    first, names = runs[0], member_names(runs)
    stored = [run.predictions("val") for run in runs]
    calibrations = [load_calibration(run) for run in runs]
    temperatures = [found.temperature if found else 1.0 for found in calibrations]
    orders = [aligned_order(run, first.classes) for run in runs]
    place = {path: number for number, path in enumerate(stored[0].paths)}
    rows = [_in_order(found.paths, found.probabilities, place, run) for found, run in zip(stored, runs, strict=True)]
    for number, run in enumerate(runs):
        copy_member(run, part / folder.MEMBERS / str(number))
    copy_description(first, part)
    write_model_info(runs, part, {"parameters": summary["parameters"]})
    listed = [
        {"folder": str(number), "name": name, "temperature": temperature}
        for number, (name, temperature) in enumerate(zip(names, temperatures, strict=True))
    ]
    folder.write_json(part / folder.ENSEMBLE, {"members": listed})
    folder.write_predictions(
        part / "predictions" / "val.parquet",
        paths=stored[0].paths,
        labels=stored[0].labels,
        probabilities=mean_probabilities(rows, temperatures, orders),
        classes=first.classes,
    )
    described = {
        name: {"top1": top1(found.probabilities, found.labels), "temperature": temperature,
               "parameters": int(run.model_info["parameters"])}
        for name, found, temperature, run in zip(names, stored, temperatures, runs, strict=True)
    }  # fmt: skip
    seconds = time.perf_counter() - started
    write_summary(part, summary | {"seconds": seconds, "members": described, "note": ENSEMBLE_NOTE})


def _in_order(
    paths: Sequence[str], probabilities: NDArray[np.float32], place: dict[str, int], run: Run
) -> NDArray[np.float32]:
    """Rows in the order of the first member's photos."""
    if set(paths) != set(place):
        raise RunError(f"{run.path} stored predictions of other photos than it validates on: evaluate it again")
    rows = np.empty_like(probabilities)
    rows[[place[path] for path in paths]] = probabilities
    return rows


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
    from fieldmark.inference.evaluation import score_predictions
    from fieldmark.runs.environment import describe_environment

    run = folder.Run(part)
    evaluation = score_predictions(run.predictions("val"), classes=run.classes, prior=run.prior, split="val")
    summary["val"] = {**evaluation.metrics, "top1_interval": list(evaluation.top1_interval)}
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


NOTE = (
    "These photos chose which members were kept, which flatters the accuracy: photos that nothing has seen would tell."
)


def write_soup(runs: Sequence[Run], part: Path, summary: dict[str, Any], progress: Progress) -> None:
    """Fill a run folder with the soup of `runs`, which were checked to fit together.

    Raises:
        RunError: Validation photos are gone.
        PhotoError: One cannot be read.
    """
    from fieldmark.inference.evaluation import evaluate
    from fieldmark.training.checkpoint import greedy_soup, load_saved_weights, save_weights

    started = time.perf_counter()
    names = member_names(runs)
    judge = _SoupJudge(runs[0], names, progress)
    kept, weights = greedy_soup([load_saved_weights(run.path / folder.WEIGHTS) for run in runs], judge)
    progress.message(f"kept {', '.join(names[place] for place in kept)}")
    best = runs[kept[0]]
    copy_description(best, part)
    write_model_info([runs[place] for place in kept], part, best.model_info)
    save_weights(part / folder.WEIGHTS, weights)
    described = {
        name: {"top1": score, "kept": place in kept}
        for place, (name, score) in enumerate(zip(names, judge.scores, strict=False))
    }
    # By the folder itself, so that what it stores is what it will answer.
    evaluate(folder.Run(part), split="val", progress=progress)
    seconds = time.perf_counter() - started
    write_summary(part, summary | {"seconds": seconds, "members": described, "note": NOTE})


class _SoupJudge:
    """Validation accuracy of weights, on one footing: this machine, and the photos as they are now.

    Attributes:
        scores: What was measured, in order: first each member alone, then the soups that were tried.
    """

    def __init__(self, run: Run, names: Sequence[str], progress: Progress) -> None:
        index = run.split
        labels = index.label_numbers()
        places = [place for place, photo in enumerate(index.photos) if photo.split == "val" and labels[place] >= 0]
        gone = [index.photos[place].path for place in places if not (index.root / index.photos[place].path).is_file()]
        if gone:
            raise RunError(
                f"{len(gone)} of the {len(places)} validation photos are not under {index.root} any more (the first is "
                f"{gone[0]!r}), and a soup is made by judging it on them: put them back, or make an ensemble"
            )
        self.scores: list[float] = []
        self._run, self._index, self._names, self._progress = run, index, names, progress
        self._numbers = np.asarray(places, np.int64)
        self._labels = labels[self._numbers]
        self._model = run.load_model()

    def __call__(self, weights: Any) -> float:
        from fieldmark.inference.predictor import predict_photos

        self._model.load_state_dict(weights)
        found = predict_photos(self._run, self._index, self._numbers, progress=self._progress, model=self._model)
        score = top1(found, self._labels)
        what = self._names[len(self.scores)] if len(self.scores) < len(self._names) else "soup with one more"
        self._progress.message(f"{what}: top-1 {score:.4f}")
        self.scores.append(score)
        return score
