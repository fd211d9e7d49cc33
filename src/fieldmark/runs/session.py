"""A training's parts, complete once they are assembled: photos, model, plan, and the writer of the run folder.

Shape letters: N photos, M photos of validation, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.augment.mixing import MixSpec, apply_mix, draw_mix, one_hot
from fieldmark.augment.reference import EvalSpec
from fieldmark.config import Config, dump_config
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Batch, Loader, shard_plan
from fieldmark.errors import DataError, FieldmarkError, ReportedElsewhereError
from fieldmark.models.classifier import freeze_stages, train_only_head_and_norms
from fieldmark.progress import Logged, Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import Dataset, EvalPhotos, inspect, list_broken, prepare_dataset
from fieldmark.runs.plan import TrainPlan
from fieldmark.runs.tracking import require_trackers
from fieldmark.runs.writer import RunWriter, claim_folder
from fieldmark.training import metrics
from fieldmark.training.checkpoint import RunningAverage
from fieldmark.training.evaluate import Validation, predict_batches
from fieldmark.training.loop import EpochTally, TrainBatch, TrainState

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache

Start = Literal["new", "again", "resumed"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Session:
    """One process's view of a training; nothing in it changes but the model's weights and the writer's history.

    Attributes:
        config: The settings, for `build`.
        fabric: Device, precision, processes.
        progress: Where long work reports how far it is; on the first process it has a log behind it.
        dataset: Photos, sizes, splits.
        built: Model and weights, and what is known of them.
        evaluation: How a photo becomes the picture that is evaluated.
        cache: Reduced photos, or None.
        loader: Prepares batches.
        mix: How often and how strongly batches are mixed.
        label_smoothing: Share of every target spread over all classes.
        plan: Order of the photos, and what holds in which epoch.
        rules: When the run saves and stops.
        writer: Of the run folder.
        prior: (K,) share of each class among the training photos.
    """

    config: Config
    fabric: Fabric
    progress: Progress
    dataset: Dataset
    built: build.BuiltModel
    evaluation: EvalSpec
    cache: PhotoCache | None
    loader: Loader
    mix: MixSpec
    label_smoothing: float
    plan: TrainPlan
    rules: build.RunRules
    writer: RunWriter
    prior: NDArray[np.float64]

    def make_targets(self, labels: Tensor) -> Tensor:
        """(B, K) smoothed distributions of (B,) class numbers."""
        return one_hot(labels, len(self.dataset.index.classes), self.label_smoothing)

    def enter_phase(self, epoch: int) -> None:
        """Freeze and thaw the model as the epoch about to begin asks for."""
        phase = self.plan.rules.phase(epoch)
        freeze_stages(self.built.model, phase.freeze, freeze_batchnorm=self.config.model.freeze_batchnorm)
        if phase.is_fixres:
            train_only_head_and_norms(self.built.model)

    def train_batches(self, epoch: int, first_step: int) -> Iterator[TrainBatch]:
        """Yield this process's batches of an epoch, on the device, mixed."""
        phase, device = self.plan.rules.phase(epoch), self.fabric.device
        prepare = build.build_train_photos(
            self.config,
            self.dataset.index,
            self.dataset.sizes,
            size=phase.size,
            evaluation=self.evaluation,
            is_fixres=phase.is_fixres,
            cache=self.cache,
        )
        updates = self.plan.updates(epoch)[first_step:]
        shares = shard_plan(updates, rank=self.fabric.global_rank, processes=self.fabric.world_size)
        is_raw = build.augments_on_device(self.config, device)
        loaded = self.loader.batches(prepare.raw if is_raw else prepare, shares, epoch=epoch)
        first = epoch * self.plan.steps_per_epoch + first_step
        for step, (batch, update) in enumerate(zip(loaded, updates, strict=True), start=first):
            ready = batch.pin_memory() if device.type == "cuda" else batch
            images = prepare.finish(ready, epoch, device) if is_raw else ready.images.to(device, non_blocking=True)
            yield self._mix(ready, images, epoch, step, len(update), is_mixing=phase.is_mixing)

    def eval_batches(self, numbers: NDArray[np.int64]) -> Iterator[Batch]:
        """Give this process's share of the evaluation pictures of some photos."""
        prepare = EvalPhotos(build.build_reader(self.config, self.dataset.index), self.evaluation, keeps_broken=False)
        return self.loader.batches(prepare, self.plan.eval_share(numbers, self.fabric.global_rank), epoch=0)

    def validate(self, model: nn.Module, *, step: int) -> Validation:
        """Predict the validation photos and score them, after so many updates.

        Raises:
            NonFiniteError: The last update ruined the weights.
        """
        if not len(self.plan.val_numbers):
            return Validation()
        predictions = predict_batches(
            self.fabric,
            model,
            self.eval_batches(self.plan.val_numbers),
            flips=False,
            channels_last=build.is_channels_last(self.config),
        )
        predictions.require_finite(step=step - 1)
        labels = self.dataset.labels[predictions.numbers]
        return Validation(metrics.summarize(predictions.probabilities(), labels, self.prior), predictions)

    def start_training(self) -> TrainState:
        """Make optimizer, schedule, average and wrappers around the model as it is now."""
        config, fabric, model = self.config, self.fabric, self.built.model
        if build.is_channels_last(config):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fabric.to_device(model)
        freeze = self.plan.rules.phase(0).freeze
        freeze_stages(model, freeze, freeze_batchnorm=config.model.freeze_batchnorm)
        plain = build.build_optimizer(config, model, precision=fabric.strategy.precision)
        network, optimizer = fabric.setup(build.compile_model(config, model, fabric.device), plain)
        decay = config.train.ema_decay
        state = TrainState(
            model=model,
            network=network,
            optimizer=optimizer,
            schedule=build.build_schedule(config, plain, steps_per_epoch=self.plan.steps_per_epoch),
            average=RunningAverage(model, decay=decay) if decay else None,
            tally=EpochTally.zeros(fabric.device),
            micro_batch_size=build.first_micro_batch(config, processes=fabric.world_size),
        )
        # Dropout draws from torch's own generator, apart on each process.
        torch.manual_seed((self.plan.seed * 1_000_003 + fabric.global_rank) % 2**63)
        return state

    def _mix(
        self, batch: Batch, images: Tensor, epoch: int, step: int, global_size: int, *, is_mixing: bool
    ) -> TrainBatch:
        device = self.fabric.device
        labels = batch.labels.to(device, non_blocking=True)
        targets, partners, own_fraction, is_mixed = self.make_targets(labels), labels, 1.0, False
        if is_mixing:
            mix = draw_mix(
                self.mix,
                seed=self.plan.seed,
                epoch=epoch,
                step=step,
                batch_size=len(labels),
                image_size=images.shape[-1],
            )
            partners = labels[torch.from_numpy(mix.partners).to(device)]
            images, targets = apply_mix(images, targets, mix)
            own_fraction, is_mixed = mix.lam, mix.kind != "none"
        if build.is_channels_last(self.config):
            images = images.contiguous(memory_format=torch.channels_last)
        return TrainBatch(
            images, targets, labels, partners, own_fraction, is_mixed, batch.numbers, global_size=global_size
        )


