"""A training's parts, complete once they are assembled: photos, model, plan, and the writer of the run folder.

Shape letters: B photos of a batch, K classes.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.augment.mixing import apply_mix, draw_mix, one_hot
from fieldmark.augment.reference import EvalSpec
from fieldmark.config import Config, dump_config
from fieldmark.data.cache import PhotoCache
from fieldmark.data.columns import to_bytes
from fieldmark.data.loader import Loader, shard_plan
from fieldmark.data.storage import is_url, resolve
from fieldmark.errors import DataError, FieldmarkError, ReportedElsewhereError, command
from fieldmark.files import list_findings
from fieldmark.models.classifier import freeze_stages
from fieldmark.progress import Logged, Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import (
    SKIP_BROKEN,
    Dataset,
    EvalPhotos,
    Fill,
    PhotoReader,
    TrainPlan,
    inspect,
    list_broken,
    prepare_dataset,
)
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.writer import RunWriter, claim_folder, require_trackers, write_beginning
from fieldmark.training import metrics
from fieldmark.training.evaluate import Predictions, Validation, predict_batches
from fieldmark.training.loop import EpochTally, TrainBatch, TrainState, UpdateOptions

Start = Literal["new", "again", "resumed"]
Result = TypeVar("Result")
# Each update keeps `ema_decay` of the old average, reached gradually: update t (0-based) at most (1 + t) / (10 + t), so
# that the start does not linger. Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); the warm-up is TensorFlow's.
AVERAGE: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 9.0, "warmup_power": 1.0, "update_after_step": -2}


@dataclass(frozen=True)
class Session:
    """One process's view of a training; nothing in it changes but the model's weights and the writer's history."""

    config: Config
    fabric: Fabric  # device, precision, processes
    progress: Progress  # on the first process it has a log behind it
    dataset: Dataset
    reader: PhotoReader  # of the data set's photos; made once, as it takes seconds for a million
    built: build.BuiltModel
    evaluation: EvalSpec
    cache: PhotoCache | None
    loader: Loader
    plan: TrainPlan
    writer: RunWriter
    prior: NDArray[np.float64]  # (K,) share of each class among the training photos

    def make_targets(self, labels: Tensor) -> Tensor:
        """(B, K) smoothed distributions of (B,) class numbers."""
        return one_hot(labels, len(self.dataset.index.classes), self.config.train.label_smoothing)

    def train_batches(self, epoch: int, first_step: int) -> Iterator[TrainBatch]:
        """Yield this process's batches of an epoch, on the device, mixed."""
        config, data, device = self.config, self.built.data, self.fabric.device
        size, is_mixing = build.build_phase(config, epoch, data)
        prepare = build.build_train_photos(config, data, self.reader, self.dataset.sizes, size=size, cache=self.cache)
        mix = build.build_mix_spec(config)
        mix = mix if is_mixing else replace(mix, share=0.0)
        updates = self.plan.updates(epoch)[first_step:]
        shares = shard_plan(updates, rank=self.fabric.global_rank, processes=self.fabric.world_size)
        loaded = self.loader.batches(prepare, shares, epoch=epoch)
        first = epoch * self.plan.steps_per_epoch + first_step
        for step, (batch, update) in enumerate(zip(loaded, updates, strict=True), start=first):
            is_pinned = device.type == "cuda"
            drawn = draw_mix(
                mix, seed=config.train.seed, epoch=epoch, step=step, batch_size=len(batch.labels), image_size=size
            )
            # Chosen on the processor: to copy their places to a GPU would make the host wait.
            both = torch.stack([batch.labels, batch.labels[torch.from_numpy(drawn.partners)]])
            images, (labels, partners) = (
                (part.pin_memory() if is_pinned else part).to(device, non_blocking=is_pinned)
                for part in (batch.images, both)
            )
            targets = self.make_targets(labels)
            images, targets = apply_mix(images, targets, drawn)
            if build.is_channels_last(config):
                images = images.contiguous(memory_format=torch.channels_last)
            is_mixed = drawn.kind != "none"
            yield TrainBatch(images, targets, labels, partners, drawn.lam, is_mixed, batch.numbers, len(update))

    def predict(self, network: Callable[[Tensor], Tensor], numbers: NDArray[np.int64]) -> Predictions:
        """Show a network, or a part of one, the evaluation pictures of some photos; each process gets all answers."""
        prepare = EvalPhotos(self.reader, self.evaluation, keeps_broken=False)
        share = self.plan.eval_share(numbers, rank=self.fabric.global_rank, processes=self.fabric.world_size)
        batches = self.loader.batches(prepare, share, epoch=0)
        channels_last = build.is_channels_last(self.config)
        return predict_batches(self.fabric, network, batches, flips=False, channels_last=channels_last)

    def validate(self, model: nn.Module, *, step: int) -> Validation:
        """Predict the validation photos and score them, after so many updates."""
        if not len(self.plan.val_numbers):
            return Validation()
        predictions = self.predict(model, self.plan.val_numbers)
        predictions.require_finite(step=step - 1)
        labels = self.dataset.labels[predictions.numbers]
        return Validation(metrics.summarize(predictions.probabilities(), labels, self.prior), predictions)

    def make_update_options(self) -> UpdateOptions:
        """Say how updates are done."""
        options = build.build_update_options(self.config, self.prior, self.fabric.device)
        return replace(options, replay=build.make_replay(self.config, self.fabric, self.built.model))

    def start_training(self) -> TrainState:
        """Make optimizer, schedule, average and wrappers around the model as it is now."""
        from timm.utils import ModelEmaV3

        config, fabric, model = self.config, self.fabric, self.built.model
        if build.is_channels_last(config):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fabric.to_device(model)
        freeze_stages(model, config.model.freeze, freeze_batchnorm=config.model.freeze_batchnorm)
        plain = build.build_optimizer(config, model, precision=fabric.strategy.precision)
        network, optimizer = fabric.setup(build.compile_model(config, model, fabric.device), plain)
        decay, schedule = config.train.ema_decay, build.build_schedule_spec(config)
        state = TrainState(
            model=model,
            network=network,
            optimizer=optimizer,
            schedule=partial(schedule.factor, steps_per_epoch=self.plan.steps_per_epoch),
            average=ModelEmaV3(model, decay, **AVERAGE) if decay else None,
            tally=EpochTally.zeros(fabric.device),
            micro_batch_size=build.first_micro_batch(config, processes=fabric.world_size),
        )
        state.set_rates()
        # Dropout draws from torch's own generator, apart on each process.
        torch.manual_seed((config.train.seed * 1_000_003 + fabric.global_rank) % 2**63)
        return state


