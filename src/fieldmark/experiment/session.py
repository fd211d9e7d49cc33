"""A training under way: its parts, assembled from settings and a folder, and its state on disk.

Shape letters: N photos, K classes, E epochs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.config import Config, MixConfig
from fieldmark.data.loader import Batch, Loader, epoch_order, shard_plan
from fieldmark.engine import metrics
from fieldmark.engine.checkpoint import load_checkpoint, save_checkpoint, save_weights
from fieldmark.engine.evaluate import Predictions, predict_batches
from fieldmark.engine.loop import EpochTally, TrainBatch, TrainState
from fieldmark.errors import ResourceError
from fieldmark.experiment import build, folder
from fieldmark.experiment.batches import EvalPhotos, PhotoReader
from fieldmark.experiment.dataset import Dataset, Logged, Progress
from fieldmark.files import whole_or_absent
from fieldmark.vision.augment import EvalSpec
from fieldmark.vision.mixing import apply_mix, draw_mix, one_hot
from fieldmark.vision.model import freeze_stages, train_only_head_and_norms

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache

_COUNTS = ("epoch", "step", "step_in_epoch", "micro_batch_size")
_NO_MIX = MixConfig(prob=0.0)


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
        freeze_stages(self.built.model, phase.freeze)
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
            yield self._mixed(ready, images, epoch, number, len(update), is_mixing=phase.is_mixing)

    def eval_batches(self, numbers: NDArray[np.int64]) -> Iterator[Batch]:
        """Evaluation pictures by number; each process takes every n-th batch, so batches don't depend on n."""
        size = self.config.eval.batch_size
        plan = [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]
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
        self, batch: Batch, images: Tensor, epoch: int, step: int, global_size: int, *, is_mixing: bool
    ) -> TrainBatch:
        config, device = self.config, self.fabric.device
        labels = batch.labels.to(device, non_blocking=True)
        targets = one_hot(labels, len(self.dataset.index.classes), config.train.label_smoothing)
        spec = build.build_mix_spec(config if is_mixing else config.model_copy(update={"mix": _NO_MIX}))
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
