"""From settings and a folder to a `Session` that is ready to learn."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from fieldmark.config import Config, dump_config
from fieldmark.data.index import PhotoIndex, save_split_table
from fieldmark.data.loader import Loader, auto_workers
from fieldmark.engine.average import RunningAverage
from fieldmark.engine.loop import EpochTally, TrainState
from fieldmark.errors import DataError, FieldmarkError, ResourceError, RunError
from fieldmark.experiment import build, folder
from fieldmark.experiment.dataset import (
    Dataset,
    Logged,
    Progress,
    Quiet,
    inspect,
    prepare_dataset,
    refusal,
    user_folder,
)
from fieldmark.experiment.environment import describe_environment, usable_cores
from fieldmark.experiment.session import Session
from fieldmark.experiment.tracking import require_trackers
from fieldmark.optim.schedule import schedule_warnings
from fieldmark.vision.model import freeze_stages

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache


Result = TypeVar("Result")


def make_folder(path: Path) -> None:
    """Create the run folder.

    Raises:
        RunError: Something is there already.
        ResourceError: It cannot be created.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_run = (path / folder.STATE).is_file()
        hint = f"Continue it with `fieldmark train --resume {path}`, or" if is_run else "Please"
        raise RunError(f"{path} exists and is not empty. {hint} choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path} cannot be created: {error.strerror}") from None


def open_session(
    config: Config, path: Path, *, start: Literal["new", "again", "resumed"], progress: Progress
) -> Session:
    """Assemble data and model; write what the run folder holds from the start.

    Args:
        config: The settings.
        path: The run folder.
        start: `new` folder, `again` in one that was left before its first save, or `resumed` from its state.
        progress: Where to tell how far the work is.

    Raises:
        FieldmarkError: Any of them is not what it should be.
    """
    require_trackers(config.train.trackers)
    fabric, choices = build.build_fabric(config)
    fabric.launch()
    if start == "new":
        _together(fabric, lambda: make_folder(path) if fabric.is_global_zero else None)
    if fabric.is_global_zero and start == "again":
        for name in (folder.METRICS, folder.EPOCHS):
            (path / name).unlink(missing_ok=True)
    log = Logged(progress, path / folder.LOG) if fabric.is_global_zero else None
    progress = log or Quiet()
    fabric.barrier()
    torch.manual_seed(config.train.seed)
    if config.train.deterministic and fabric.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    if start == "resumed":
        dataset = _together(fabric, lambda: _resumed_dataset(config, path, progress))
    else:
        dataset = _together(fabric, lambda: prepare_dataset(config.data, progress=progress))
    index = dataset.index
    cache, cache_note = _open_cache(config, dataset, fabric, progress)
    workers, workers_note = _workers(config, fabric, is_cached=cache is not None)
    if fabric.device.type == "cpu":
        choices["threads"] = build.choose_threads(config, workers=workers)
        torch.set_num_threads(choices["threads"].value)
    built = _together(fabric, lambda: build.build_model(config, num_classes=len(index.classes)))
    evaluation = build.build_eval_spec(config, built.data)
    session = Session(
        config=config,
        path=path,
        fabric=fabric,
        progress=progress,
        log=log,
        dataset=dataset,
        built=built,
        state=None,  # type: ignore[arg-type]  # set by `begin`, after the probe has changed the model
        evaluation=evaluation,
        cache=cache,
        loader=Loader(workers=workers, threads=usable_cores() if not workers else 1),
        train_numbers=_numbers(index, "train"),
        val_numbers=_numbers(index, "val"),
    )
    if fabric.is_global_zero:
        for line in [*_notes(session, choices), cache_note, workers_note]:
            progress.message(line)
        if start != "resumed":
            _write_beginning(session, choices["precision"].value)
    return session