def assemble(
    config: Config,
    path: Path,
    fabric: Fabric,
    dataset: Dataset,
    built: build.BuiltModel,
    *,
    select: str,
    progress: Progress,
) -> tuple[Session, build.Choice[int], str]:
    """Put a training's parts together; also give the number of workers, and what was done to the cache.

    The session's loader is for the caller to close.
    """
    reader = build.build_reader(config, dataset.index)
    cache, cache_note = dataset.cached or build.fill_cache(
        config, dataset.index.files(), dataset.sizes, read=reader.read, progress=progress
    )
    workers = build.choose_workers(config, is_cached=cache is not None, device=fabric.device)
    plan = build.build_plan(config, dataset.index, processes=fabric.world_size)
    counts = np.bincount(dataset.labels[plan.train_numbers], minlength=len(dataset.index.classes))
    session = Session(
        config=config,
        fabric=fabric,
        progress=progress,
        dataset=dataset,
        reader=reader,
        built=built,
        evaluation=build.build_eval_spec(config, built.data),
        cache=cache,
        loader=Loader(workers=workers.value, threads=1 if workers.value else usable_cores()),
        plan=plan,
        writer=RunWriter(path, fabric, dataset, select=select, metric=config.train.metric),
        prior=counts / counts.sum(),
    )
    return session, workers, cache_note


@contextmanager
def open_session(
    config: Config, path: Path, *, start: Start, progress: Progress, data: Path | str | None = None
) -> Generator[Session]:
    """Claim the run folder, assemble data and model, and write what the folder holds from the start.

    The start is `new`, `again` in a folder that was left before its first save, or `resumed` from its state, with the
    photos in `data` if they moved. A new folder is removed again if anything is not what it should be.
    """
    require_trackers(config.train.trackers)
    # A resumed run has computed in its layout and precision before.
    config, warning = build.guard_computation(config) if start != "resumed" else (config, "")
    fabric, choices = setup_fabric(config)
    with ExitStack() as stack:
        progress = stack.enter_context(claim_together(fabric, path, is_new=start == "new", progress=progress))
        skip = _skip_broken(config.data.path, path) if start == "again" else SKIP_BROKEN
        load = partial(prepare_dataset, config.data, skip=skip)
        load = load if start != "resumed" else partial(_reload_dataset, config, path, data)
        dataset = load_together(fabric, partial(load, progress=progress, fill=partial(build.fill_cache, config)))
        built = run_together(fabric, lambda: build.build_model(config, num_classes=len(dataset.index.classes)))
        session, workers, cache_note = assemble(
            config, path, fabric, dataset, built, select=config.train.select, progress=progress
        )
        stack.enter_context(session.loader)
        if start != "resumed":
            pictures = EvalPhotos(session.reader, session.evaluation, keeps_broken=False)
            build.fit_pool(built.model, pictures, session.plan.train_numbers)
        if fabric.device.type == "cpu":
            choices["threads"] = threads = build.choose_threads(config, workers=workers.value)
            torch.set_num_threads(threads.value)
        if fabric.is_global_zero:
            lines = [*_describe_start(session, choices), *([warning] if warning else []), cache_note]
            for line in [*lines, f"loader: {workers.value} workers ({workers.reason})"]:
                progress.message(line)
            if data is not None:
                folder.write_json(path / folder.DATA, {**folder.Run(path).data_info, "root": resolve(data)})
            if (path / folder.CALIBRATION).is_file():
                progress.message(f"{folder.CALIBRATION} is of the weights so far, and goes with them: calibrate again")
            if start == "again":
                for name in (folder.METRICS, folder.EPOCHS):
                    (path / name).unlink(missing_ok=True)
            if start != "resumed":
                precision, layout = str(choices["precision"].value), build.is_channels_last(config)
                model = build.describe_model(built, session.evaluation, precision=precision, channels_last=layout)
                write_beginning(path, session.dataset, dump_config(config), model, session.prior.tolist())
        yield session


