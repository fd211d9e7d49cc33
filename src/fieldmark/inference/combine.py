"""Several runs as one: an ensemble that averages answers, or a soup that averages weights.

Either is a run folder that predicts alone. Shape letters: N photos, K classes.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from fieldmark.data.index import find_split_table
from fieldmark.errors import RunError
from fieldmark.files import fill_template, whole_folder
from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.evaluation import align_rows, evaluate, labeled_photos, score_predictions
from fieldmark.inference.predictor import class_order, mean_probabilities, predict_split
from fieldmark.models.classifier import check_parameter_budget
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import folder
from fieldmark.runs.environment import describe_environment
from fieldmark.runs.folder import WEIGHTS, Run, find_runs, format_accuracy
from fieldmark.training.checkpoint import greedy_soup, load_saved_weights, save_weights

Method = Literal["ensemble", "soup"]

# They act in training alone, so weights that differ in them still fit one another.
TRAINING_ONLY = frozenset({"head_dropout", "feature_dropout", "drop_path"})


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
        progress: Reports how far the work is.

    Returns:
        What was made, as a run with its own validation metrics.

    Raises:
        RunError: The runs do not fit together, or `out` exists.
        ConfigError: Too many parameters. Nothing was written.
        PhotoError: A validation photo that a soup needs broke or vanished.

    Examples:
        >>> both = fieldmark.combine(["runs/mine", "runs/other"], "runs/both")
        >>> fieldmark.Predictor.load(both)("photos/jay/0.png").problem
        ''
    """
    if method not in get_args(Method):
        raise RunError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    out, progress = Path(out), progress or Quiet()
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out, or remove it")
    members = open_combinable(list(map(Path, runs)))
    if method == "soup":
        _refuse_different_networks(members)
    named = [run.config.model.max_parameters_millions for run in members]
    smallest = min((value for value in named if value is not None), default=None)
    budget = smallest if max_parameters_millions is None else max_parameters_millions
    # A soup is one model, however many it is made of.
    asked = members if method == "ensemble" else members[:1]
    counts = [(name, int(run.model_info["parameters"])) for name, run in zip(_name_runs(asked), asked, strict=True)]
    if budget is not None:
        check_parameter_budget(counts, max_millions=budget)
    summary = {
        "status": "finished",
        "combined": f"{method} of {len(members)}",
        "method": method,
        "parameters": sum(count for _, count in counts),
        "max_parameters_millions": budget,
    }
    started = time.perf_counter()
    with whole_folder(out) as part:
        described = _write_soup(members, part, progress) if method == "soup" else _write_ensemble(members, part)
        made = Run(part)
        found = score_predictions(made, made.predictions("val"), "val")
        summary |= {"seconds": time.perf_counter() - started, "members": described}
        summary["note"] = fill_template("note.md", {"method": method})
        summary["val"] = {**found.metrics, "top1_interval": list(found.top1_interval)}
        folder.write_json(part / folder.ENVIRONMENT, describe_environment())
        folder.write_json(part / folder.SUMMARY, summary)
    return Run(out)


def format_combined(run: Run) -> str:
    """Return what was made, for people."""
    members: dict[str, dict[str, Any]] = run.summary["members"]
    as_they_are = [name for name, row in members.items() if row.get("temperature", 1.0) == 1]
    values = {"path": run.path, "summary": run.summary, "as_they_are": as_they_are}
    return fill_template("combined.md", values, filters={"accuracy": format_accuracy})


def open_combinable(paths: Sequence[str | Path]) -> list[Run]:
    """The finished runs among `paths` and in folders of them, at least two, with the same validation photos."""
    runs = [Run(path) for path in find_runs(paths)]
    if len(runs) < 2:
        raise RunError(f"combining takes at least two runs; got {runs[0].path}. Give more run folders, or a sweep")
    for run in runs:
        if run.is_ensemble:
            raise RunError(f"{run.path} is an ensemble already: give the runs that it was made of")
        if not (run.path / WEIGHTS).is_file():
            raise RunError(f"{run.path} has no weights ({WEIGHTS}): leave it out, or train it again")
    first = runs[0]
    for other in runs[1:]:
        if odd := set(first.classes) ^ set(other.classes):
            raise RunError(
                f"{first.path} and {other.path} know different classes ({len(first.classes)} and {len(other.classes)}; "
                f"{min(odd)!r} is in one alone): only runs on the same classes can be combined"
            )
        _refuse_different_photos(first, other)
        own, others = first.config.data.background, other.config.data.background
        if own != others:
            raise RunError(
                f"{first.path} and {other.path} differ in data.background ({own} and {others}), and a photo is "
                "decoded once for all members: combine runs that agree in it"
            )
    return runs


def _refuse_different_photos(first: Run, other: Run) -> None:
    own, others = _validation_labels(first), _validation_labels(other)
    way_out = "Combine runs on the same split: same data, data.split_seed, fold and corrections"
    if odd := own.items() ^ others.items():
        path, label = min(odd, key=lambda photo: photo[0])
        raise RunError(
            f"{first.path} and {other.path} have different validation photos ({len(own)} and {len(others)}, "
            f"{len(own.items() & others.items())} in common; {path!r} as {label!r} is in one alone), so no accuracy of "
            f"the combination would be honest: one was trained on what evaluates the other. {way_out}"
        )
    if first.data_info.get("fingerprint") == other.data_info.get("fingerprint"):
        return
    for path in own:
        files = [Path(run.split.root, path) for run in (first, other)]
        if all(file.is_file() for file in files) and files[0].stat().st_size != files[1].stat().st_size:
            raise RunError(f"{path!r} is another file for {other.path} than for {first.path}. {way_out}")


def _validation_labels(run: Run) -> dict[str, str | None]:
    rows = {photo.path: photo.label for photo in run.split.photos if photo.split == "val"}
    if not rows:
        raise RunError(f"{run.path} has no validation photos, and a combination is evaluated on them: leave it out")
    return rows


def _refuse_different_networks(runs: Sequence[Run]) -> None:
    """Refuse a soup of more than one architecture, order of classes or kind of picture."""
    first, own = runs[0], _describe_network(runs[0])
    for other in runs[1:]:
        others = _describe_network(other)
        odd = [key for key in own | others if own.get(key) != others.get(key)]
        differing = [f"{key} ({own.get(key)} and {others.get(key)})" for key in odd]
        if first.classes != other.classes:
            differing.append("the order of classes")
        if differing:
            raise RunError(
                f"{first.path} and {other.path} cannot be one soup: they differ in {', '.join(differing)}, and only "
                "weights of one architecture can be averaged. Combine them with `--method ensemble`"
            )


def _describe_network(run: Run) -> dict[str, str]:
    info = run.model_info
    create = {key: value for key, value in info["create"].items() if key not in TRAINING_ONLY}
    facts = create | {f"eval.{key}": value for key, value in info["eval"].items()}
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in facts.items()}


def _name_runs(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths where names are not enough."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _copy_description(run: Run, part: Path, runs: Sequence[Run], info: dict[str, Any]) -> None:
    """Recipe, classes and photos of the run that stands for all; model.json with the licenses of all that went in."""
    for name in (folder.RECIPE, folder.CLASSES, folder.DATA, find_split_table(run.path / folder.SPLIT).name):
        shutil.copyfile(run.path / name, part / name)
    weights: dict[str, Any] = dict(info.get("weights", {}))
    for key in ("source", "license", "pretraining"):
        named = [str(run.model_info.get("weights", {}).get(key) or "unknown") for run in runs]
        weights[key] = "; ".join(dict.fromkeys(named))
    folder.write_json(part / folder.MODEL, info | {"weights": weights})


def _write_ensemble(runs: Sequence[Run], part: Path) -> dict[str, Any]:
    first = runs[0]
    stored = [run.predictions("val") for run in runs]
    for run, rows in zip(runs, stored, strict=True):
        if set(rows.paths) != set(stored[0].paths):
            raise RunError(f"{run.path} stored predictions of other photos than it validates on: evaluate it again")
    stored = [align_rows(rows, stored[0].paths) for rows in stored]
    listed: list[dict[str, Any]] = []
    described: dict[str, Any] = {}
    for number, (name, run, rows) in enumerate(zip(_name_runs(runs), runs, stored, strict=True)):
        member = part / folder.MEMBERS / str(number)
        member.mkdir(parents=True)
        for file in (folder.RECIPE, folder.CLASSES, folder.MODEL, WEIGHTS, folder.SUMMARY, folder.CALIBRATION):
            if (run.path / file).is_file():  # all that it needs to predict, also alone
                shutil.copyfile(run.path / file, member / file)
        calibration, parameters = load_calibration(run), int(run.model_info["parameters"])
        temperature = calibration.temperature if calibration else 1.0
        listed.append({"folder": str(number), "name": name, "temperature": temperature})
        top1 = float((rows.probabilities.argmax(axis=1) == rows.labels).mean())
        described[name] = {"top1": top1, "temperature": temperature, "parameters": parameters}
    _copy_description(first, part, runs, {"parameters": sum(row["parameters"] for row in described.values())})
    folder.write_json(part / folder.ENSEMBLE, {"members": listed})
    orders = [class_order(run.classes, first.classes) for run in runs]
    mean = mean_probabilities([rows.probabilities for rows in stored], [row["temperature"] for row in listed], orders)
    rows, path = stored[0], part / "predictions" / "val.parquet"
    folder.write_predictions(path, paths=rows.paths, labels=rows.labels, probabilities=mean, classes=first.classes)
    return described


def _write_soup(runs: Sequence[Run], part: Path, progress: Progress) -> dict[str, Any]:
    """Fill a run folder with the soup of runs that were checked to fit together."""
    names, index = _name_runs(runs), runs[0].split
    numbers = labeled_photos(runs[0], index, "val")
    files, paths = index.files(), index.photos.paths
    gone = [paths[number] for number in numbers if not files[number].is_file()]
    if gone:
        raise RunError(
            f"{len(gone)} of the {len(numbers)} validation photos are not under {index.root} any more (the first is "
            f"{gone[0]!r}), and a soup is made by evaluating it on them: put them back, or make an ensemble"
        )
    model, labels = runs[0].load_model(), index.label_numbers()[numbers]
    scores: list[float] = []

    def evaluate_weights(weights: Mapping[str, Tensor]) -> float:
        """Validation accuracy on one footing: this machine, and the photos as they are now."""
        model.load_state_dict(weights)
        answers = predict_split(runs[0], index, numbers, progress=progress, model=model).argmax(axis=1)
        scores.append(float(np.mean(answers == labels)))
        what = names[len(scores) - 1] if len(scores) <= len(names) else "soup with one more"
        progress.message(f"{what}: top-1 {scores[-1]:.4f}")
        return scores[-1]

    kept, weights = greedy_soup([load_saved_weights(run.path / WEIGHTS) for run in runs], evaluate_weights)
    progress.message(f"kept {', '.join(names[number] for number in kept)}")
    best = runs[kept[0]]
    _copy_description(best, part, [runs[number] for number in kept], best.model_info)
    save_weights(part / WEIGHTS, weights)
    # By the folder itself, so that what it stores is what it will answer.
    evaluate(Run(part), split="val", progress=progress)
    return {name: {"top1": scores[number], "kept": number in kept} for number, name in enumerate(names)}