def _together(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """What `work` gives, or its error once: where the first process has one too, the others leave the word to it."""
    result, problem = None, None
    try:
        result = work()
    except FieldmarkError as error:
        problem = error
    is_told = fabric.broadcast(problem is not None)
    if problem is not None and (fabric.is_global_zero or not is_told):
        raise problem
    if is_told:
        raise SystemExit(2)
    return result  # type: ignore[return-value]  # without a problem it is what `work` gave


def begin(session: Session) -> None:
    """Optimiser, schedule, average and wrappers, around the model as it is now."""
    config, fabric, model = session.config, session.fabric, session.built.model
    train = config.train
    if session.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fabric.to_device(model)
    model.has_frozen_batchnorm = config.model.freeze_batchnorm
    freeze_stages(model, session.phase(0).freeze)
    plain = build.build_optimizer(config, model, precision=fabric.strategy.precision)
    network, optimizer = fabric.setup(_compiled(config, model, fabric), plain)
    per_process = -(-train.batch_size // fabric.world_size)
    session.state = TrainState(
        model=model,
        network=network,
        optimizer=optimizer,
        schedule=build.build_schedule(config, plain, steps_per_epoch=session.steps_per_epoch),
        average=RunningAverage(model, decay=train.ema_decay) if train.ema_decay else None,
        tally=EpochTally.zeros(fabric.device),
        micro_batch_size=min(train.micro_batch_size or per_process, per_process),
    )
    # Dropout draws from torch's own generator, apart on each process.
    torch.manual_seed((train.seed * 1_000_003 + fabric.global_rank) % 2**63)


def _compiled(config: Config, model: torch.nn.Module, fabric: Fabric) -> torch.nn.Module:
    # On the CPU compiling takes a minute and gains nothing; on a GPU, short runs don't earn it back.
    is_long = config.train.epochs >= 10
    wanted = config.train.compile == "on" or (
        config.train.compile == "auto" and fabric.device.type == "cuda" and is_long
    )
    return torch.compile(model) if wanted else model  # type: ignore[return-value]


def fill_cache(config: Config, dataset: Dataset, *, progress: Progress) -> tuple[PhotoCache | None, str]:
    """Open the cache of reduced photos and write what it lacks.

    Returns:
        The cache, or None where there is none; and a line that says what was done.
    """
    settings = config.cache
    if settings.mode == "off" or config.augment.executor == "reference":
        why = "asked for" if settings.mode == "off" else "the reference executor works on whole photos"
        return None, f"cache: off ({why})"

    from fieldmark.data.cache import open_cache

    cache, report = open_cache(
        dataset.index.files(),
        sizes=dataset.sizes,
        mode=settings.mode,
        short_side=settings.short_side,
        folder=Path(settings.folder) if settings.folder else user_folder("photos"),
        disk_gigabytes=settings.disk_gigabytes,
        background=config.data.background,
        max_pixels=config.data.max_pixels,
        threads=usable_cores(),
        progress=progress,
    )
    return cache, str(report)


def _open_cache(config: Config, dataset: Dataset, fabric: Fabric, progress: Progress) -> tuple[PhotoCache | None, str]:
    """One process fills it; the others find it filled."""
    result = fill_cache(config, dataset, progress=progress) if fabric.is_global_zero else None
    fabric.barrier()
    return result or fill_cache(config, dataset, progress=progress)


def _workers(config: Config, fabric: Fabric, *, is_cached: bool) -> tuple[int, str]:
    if config.loader.workers != "auto":
        return config.loader.workers, f"loader: {config.loader.workers} workers, as asked"
    cores = usable_cores() // config.train.devices
    workers, reason = auto_workers(cores=cores, is_cached=is_cached, has_gpu=fabric.device.type != "cpu")
    return workers, f"loader: {workers} workers ({reason})"


def _numbers(index: PhotoIndex, split: str) -> NDArray[np.int64]:
    places = [place for place, photo in enumerate(index.photos) if photo.split == split and photo.label is not None]
    return np.asarray(places, np.int64)


def _resumed_dataset(config: Config, path: Path, progress: Progress) -> Dataset:
    """The very photos of the run, by its own table."""
    run = folder.Run(path)
    index = run.split
    facts = inspect(index, config.data, progress=progress)
    broken = [(photo.path, fact.problem) for photo, fact in zip(index.photos, facts, strict=True) if fact.problem]
    if broken:
        raise DataError("the photos of this run changed since it began. " + refusal(broken, len(index.photos)))
    if index.fingerprint() != run.data_info["fingerprint"]:
        raise DataError(
            f"the photos under {index.root} are not those that {path} began with (their fingerprint differs): "
            "bring them back, or begin a new run"
        )
    return Dataset(index, tuple(facts), ())


def _write_beginning(session: Session, precision: str) -> None:
    path, dataset = session.path, session.dataset
    index = dataset.index
    (path / folder.RECIPE).write_text(dump_config(session.config), encoding="utf-8")
    save_split_table(index, path / folder.SPLIT)
    folder.write_json(path / folder.CLASSES, list(index.classes))
    description = build.describe_model(
        session.built, session.evaluation, precision=precision, channels_last=session.channels_last
    )
    folder.write_json(path / folder.MODEL, description)
    folder.write_json(
        path / folder.DATA,
        {
            "root": str(index.root.resolve()),
            "fingerprint": index.fingerprint(),
            "counts": index.counts(),
            "prior": session.prior.tolist(),
            "ignored": dict(index.ignored),
            "num_broken": len(dataset.broken),
        },
    )
    folder.write_json(path / folder.ENVIRONMENT, describe_environment())
    if dataset.broken:
        with (path / folder.BROKEN).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([("path", "reason"), *dataset.broken])


def _notes(session: Session, choices: dict[str, build.Choice]) -> list[str]:
    """What the user should know before the first update."""
    config = session.config
    index = session.dataset.index
    counts = Counter(photo.split for photo in index.photos)
    splits = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test"))
    notes = [f"data: {len(index.photos)} photos of {len(index.classes)} classes ({splits})"]
    if session.dataset.broken:
        notes.append(f"data: {len(session.dataset.broken)} broken photos left out, listed in {folder.BROKEN}")
    notes.append(f"weights: {session.built.weights.summary()}")
    notes += [f"warning: {text}" for text in session.built.weights.warnings()]
    notes += [f"{name}: {choice.value} ({choice.reason})" for name, choice in choices.items()]
    if config.train.epochs:
        notes += [f"warning: {text}" for text in schedule_warnings(**build.schedule_settings(config))]
    return notes