@contextmanager
def open_session(config: Config, path: Path, *, start: Start, progress: Progress) -> Generator[Session]:
    """Claim the run folder, assemble data and model, and write what the folder holds from the start.

    Args:
        config: The settings.
        path: The run folder.
        start: `new` folder, `again` in one that was left before its first save, or `resumed` from its state.
        progress: Where to report how far the work is.

    Raises:
        FieldmarkError: One of these is not what it should be; a new folder is then removed again.
    """
    require_trackers(config.train.trackers)
    # A resumed run has computed in its layout and precision before.
    config, warning = build.guard_computation(config) if start != "resumed" else (config, "")
    fabric, choices = setup_fabric(config)
    with ExitStack() as stack:
        if fabric.is_global_zero:
            claim = claim_folder(path, is_new=start == "new")
            run_together(fabric, lambda: stack.enter_context(claim))
            progress = Logged(progress, path / folder.LOG)
        else:
            run_together(fabric, lambda: None)
            progress = Quiet()
        dataset = load_data(config, path, fabric, start=start, progress=progress)
        cache, cache_note = _open_cache(config, dataset, fabric, progress)
        workers, workers_note = build.choose_workers(config, is_cached=cache is not None, device=fabric.device)
        threads = build.choose_threads(config, workers=workers) if fabric.device.type == "cpu" else None
        if threads is not None:
            torch.set_num_threads(threads.value)
        built = load_model(config, dataset.index, fabric)
        evaluation = build.build_eval_spec(config, built.data)
        plan = build.build_plan(config, dataset.index, built, evaluation, processes=fabric.world_size)
        rules = build.build_rules(config)
        counts = np.bincount(dataset.labels[plan.train_numbers], minlength=len(dataset.index.classes))
        session = Session(
            config=config,
            fabric=fabric,
            progress=progress,
            dataset=dataset,
            built=built,
            evaluation=evaluation,
            cache=cache,
            loader=stack.enter_context(build.build_loader(workers)),
            mix=build.build_mix_spec(config),
            label_smoothing=config.train.label_smoothing,
            plan=plan,
            rules=rules,
            writer=RunWriter(path, fabric, dataset, select=rules.select, metric=rules.metric),
            prior=counts / counts.sum(),
        )
        if fabric.is_global_zero:
            lines = _describe_start(session, choices, threads)
            for line in [*dataset.notes, *lines, *([warning] if warning else []), cache_note, workers_note]:
                progress.message(line)
            if start == "again":
                session.writer.remove_metrics()
            if start != "resumed":
                layout, precision = build.is_channels_last(config), choices["precision"].value
                model = build.describe_model(built, evaluation, precision=precision, channels_last=layout)
                session.writer.write_beginning(dump_config(config), model, dataset, session.prior.tolist())
        yield session


