"""Fine-tuning from a probed head, if the minutes left pay for it: how deep, at what size, and for how long.

Shape letters: M validation photos, K classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fieldmark.budget.candidates import SMALLER, Candidate, change, round_size
from fieldmark.budget.pace import Pace, PacedSchedule, Shape
from fieldmark.budget.plan import Plan
from fieldmark.budget.race import Entry, FeatureStore
from fieldmark.config import Config
from fieldmark.models.classifier import freeze_stages
from fieldmark.progress import Progress
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import Dataset
from fieldmark.runs.session import Session
from fieldmark.runs.writer import RunWriter
from fieldmark.training.loop import EpochReport, TrainBatch, TrainState, train_epochs

MEASURED_PHOTOS = 8

ENOUGH_EPOCHS, LEAST_EPOCHS, MANY_EPOCHS = 5.0, 3.0, 10.0
"""Epochs that are wanted of a depth and size, those below which fine-tuning earns nothing, and those from which
batches are mixed: with fewer, regularizers cost more than they earn."""

MOST_EPOCHS = 30.0
"""Epochs after which a probed network has learned what a small data set can teach it."""

MOVES = "end of fine-tuning"

SETTINGS: dict[str, dict[str, Any]] = {
    # A probed head is ruined by a high rate in its first epochs (clothing10 fell from .76 to .63 at lr 1e-3).
    "optim": {"lr": 3e-4, "backbone_lr_scale": 0.5, "layer_decay": 0.9, "weight_decay": 0.01, "clip_norm": 1.0},
    "augment": {"crop_scale": (0.4, 1.0), "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    "model": {"freeze_batchnorm": True},
    "train": {"label_smoothing": 0.1, "ema_decay": 0.98, "select": "last"},
}
"""What fine-tuning takes where the recipe and its user say nothing."""


@dataclass(frozen=True)
class Option:
    """A way to fine-tune.

    Attributes:
        size: Side of the training pictures, in pixels.
        freeze: Stages that do not learn, from the input.
        seconds_per_photo: Of an update.
        epochs: That fit the time.
    """

    size: int
    freeze: int
    seconds_per_photo: float
    epochs: float


def measure_update(store: FeatureStore, candidate: Candidate, *, size: int, freeze: int) -> float:
    """Seconds per photo of an update of a copy of the candidate's network; the first one warms up."""
    built = store.model(candidate)
    model = copy.deepcopy(built.model).train()
    freeze_stages(model, freeze, freeze_batchnorm=True)
    plain = build.build_optimizer(store.config, model, precision=store.fabric.strategy.precision)
    network, optimizer = store.fabric.setup(model, plain)
    device = store.fabric.device
    images = torch.zeros(MEASURED_PHOTOS, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(MEASURED_PHOTOS, dtype=torch.int64, device=device)
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        store.fabric.backward(functional.cross_entropy(network(images), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / MEASURED_PHOTOS


def choose_option(options: Sequence[Option]) -> Option | None:
    """The deepest and largest option with enough epochs; else the one with most, if those are not too few.

    Args:
        options: Preferred first.
    """
    for option in options:
        if option.epochs >= ENOUGH_EPOCHS:
            return option
    most = max(options, key=lambda option: option.epochs, default=None)
    return most if most is not None and most.epochs >= LEAST_EPOCHS else None


def list_options(
    store: FeatureStore, candidate: Candidate, *, num_photos: int, seconds: float, size: int | None, depths: int = 3
) -> list[Option]:
    """Ways to fine-tune a candidate in a time, all stages at the evaluation size first.

    Args:
        store: Networks, device and settings.
        candidate: Which.
        num_photos: Of an epoch.
        seconds: That training may take.
        size: Side that the user asks for, or None.
        depths: How many depths of freezing to measure, from none.
    """
    num_stages = len(store.model(candidate).model.stages()) - 1
    small = size or _training_size(candidate)
    large = size or max(candidate.size, small)
    found: list[Option] = []
    for freeze in (0, num_stages // 3, 2 * num_stages // 3)[:depths]:
        measured = measure_update(store, candidate, size=small, freeze=freeze)
        for side in dict.fromkeys((large, small)):
            each = measured * (side / small) ** 2
            found.append(Option(side, freeze, each, min(seconds / (num_photos * each), MOST_EPOCHS)))
    # All stages at a small size before fewer at a large one: sizes cost more than they earn until epochs are plenty.
    return sorted(found, key=lambda option: (option.freeze, -option.size if option.epochs >= MANY_EPOCHS else 0))


def _training_size(candidate: Candidate) -> int:
    """Smaller than the evaluation picture, in which objects then look as large as in training's crops."""
    if candidate.backbone.picture.is_size_fixed:
        return candidate.size
    return round_size(candidate.size * SMALLER)


def tuning_config(config: Config, candidate: Candidate, option: Option) -> Config:
    """The settings of fine-tuning; what the recipe or its user set stays."""
    wanted = copy.deepcopy(SETTINGS)
    wanted["augment"]["size"] = option.size
    wanted["model"]["freeze"] = option.freeze
    wanted["mix"] = {"share": 0.3, "cutmix_share": 1.0, "off_epochs": 2} if option.epochs >= MANY_EPOCHS else {}
    free: dict[str, dict[str, Any]] = {}
    for section, values in wanted.items():
        given = getattr(config, section).model_fields_set
        free[section] = {name: value for name, value in values.items() if name not in given}
    free["train"]["epochs"] = max(round(option.epochs), 1)
    return change(candidate.configure(config), free)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning left.

    Attributes:
        config: Its settings.
        weights: Name -> weights: the last ones, their running average, and interpolations with the probe.
        val: Name -> (M, K) float32 probabilities of the validation photos.
        updates: That were made.
        seconds: That it took.
    """

    config: Config
    weights: Mapping[str, Mapping[str, Tensor]]
    val: Mapping[str, NDArray[np.float32]]
    updates: int
    seconds: float


class Tuner:
    """Fine-tunes a candidate from its head within a plan.

    Args:
        store: Networks, device and settings.
        dataset: The photos.
        plan: The clock and the record.
        path: Folder of the training's state.
        progress: Where to report.
        reserve: Seconds to leave for what follows.
    """

    def __init__(
        self, store: FeatureStore, dataset: Dataset, plan: Plan, path: Path, *, progress: Progress, reserve: float
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._plan = plan
        self._path = path
        self._progress = progress
        self._reserve = reserve

    def tune(
        self, entry: Entry, option: Option, *, on_epoch: Callable[[EpochReport, Config, Mapping[str, Tensor]], None]
    ) -> Tuned | None:
        """Train, and interpolate; None if a signal came, with the state saved."""
        started = self._plan.elapsed
        session = self._open(entry, option)
        with session.loader:
            probe = {name: tensor.clone() for name, tensor in session.built.model.state_dict().items()}
            state = session.start_training()
            updates = max(round(option.epochs * session.plan.steps_per_epoch), 1)
            steps = session.plan.steps_per_epoch
            overhead = entry.seconds_per_photo * len(session.plan.val_numbers) / steps
            most = round(MOST_EPOCHS * steps)
            pace = Pace(Shape.of(updates), lambda: self._plan.left - self._reserve, overhead, most)
            if not self._train(session, state, pace, on_epoch):
                return None
            return self._compare(session, state, probe, started)

    def _open(self, entry: Entry, option: Option) -> Session:
        store, fabric = self._store, self._store.fabric
        config = tuning_config(store.config, entry.candidate, option)
        built = copy.deepcopy(store.model(entry.candidate))
        built.model.head = entry.head.as_linear()
        evaluation = build.build_eval_spec(config, built.data)
        cache, note = build.fill_cache(config, self._dataset, progress=self._progress)
        self._progress.message(note)
        workers, note = build.choose_workers(config, is_cached=cache is not None, device=fabric.device)
        plan = build.build_plan(config, self._dataset.index, built, evaluation, processes=fabric.world_size)
        counts = np.bincount(self._dataset.labels[plan.train_numbers], minlength=len(self._dataset.index.classes))
        self._path.mkdir(exist_ok=True)
        return Session(
            config=config,
            fabric=fabric,
            progress=self._progress,
            dataset=self._dataset,
            built=built,
            evaluation=evaluation,
            cache=cache,
            loader=build.build_loader(workers),
            mix=build.build_mix_spec(config),
            label_smoothing=config.train.label_smoothing,
            plan=plan,
            rules=build.build_rules(config),
            writer=RunWriter(self._path, fabric, self._dataset, select="last", metric=config.train.metric),
            prior=counts / counts.sum(),
        )

    def _train(
        self,
        session: Session,
        state: TrainState,
        pace: Pace,
        on_epoch: Callable[[EpochReport, Config, Mapping[str, Tensor]], None],
    ) -> bool:
        """Train to the end of the pace; False if a signal came."""
        schedule = PacedSchedule(state.optimizer, pace)
        state.schedule = schedule  # type: ignore[assignment]
        moves = self._plan.take(MOVES)
        if (self._path / folder.STATE).is_file():
            session.writer.restore(state)
        while moves and moves[0][0] <= state.step:
            pace.shape = pace.shape.moved(*moves.pop(0))
        schedule.load_state_dict({"step": state.step})
        session.enter_phase(state.epoch)
        reports = train_epochs(
            session.fabric,
            state,
            epochs=10**6,
            steps_per_epoch=session.plan.steps_per_epoch,
            batches=lambda epoch, first: self._watch(session, state, pace, moves, epoch, first),
            evaluate=lambda model: session.validate(model, step=state.step),
            options=build.build_update_options(session.config, session.prior, session.fabric.device),
        )
        for report in reports:
            session.writer.save(state)
            if self._store.should_stop():
                return False
            if not report.is_complete or state.step >= pace.shape.end:
                break
            on_epoch(report, session.config, (state.average.model if state.average else state.model).state_dict())
            session.enter_phase(state.epoch)
        return True

    def _watch(
        self, session: Session, state: TrainState, pace: Pace, moves: list[tuple[int, int]], epoch: int, first: int
    ) -> Iterator[TrainBatch]:
        """Yield batches until the pace's end, which is moved as the clock asks or as is on record."""
        pace.forget()
        saved = self._plan.clock()
        for batch in session.train_batches(epoch, first):
            now = self._plan.clock()
            pace.observe(now)
            if self._store.should_stop():
                return
            self._move(state, pace, moves)
            if state.step >= pace.shape.end:
                return
            minutes = session.rules.save_minutes
            if minutes and now - saved > 60 * min(minutes, 1.0):
                session.writer.save(state)
                saved = now
            yield batch

    def _move(self, state: TrainState, pace: Pace, moves: list[tuple[int, int]]) -> None:
        if moves:
            if moves[0][0] == state.step:
                pace.shape = pace.shape.moved(*moves.pop(0))
            return
        # A record that goes on after the moves says that there were no others.
        end = None if self._plan.is_repeating else pace.propose(state.step)
        if end is None:
            return
        self._plan.decide(MOVES, lambda: [state.step, end])
        self._progress.message(
            f"fine-tuning: ends after update {end} instead of {pace.shape.end}, as the clock runs; "
            f"{max(self._plan.left, 0):.0f} s left"
        )
        pace.shape = pace.shape.moved(state.step, end)

    def _compare(self, session: Session, state: TrainState, probe: Mapping[str, Tensor], started: float) -> Tuned:
        """Predict the validation photos by the last weights, their average, and interpolations with the probe.

        Source:
            Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv:2109.01903 (WiSE-FT).
        """
        last = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        weights: dict[str, Mapping[str, Tensor]] = {"last": last}
        if state.average is not None:
            weights["average"] = state.average.model.state_dict()
        for share in (0.5, 0.75, 0.25):
            weights[f"{share:.0%} of the way from the probe"] = interpolate(probe, last, share)
        val: dict[str, NDArray[np.float32]] = {}
        seconds = 0.0
        for name in weights:
            needed = seconds
            if not self._plan.decide(f"evaluate {name}", lambda needed=needed: self._plan.left > 2 * needed + 4):
                continue
            began = self._plan.elapsed
            state.model.load_state_dict(weights[name])
            found = session.validate(state.model.eval(), step=state.step).predictions
            assert found is not None
            val[name] = found.probabilities()
            seconds = self._plan.elapsed - began
        return Tuned(session.config, weights, val, state.step, self._plan.elapsed - started)


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights that are `share` of the way from `first` to `second`; integer buffers are the second's."""
    return {
        name: torch.lerp(first[name].to(tensor.device), tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }
