"""`fieldmark extend RUN PHOTOS`: new photos and classes for a run whose backbone stays as it is.

Shape letters: N photos, F features, K classes.
"""

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fieldmark.budget.candidates import change
from fieldmark.budget.heads import fit_head, refit_head
from fieldmark.budget.race import FEW_FOLDS, STORED, Features, make_folds
from fieldmark.budget.shelf import Answer, Model, Shelf, choose_temperature
from fieldmark.config import Config
from fieldmark.data.folders import quote
from fieldmark.data.index import join_indexes
from fieldmark.data.tables import write_csv
from fieldmark.errors import DataError, RunError, command
from fieldmark.files import fill_template, whole_folder
from fieldmark.inference.predictor import predict_features
from fieldmark.models.classifier import Classifier, count_parameters
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import folder
from fieldmark.runs.dataset import Dataset, prepare_dataset
from fieldmark.runs.folder import Run, format_accuracy
from fieldmark.runs.train import next_steps
from fieldmark.study.statistics import paired_difference

TABLE = "photos.csv"  # all photos of an extended run with their splits, for a full training


def extend(
    run: Run | str | Path, photos: str | Path, out: str | Path, *, force: bool = False, progress: Progress | None = None
) -> Run:
    """Teach a finished run more photos, of old classes or new ones, by a new head on its backbone's features.

    The backbone stays. Features of the old photos are those that the run keeps, or are computed once and kept there.
    The new head is linear, whatever the old one was; each member of an ensemble gets its own.

    Args:
        run: A finished run, or an ensemble.
        photos: Folder of class folders, or a table, of new photos; split as the run's settings say.
        out: Run folder to make; must not exist.
        force: Extend also where the old classes' validation accuracy falls beyond its 95 % interval, or where the run
            has no validation photos to show whether it does.
        progress: Reports how far the work is.

    Returns:
        The extended run, an ordinary one; `summary["extended"]` says what became of the old classes.

    Raises:
        RunError: The run is not finished, or its classes would be recognized less often. Nothing was written.
        DataError: No photo is new.

    Examples:
        >>> more = fieldmark.extend("runs/mine", "more-photos", "runs/more", force=True)
        >>> more.classes
        ('jay', 'owl', 'robin', 'wren')
    """
    began, log = time.monotonic(), progress or Quiet()
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out, or remove it")
    if (status := folder.run_status(run.path)) != "finished":
        raise RunError(f"{run.path} is not finished (its status is {status!r}): resume it first")
    dataset = _gather(run, photos, log)
    index = dataset.index
    members = run.members
    networks = [member.load_model() for member in members]
    features = [_collect_features(run, *parts, dataset, log) for parts in zip(members, networks, strict=True)]
    keys = [row["name"] for row in run.ensemble_info["members"]] if run.is_ensemble else ["extended"]
    models = [_fit(dataset, *parts, out) for parts in zip(keys, members, networks, features, strict=True)]
    num_new, new_classes = len(index) - len(run.split), [name for name in index.classes if name not in run.classes]
    answer = Answer(f"{run.name}, extended by {num_new} photos", tuple(models))
    old = _compare_old(run, dataset, answer)
    if not old and not force:
        raise RunError(f"{run.path} has no validation photos to show what its classes would lose. To go on: --force")
    if old and old["high"] < 0 and not force:
        raise RunError(
            f"the old classes would be recognized less often, so nothing was written: {_describe_old(old)}. Train on "
            "all photos together, or take the loss with --force"
        )
    reasons: list[str] = []  # for a full training
    if new_classes and any(one.config.train.epochs and one.config.model.freeze != "all" for one in members):
        reasons.append("the backbone was fine-tuned for the old classes alone")
    if 2 * num_new > len(run.split):
        reasons.append(f"there are {num_new} new photos beside {len(run.split)} old ones")
    with whole_folder(out) as part:
        shelf = Shelf(part, dataset, train=index.numbers("train"), val=index.numbers("val"))
        shelf.open(_configure(run.config, dataset, out))
        shelf.settle(answer)
        shelf.clear(answer)
        for model, found in zip(models, features, strict=True):
            found.save(shelf.place(answer, model) / STORED, kind=torch.float16)
        rows = [(str(Path(index.root, one.path)), one.label or "", one.split, one.group) for one in index.photos]
        write_csv(part / TABLE, ("path", "label", "split", "group"), rows)
        extended = {"run": str(run.path), "photos": num_new, "classes": new_classes, "old": old, "advice": reasons}
        summary = {"status": "finished", "kept": answer.name, "extended": extended, "epochs": 0, "best_epoch": 0}
        summary |= {"seconds": time.monotonic() - began, "val": shelf.score(answer)}
        folder.write_json(part / folder.SUMMARY, summary)
    return Run(out)


