"""A training under way: its parts, assembled from settings and a folder, and its state on disk.

Shape letters: N photos, K classes, E epochs.
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.augment.mixing import MixSpec, apply_mix, draw_mix, one_hot
from fieldmark.augment.reference import EvalSpec
from fieldmark.config import Config, dump_config
from fieldmark.data.index import PhotoIndex, save_split_table
from fieldmark.data.loader import Loader, auto_workers, cut_plan, epoch_order, shard_plan
from fieldmark.data.workers import Batch
from fieldmark.errors import DataError, FieldmarkError, ResourceError, RunError
from fieldmark.files import whole_or_absent
from fieldmark.models.classifier import freeze_stages, train_only_head_and_norms
from fieldmark.progress import Logged, Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import Dataset, EvalPhotos, PhotoReader, inspect, prepare_dataset, refusal, user_folder
from fieldmark.runs.environment import describe_environment, usable_cores
from fieldmark.runs.tracking import require_trackers
from fieldmark.training import metrics
from fieldmark.training.checkpoint import RunningAverage, load_checkpoint, save_checkpoint, save_weights
from fieldmark.training.evaluate import Predictions, predict_batches
from fieldmark.training.loop import EpochTally, TrainBatch, TrainState

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache


_COUNTS = ("epoch", "step", "step_in_epoch", "micro_batch_size")


@dataclass
class Best:
    """The best validation so far: never forgotten, not even by a resume."""

    value: float | None = None
    epoch: int = -1


@dataclass
class Session:
    """One process's view of a training.

    Attributes:
        config: The settings.
        path: The run folder.
        fabric: Device, precision, processes.
        progress: Where long work tells how far it is.
        log: The same, with a file behind it; None on all processes but the first.
        dataset: Photos, sizes, splits.
        built: Model and weights, and what is known of them.
        state: All that changes while learning.
        evaluation: How a photo becomes the picture that is judged.
        cache: Reduced photos, or None.
        loader: Prepares batches.
        train_numbers: (N,) photo numbers of the training split.
        val_numbers: (N,) photo numbers of the validation split.
        seconds: Training time of earlier processes of this run.
    """

    config: Config
    path: Path
    fabric: Fabric
    progress: Progress
    log: Logged | None
    dataset: Dataset
    built: build.BuiltModel
    state: TrainState
    evaluation: EvalSpec
    cache: PhotoCache | None
    loader: Loader
    train_numbers: NDArray[np.int64]
    val_numbers: NDArray[np.int64]
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    best: Best = field(default_factory=Best)
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    val_by_epoch: list[NDArray[np.int32]] = field(default_factory=list[NDArray[np.int32]])
    latest: Predictions | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class numbers of all photos."""
        return self.dataset.index.label_numbers()

    @property
    def channels_last(self) -> bool:
        """Memory layout of the images."""
        return self.config.train.channels_last != "off"

    @property
    def augments_on_device(self) -> bool:
        """Whether workers hand over uint8 photos, and the random parameters are executed where the model is."""
        executor = self.config.augment.executor
        return executor == "device" or (executor == "fast" and self.fabric.device.type == "cuda")

    @property
    def prior(self) -> NDArray[np.float64]:
        """(K,) share of each class among the training photos."""
        counts = np.bincount(self.labels[self.train_numbers], minlength=len(self.dataset.index.classes))
        return counts / counts.sum()

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one epoch."""
        return len(self._updates(0))

    def reader(self) -> PhotoReader:
        """Pixels of the photos by number."""
        return build.build_reader(self.config, self.dataset.index)

    def phase(self, epoch: int) -> build.Phase:
        """What holds during an epoch."""
        return build.phase_at(
            self.config,
            epoch,
            size=build.train_size(self.config, self.built.data),
            eval_size=self.evaluation.size,
            num_stages=len(self.built.model.stages()) - 1,
        )

    def enter_phase(self) -> None:
        """Make the model what the epoch about to begin asks for."""
        phase = self.phase(self.state.epoch)
        freeze_stages(self.built.model, phase.freeze, freeze_batchnorm=self.config.model.freeze_batchnorm)
        if phase.is_fixres:
            train_only_head_and_norms(self.built.model)

    def train_batches(self, epoch: int, first_step: int) -> Iterator[TrainBatch]:
        """This process's batches of an epoch, on the device, mixed."""
        phase = self.phase(epoch)
        prepare = build.build_train_photos(
            self.config,
            self.dataset.index,
            self.dataset.sizes,
            size=phase.size,
            evaluation=self.evaluation,
            is_fixres=phase.is_fixres,
            cache=self.cache,
        )
        mix_spec = build.build_mix_spec(self.config) if phase.is_mixing else None
        updates = self._updates(epoch)[first_step:]
        rank, processes = self.fabric.global_rank, self.fabric.world_size
        shares = shard_plan(updates, rank=rank, processes=processes)
        is_raw = self.augments_on_device
        loaded = self.loader.batches(prepare.raw if is_raw else prepare, shares, epoch=epoch)
        for step, (batch, update) in enumerate(zip(loaded, updates, strict=True), start=first_step):
            number = epoch * self.steps_per_epoch + step
            has_gpu = self.fabric.device.type == "cuda"
            ready = batch.pin_memory() if has_gpu else batch
            device = self.fabric.device
            images = prepare.finish(ready, epoch, device) if is_raw else ready.images.to(device, non_blocking=True)
            yield self._mixed(ready, images, epoch, number, len(update), mix_spec)

    def eval_batches(self, numbers: NDArray[np.int64]) -> Iterator[Batch]:
        """Evaluation pictures by number; each process takes every n-th batch, so batches don't depend on n."""
        plan = cut_plan(numbers.tolist(), self.config.eval.batch_size)
        share = plan[self.fabric.global_rank :: self.fabric.world_size]
        prepare = EvalPhotos(self.reader(), self.evaluation, keeps_broken=False)
        return self.loader.batches(prepare, share, epoch=0)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation figures; empty without validation photos."""
        if not len(self.val_numbers):
            return {}
        self.latest = predict_batches(
            self.fabric, model, self.eval_batches(self.val_numbers), flips=False, channels_last=self.channels_last
        )
        self.latest.require_finite(step=self.state.step - 1 if self.state else -1)
        return metrics.summarize(self.latest.probabilities(), self.labels[self.latest.numbers], self.prior)

    def keep_if_best(self, epoch: int, figures: dict[str, float], model: nn.Module) -> bool:
        """Store the model's weights and predictions of this epoch if they are to be kept; True if so."""
        metric = self.config.train.metric
        value = figures.get(metric)
        is_best = value is not None and metrics.is_better(metric, value, self.best.value)
        if is_best:
            self.best = Best(value, epoch)
        is_kept = is_best if self.config.train.select == "best" else True
        if is_kept and self.fabric.is_global_zero:
            with _writing(self.path):
                save_weights(self.path / folder.WEIGHTS, model.state_dict())
                if self.latest is not None:
                    self._store_predictions(self.latest)
        return is_kept

    def save(self) -> None:
        """Write `last.pt`: the run can be taken up again from here."""
        random_states: Any = self.fabric.all_gather(_random_state(self.fabric.device))
        if not self.fabric.is_global_zero:
            return
        state = self.state
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "average": state.average.model.state_dict() if state.average else None,
            "tally": state.tally.sums,
            "counts": {name: getattr(state, name) for name in _COUNTS},
            "random": random_states.reshape(self.fabric.world_size, -1).cpu(),
            "best": asdict(self.best),
            "seconds": self.seconds + time.perf_counter() - self.started,
            "history": json.dumps(self.history),
        }
        with _writing(self.path):
            save_checkpoint(self.path / folder.STATE, content)

    def restore(self) -> None:
        """Take up the state of `last.pt`, and drop what was written after it."""
        saved = load_checkpoint(self.path / folder.STATE)
        state = self.state
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        if state.average is not None:
            state.average.model.load_state_dict(saved["average"])
        state.tally = EpochTally(saved["tally"].to(self.fabric.device))
        for name in _COUNTS:
            setattr(state, name, saved["counts"][name])
        state.schedule.load_state_dict({"step": state.step})
        _set_random_state(saved["random"][self.fabric.global_rank], self.fabric.device)
        self.best = Best(**saved["best"])
        self.seconds = float(saved["seconds"])
        self.history = json.loads(saved["history"])
        if self.fabric.is_global_zero:
            self._rewrite_history()

    def append_history(self, row: dict[str, Any]) -> None:
        """One epoch's row: to metrics.jsonl and to what `save` keeps. Call before `save`."""
        self.history.append(row)
        if not self.fabric.is_global_zero:
            return
        with _writing(self.path):
            with (self.path / folder.METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.latest is not None:
                self.val_by_epoch.append(self.latest.logits.argmax(axis=1).astype(np.int32))
                self._store_epochs()

    def _updates(self, epoch: int) -> list[Sequence[int]]:
        config = self.config.train
        order = self.train_numbers[epoch_order(len(self.train_numbers), seed=config.seed, epoch=epoch, shuffle=True)]
        return build.global_batches(order, config.batch_size, processes=self.fabric.world_size)  # type: ignore[arg-type]

    def _mixed(
        self, batch: Batch, images: Tensor, epoch: int, step: int, global_size: int, spec: MixSpec | None
    ) -> TrainBatch:
        config, device = self.config, self.fabric.device
        labels = batch.labels.to(device, non_blocking=True)
        targets = one_hot(labels, len(self.dataset.index.classes), config.train.label_smoothing)
        mix = draw_mix(
            spec, seed=config.train.seed, epoch=epoch, step=step, batch_size=len(labels), image_size=images.shape[-1]
        )
        partners = labels[torch.from_numpy(mix.partners).to(device)]
        images, targets = apply_mix(images, targets, mix)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return TrainBatch(
            images, targets, labels, partners, mix.lam, mix.kind != "none", batch.numbers, global_size=global_size
        )

    def _store_predictions(self, predictions: Predictions) -> None:
        index = self.dataset.index
        folder.write_predictions(
            self.path / "predictions" / "val.parquet",
            paths=[index.photos[number].path for number in predictions.numbers],
            labels=self.labels[predictions.numbers],
            probabilities=predictions.probabilities(),
            classes=index.classes,
        )

    def _store_epochs(self) -> None:
        """Predicted classes of every epoch, from which the optimism of "best" is estimated."""
        stacked = np.stack(self.val_by_epoch)
        path = self.path / folder.EPOCHS
        path.parent.mkdir(exist_ok=True)
        labels = self.labels[self.val_numbers].astype(np.int32)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                np.savez_compressed(file, predicted=stacked, labels=labels)

        whole_or_absent(path, write)

    def _rewrite_history(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        whole_or_absent(self.path / folder.METRICS, lambda part: part.write_text(text, encoding="utf-8"))
        path = self.path / folder.EPOCHS
        if path.is_file():
            with np.load(path) as stored:
                self.val_by_epoch = list(stored["predicted"][: len(self.history)])


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """Say of a run folder that takes no more how the run goes on once it does."""
    try:
        yield
    except ResourceError as error:
        raise ResourceError(f"{error}, then continue with: fieldmark train --resume {path}") from error
    except OSError as error:
        reason = f"{error.filename or path} could not be written: {error.strerror}"
        raise ResourceError(f"{reason}. Mend that, then continue with: fieldmark train --resume {path}") from error


def _random_state(device: torch.device) -> Tensor:
    """State of the generators that dropout and drop-path draw from, as bytes on the device."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states).to(device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)


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
    freeze_stages(model, session.phase(0).freeze, freeze_batchnorm=config.model.freeze_batchnorm)
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
        notes += [f"warning: {text}" for text in build.build_schedule_spec(config).warnings()]
    return notes