def setup_fabric(config: Config) -> tuple[Fabric, dict[str, build.Choice[str]]]:
    """Start device, precision and processes, and seed them; also give what was chosen for `auto`."""
    fabric, choices = build.build_fabric(config)
    fabric.launch()
    torch.manual_seed(config.train.seed)
    if config.train.deterministic and fabric.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    return fabric, choices


def load_data(config: Config, path: Path, fabric: Fabric, *, start: Start, progress: Progress) -> Dataset:
    """Find, inspect and divide the photos; of a resumed run, take the very photos of its own table.

    Raises:
        DataError: Nothing to train on, broken photos, or others than the run began with.
    """
    if start != "resumed":
        return run_together(fabric, lambda: prepare_dataset(config.data, progress=progress))
    return run_together(fabric, lambda: _reload_dataset(config, path, progress))


def load_model(config: Config, index: PhotoIndex, fabric: Fabric) -> build.BuiltModel:
    """Build the model and load its weights, on the CPU.

    Raises:
        WeightsError: Unknown model, or weights that cannot be had.
    """
    return run_together(fabric, lambda: build.build_model(config, num_classes=len(index.classes)))


def run_together(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Do `work` in every process, or raise in all of them: its own error in the first that has one.

    Raises:
        ReportedElsewhereError: Another process raises the error.
    """
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


def _open_cache(config: Config, dataset: Dataset, fabric: Fabric, progress: Progress) -> tuple[PhotoCache | None, str]:
    """One process fills it; the others find it filled."""
    result = build.fill_cache(config, dataset, progress=progress) if fabric.is_global_zero else None
    fabric.barrier()
    return result or build.fill_cache(config, dataset, progress=progress)


def _reload_dataset(config: Config, path: Path, progress: Progress) -> Dataset:
    run = folder.Run(path)
    index = run.split
    facts = inspect(index, config.data, progress=progress)
    broken = [(photo.path, fact.problem) for photo, fact in zip(index.photos, facts, strict=True) if fact.problem]
    if broken:
        raise DataError(
            f"the photos of this run changed since it began: {list_broken(broken, len(index.photos))}\n"
            f"Bring them back as they were, or begin a new run without them: fieldmark train {index.root} "
            "--set data.broken=skip"
        )
    if index.fingerprint() != run.data_info["fingerprint"]:
        raise DataError(
            f"the photos under {index.root} are not those that {path} began with (their fingerprint differs): "
            "bring them back, or begin a new run"
        )
    return Dataset(index, tuple(facts), ())


def _describe_start(
    session: Session, choices: dict[str, build.Choice[str]], threads: build.Choice[int] | None
) -> list[str]:
    """List what the user should know before the first update."""
    index, weights = session.dataset.index, session.built.weights
    counts = Counter(photo.split for photo in index.photos)
    splits = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test"))
    lines = [f"data: {len(index.photos)} photos of {len(index.classes)} classes ({splits})"]
    if session.dataset.broken:
        lines.append(f"data: {len(session.dataset.broken)} broken photos left out, listed in {folder.BROKEN}")
    lines.append(f"weights: {weights.summary()}")
    lines += [f"{name}: {choice.value} ({choice.reason})" for name, choice in choices.items()]
    if threads is not None:
        lines.append(f"threads: {threads.value} ({threads.reason})")
    return lines + [f"warning: {text}" for text in (*weights.warnings(), *build.warn_of_schedule(session.config))]