def setup_fabric(config: Config) -> tuple[Fabric, dict[str, build.Choice[str] | build.Choice[int]]]:
    """Start device, precision and processes, and seed them; also give what was chosen for `auto`."""
    fabric, choices = build.build_fabric(config)
    fabric.launch()
    torch.manual_seed(config.train.seed)
    if fabric.device.type == "cuda":
        torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not config.train.deterministic
    return fabric, choices


@contextmanager
def claim_together(fabric: Fabric, path: Path, *, is_new: bool, progress: Progress) -> Generator[Progress]:
    """Hold a run folder for all processes; the first one's progress has a log in it, the others say nothing."""
    with ExitStack() as stack:
        claim = claim_folder(path, is_new=is_new) if fabric.is_global_zero else nullcontext()
        run_together(fabric, lambda: stack.enter_context(claim))
        yield Logged(progress, path / folder.LOG) if fabric.is_global_zero else Quiet()


def load_together(fabric: Fabric, load: Callable[[], Dataset]) -> Dataset:
    """Load the photos in every process; they must be the same."""
    dataset = run_in_turn(fabric, load)
    run_together(fabric, lambda: _require_same(fabric, dataset))
    return dataset


def run_in_turn(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Do `work` in the first process, then in the others: they find photos inspected and a cache filled."""
    first = run_together(fabric, lambda: work() if fabric.is_global_zero else None)
    return run_together(fabric, lambda: first or work())


def run_together(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Do `work` in every process, or raise in all of them: its own error in the first that has one."""
    result, problem = None, None
    try:
        result = work()
    except FieldmarkError as error:
        problem = error
    first = fabric.global_rank if problem is not None else None
    if fabric.world_size > 1:
        ranks: list[int | None] = [None] * fabric.world_size
        torch.distributed.all_gather_object(ranks, first)
        first = min((rank for rank in ranks if rank is not None), default=None)
    if first is not None:
        raise problem if problem is not None and first == fabric.global_rank else ReportedElsewhereError(first)
    return result  # type: ignore[return-value]  # without a problem it is what `work` gave


def _require_same(fabric: Fabric, dataset: Dataset) -> None:
    """Refuse to train in processes that see different photos, or that label or divide them in other ways."""
    if fabric.world_size == 1:
        return
    index = dataset.index
    found = crc32(index.label_numbers().tobytes(), crc32(repr(index.classes).encode()))
    for path, split in zip(index.photos.paths, index.photos.splits, strict=True):
        found = crc32(to_bytes(f"{split}{path}\0"), found)
    seen: Any = fabric.all_gather(torch.tensor(found, device=fabric.device))
    if seen.min() != seen.max():
        raise DataError(f"the machines see, label or divide the photos in {index.root} in different ways: share the "
                        "folder, and give splits by folders or a column")  # fmt: skip


def require_photos_of(path: Path, root: Path | str) -> None:
    """Refuse to resume the run in `path` where its photos, a folder or a table, are gone."""
    if not is_url(str(root)) and not Path(root).exists():
        raise DataError(
            f"the photos of {path} were in {root}, which is gone: say where they are with "
            f"`{command('train', '--resume', path, '--data', 'FOLDER')}`"
        )


def _skip_broken(photos: str | Path, path: Path) -> str:
    """How to train without broken photos where a run goes on with its own settings."""
    again = ("--recipe", path / folder.RECIPE, "--set", "data.broken=skip")
    return f"begin a new run without them: {command('train', photos, *again)}"


def _reload_dataset(config: Config, path: Path, data: Path | str | None, *, progress: Progress, fill: Fill) -> Dataset:
    """Take the very photos of a run's own table, from where they are now."""
    run = folder.Run(path)
    index = run.split if data is None else replace(run.split, root=data)
    require_photos_of(path, index.root)
    facts, cached = inspect(index, config.data, progress=progress, fill=fill)
    broken = [(path, fact.problem) for path, fact in zip(index.photos.paths, facts, strict=True) if fact.problem]
    if broken:
        raise DataError(
            f"the photos of this run changed since it began: {list_broken(broken, len(index.photos))}\n"
            f"Bring them back as they were, or {_skip_broken(data or config.data.path, path)}"
        )
    run.require_photos(index)
    return Dataset(index, tuple(facts), (), cached=cached)


def _describe_start(session: Session, choices: dict[str, build.Choice[str] | build.Choice[int]]) -> list[str]:
    """List what the user should know before the first update."""
    index, schedule = session.dataset.index, build.build_schedule_spec(session.config)
    values = {"session": session, "counts": index.count_splits(), "choices": choices, "schedule": schedule}
    values |= {"broken": folder.BROKEN}
    return [*session.dataset.notes, *list_findings("start.md", values)]