def _gather(run: Run, photos: str | Path, log: Progress) -> Dataset:
    """The photos of a run in their order, then the new ones."""
    own = {"path": str(photos), "train_on": "train", "corrections": "", "folds": 0}
    settings = run.config.data.model_copy(update=own)
    more = prepare_dataset(settings, progress=log, skip="give a folder without them", known=run.classes)
    log.message("\n".join(more.notes))
    index = replace(more.index, root=Path(more.index.root).resolve())
    if settings.group_by == "capture_time":  # bursts are numbered anew for each folder
        bursts = index.photos.groups
        bursts = replace(bursts, words=[f"{photos}: {burst}" for burst in bursts.words])
        index = replace(index, photos=replace(index.photos, groups=bursts))
    joined = join_indexes(run.split, index)
    if len(joined) == len(run.split):
        raise DataError(f"all {len(index)} photos of {photos} are in {run.path} already: give new ones")
    return Dataset(joined, (), more.broken)


def _collect_features(run: Run, member: Run, network: Classifier, dataset: Dataset, log: Progress) -> Features:
    """Features of all photos that learn or validate, by one network; those of old photos are kept in its folder."""
    used = np.sort(np.concatenate([dataset.index.numbers("train"), dataset.index.numbers("val")]))
    old, new = used[used < len(run.split)], used[used >= len(run.split)]
    known = Features.load(member.path / STORED)
    missing = np.setdiff1d(old, known.numbers)
    compute = partial(predict_features, member, dataset.index, network=network, progress=log)
    if len(missing):
        if not (first := run.split.files()[missing[0]]).is_file():
            lacks = f"{member.path} keeps no features of {len(missing)} of its photos"
            raise RunError(f"{lacks}, and {first} is gone. Bring the photos back, or train on all photos together")
        log.message(f"features of {len(missing)} old photos: computed once, and kept in {member.path}")
        known = known.join(missing, compute(missing))
        known.save(member.path / STORED, kind=torch.float16)
    log.message(f"features of {len(new)} new photos")
    return known.join(new, compute(new)) if len(new) else known


def _fit(dataset: Dataset, key: str, member: Run, network: Classifier, features: Features, out: Path) -> Model:
    """The network of a run with a head for all classes, fitted on the training photos."""
    labels, index = dataset.labels, dataset.index
    train, val, num_classes = index.numbers("train"), index.numbers("val"), len(index.classes)
    folds = make_folds(labels[train], index.photos.groups[train], folds=FEW_FOLDS, seed=member.config.train.seed)
    head = fit_head(features.select(train), labels[train], folds, num_classes=num_classes)
    answers = head.answer(features.select(val))
    if member.config.data.train_on == "train+val":  # what is said of the validation photos stays the first head's
        everything = np.concatenate([train, val])
        head = refit_head(features.select(everything), labels[everything], head)
    network.head, info = head.as_linear(), member.model_info
    create = {**info["create"], "num_classes": num_classes, "head": "linear"}
    described = {**info, "create": create, "parameters": count_parameters(network)}
    config, temperature = _configure(member.config, dataset, out), choose_temperature(answers, labels[val])
    model = Model(key, config, described, network.state_dict(), answers, temperature)
    prior = np.bincount(labels[train], minlength=num_classes) / len(train)
    return model if config.train.class_weights == "none" else model.balance(prior)


def _configure(config: Config, dataset: Dataset, out: Path) -> Config:
    """The settings of the extended run, whose photos are those of its own table."""
    group_by = "column" if any(dataset.index.photos.groups) else "none"
    columns = {f"{name}_column": name for name in ("path", "label", "split", "group")}
    table = {"path": str(out.absolute() / TABLE), "group_by": group_by, "corrections": "", "folds": 0, "fold": 0}
    return change(config, {"data": columns | table, "model": {"head": "linear"}})


def _compare_old(run: Run, dataset: Dataset, answer: Answer) -> dict[str, float]:
    """Accuracy on the run's own validation photos before and after, and the interval of the change; {} without any."""
    if not len(run.split.numbers("val")):
        return {}
    stored, val = run.predictions("val"), dataset.index.numbers("val")
    number = {path: number for number, path in enumerate(run.split.photos.paths)}
    rows = np.searchsorted(val, [number[path] for path in stored.paths])
    before = stored.probabilities.argmax(1) == stored.labels
    after = answer.val[rows].argmax(1) == dataset.labels[val[rows]]
    hits = [hit.astype(np.float64)[None] for hit in (before, after)]
    found = paired_difference(*hits, level=0.95).interval
    return {"before": float(before.mean()), "after": float(after.mean()), **asdict(found)}


def _describe_old(old: dict[str, float]) -> str:
    interval = f"95 % interval of the change {old['low']:+.4f} to {old['high']:+.4f}"
    return f"old validation photos: top-1 {old['before']:.4f} before, {old['after']:.4f} after ({interval})"


def format_extended(run: Run) -> str:
    """Return what became of a run that was extended, for people."""
    values = {"run": run, "training": command("train", run.path / TABLE), "next_steps": next_steps(run)}
    filters = {"quote": quote, "accuracy": format_accuracy, "change": _describe_old}
    return fill_template("extended.md", values | {"found": run.summary["extended"]}, filters=filters)
