"""Fine-tuning from a probed head, if the minutes left pay for it: how deep, at what size, and for how long.

Shape letters: M validation photos, K classes.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.budget.candidates import SMALLER, Candidate, change, round_size
from fieldmark.budget.heads import refit_head
from fieldmark.budget.plan import LEAST_EPOCHS, REPLAN_EVERY, Pace, Shape
from fieldmark.budget.race import Course, Entry
from fieldmark.config import Config
from fieldmark.data.loader import limit_team
from fieldmark.models.classifier import freeze_stages
from fieldmark.runs import build, folder
from fieldmark.runs.session import Session, assemble, run_in_turn, run_together
from fieldmark.training.loop import EpochReport, TrainBatch, TrainState, UpdateOptions, compute_gradients, train_epochs
from fieldmark.training.replay import ALIKE_FIRST

TUNING = "tuning"
MOVES = "end of fine-tuning"
MEASURED_PHOTOS = 32
# Photos of a pass: about as many where there are many cores, and at most. Lite0 at 160 pixels in updates of 32,
# photos/s of two cores of an AMD EPYC: 91 with 8 and 100 with 16 in bf16, 50 and 57 in 32 bit.
LEAST_PASS, MOST_PASS = 8, 16
# Epochs that are wanted of a depth and size, and those from which batches are mixed: with fewer, regularizers cost more
# than they earn.
ENOUGH_EPOCHS, MANY_EPOCHS = 8.0, 10.0
MOST_EPOCHS = 30.0  # after which a probed network has learned what a small data set can teach it
# Least L2 penalty of the head that fine-tuning starts from. With 1e-4, birds100 fell from .90 to .46 in an epoch.
SOFT_L2 = 1e-2

Weights = Mapping[str, Tensor]

# What fine-tuning takes where the recipe and its user say nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    # A probed head is ruined by a high rate in its first epochs (clothing10 fell from .76 to .63 at lr 1e-3).
    "optim": {"lr": 4e-4, "backbone_lr_scale": 0.5, "layer_decay": 0.9, "weight_decay": 0.01, "clip_norm": 1.0},
    "augment": {"crop_scale": (0.4, 1.0), "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    "model": {"freeze_batchnorm": True},
    "train": {"label_smoothing": 0.1, "ema_decay": 0.98, "select": "last"},
}


@dataclass(frozen=True)
class Option:
    """A way to fine-tune."""

    size: int  # side of the training pictures, in pixels
    freeze: int  # stages that do not learn, from the input
    seconds_per_photo: float  # of an update
    epochs: float  # that fit the time


def open_pool(course: Course, config: Config) -> AbstractContextManager[ThreadPoolExecutor | None]:
    """Threads for micro-batches side by side, where that is exact (see `training.loop`)."""
    cores = torch.get_num_threads()
    fabric = course.team.fabric
    is_exact = config.model.freeze_batchnorm and not _drops(config)
    is_plain = fabric.device.type == "cpu" and fabric.world_size == 1
    if cores < 2 or not is_exact or not is_plain or config.train.compile == "on":
        return nullcontext()
    return ThreadPoolExecutor(passes := count_passes(config), "fieldmark-update", limit_team, (cores // passes,))


def count_passes(config: Config) -> int:
    """How many passes of an update are made side by side: such as leave few cores idle, and are not much too small."""
    if _drops(config):
        return 1
    cores, few = torch.get_num_threads(), -(-config.train.batch_size // LEAST_PASS)
    return max(range(1, min(cores, 2 * few) + 1), key=lambda n: (n * (cores // n) >= 0.9 * cores, -abs(n - few), n))


def _drops(config: Config) -> bool:
    """Whether a pass draws what to leave out, so that the order of passes matters."""
    return bool(config.model.feature_dropout or config.model.drop_path)


def measure_update(course: Course, candidate: Candidate, size: int, freeze: int) -> float:
    """In all processes: seconds per photo of the last of a few updates of a copy of the network."""
    fabric, device = course.team.fabric, course.team.fabric.device
    config = tuning_config(course.config, candidate, Option(size, freeze, 0.0, 1.0))
    model = copy.deepcopy(course.load_model(candidate).model).train()
    freeze_stages(model, freeze, freeze_batchnorm=True)
    network, optimizer = fabric.setup(model, build.build_optimizer(config, model, precision=fabric.strategy.precision))
    num_photos = min(
        max(MEASURED_PHOTOS, LEAST_PASS * count_passes(config)), -(-config.train.batch_size // fabric.world_size)
    )
    images = torch.zeros(num_photos, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(num_photos, course.num_classes, device=device)
    micro_batch = build.first_micro_batch(config, processes=fabric.world_size)
    started = 0.0
    replay = build.make_replay(config, fabric, model)
    with open_pool(course, config) as pool:
        options = UpdateOptions(pool=pool, replay=replay)
        for _ in range(2 if replay is None else ALIKE_FIRST + 1):
            started = time.perf_counter()
            compute_gradients(fabric, network, images, targets, micro_batch, options, scale=1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type != "cpu":
                torch.accelerator.synchronize()
    seconds = time.perf_counter() - started
    if replay is not None:
        replay.give_up()
    return seconds / (num_photos * fabric.world_size)


def choose_option(options: Sequence[Option], *, sharing: int = 1) -> Option | None:
    """The best option that gets enough epochs where trainings share the time; else the one with most, if enough."""
    options = [replace(option, epochs=min(option.epochs / sharing, MOST_EPOCHS)) for option in options]
    # All stages at a small size before fewer at a large one: sizes cost more than they earn until epochs are plenty.
    options.sort(key=lambda option: (option.freeze, -option.size if option.epochs >= MANY_EPOCHS else 0))
    most = max(options, key=lambda option: option.epochs)
    enough = (option for option in options if option.epochs >= ENOUGH_EPOCHS)
    return next(enough, most if most.epochs >= LEAST_EPOCHS else None)


def list_options(
    course: Course, candidate: Candidate, *, seconds: float, depths: int = 3, measures: bool = True
) -> list[Option]:
    """Ways to fine-tune a candidate, at so many depths from none frozen, with the epochs that so many seconds allow.

    Without `measures` an update takes what the last one of the same backbone did, by the number of pixels.
    """
    num_stages = course.load_model(candidate).model.count_stages()
    # Smaller than the evaluation picture, in which objects then look as large as in training's crops.
    is_fixed = candidate.backbone.picture.is_size_fixed
    small = course.config.augment.size or (candidate.size if is_fixed else round_size(candidate.size * SMALLER))
    large = course.config.augment.size or max(candidate.size, small)
    found: list[Option] = []
    for freeze in (0, num_stages // 3, 2 * num_stages // 3)[:depths]:
        place = (candidate.backbone, freeze)
        if measures:
            course.paces[place] = course.team.ask(course, measure_update, candidate, small, freeze) / small**2
        for side in dict.fromkeys((large, small)):
            each = course.paces[place] * side**2
            found.append(Option(side, freeze, each, seconds / (len(course.order) * each)))
    return found


def tuning_config(config: Config, candidate: Candidate, option: Option) -> Config:
    """The settings of fine-tuning; what the recipe or its user set stays."""
    wanted = copy.deepcopy(SETTINGS)
    wanted["augment"]["size"] = option.size
    wanted["model"]["freeze"] = option.freeze
    wanted["mix"] = {"share": 0.3, "cutmix_share": 1.0, "off_epochs": 2} if option.epochs >= MANY_EPOCHS else {}
    keeps_batchnorm = config.model.freeze_batchnorm or "freeze_batchnorm" not in config.model.model_fields_set
    if keeps_batchnorm and build.choose_device(config).value == "cpu":  # equal to one pass but for rounding
        wanted["train"]["micro_batch_size"] = min(-(-config.train.batch_size // count_passes(config)), MOST_PASS)
    for section, values in wanted.items():
        given = getattr(config, section).model_fields_set
        wanted[section] = {name: value for name, value in values.items() if name not in given}
    wanted["train"]["epochs"] = max(round(option.epochs), 1)
    return change(candidate.configure(config), wanted)


@dataclass(frozen=True, eq=False)
class Tuned:
    """Holds what fine-tuning left: by name the last weights, their average, and mixtures with the probe."""

    config: Config
    networks: Mapping[str, tuple[Weights, NDArray[np.float32]]]  # and (M, K) validation probabilities of each
    updates: int
    seconds: float


OnEpoch = Callable[[EpochReport, Config, Weights], None]


def soften(course: Course, entry: Entry) -> Entry:
    """The entry with a head of smaller weights: large ones turn each small step of the backbone into a large one."""
    features = course.collect_features(entry.candidate, entry.numbers).select(entry.numbers)
    soft = replace(entry.head, l2=max(entry.head.l2, SOFT_L2), out_of_fold=entry.head.out_of_fold[:0])
    return replace(entry, head=refit_head(features, course.dataset.labels[entry.numbers], soft))


def tune(
    course: Course, entry: Entry, option: Option, *, reserve: float = 0.0, on_epoch: OnEpoch = lambda *_: None
) -> Tuned | None:
    """In all processes: fine-tune a candidate from its head, and mix with it; None if a signal came, with all saved.

    The first has the clock. `reserve` are seconds to leave for what follows; `on_epoch` takes report, settings and
    weights of each epoch.
    """
    started = course.plan.elapsed
    session = _open_session(course, entry, option)
    with session.loader:
        probe = {name: tensor.clone() for name, tensor in session.built.model.state_dict().items()}
        state = session.start_training()
        steps = session.plan.steps_per_epoch
        shape = Shape.of(max(round(option.epochs * steps), 1))
        overhead = entry.seconds_per_photo * len(session.plan.val_numbers) / steps
        pace = Pace(shape, lambda: course.plan.left - reserve, overhead, most=round(MOST_EPOCHS * steps))
        training = _Training(course, session, state, pace, course.plan.take(MOVES))
        with open_pool(course, session.config) as pool:
            if not training.run(on_epoch, pool):
                return None
        networks = training.mix_with(probe)
    return Tuned(session.config, networks, state.step, course.plan.elapsed - started)


def _open_session(course: Course, entry: Entry, option: Option) -> Session:
    fabric, path = course.team.fabric, course.path / TUNING / entry.candidate.key
    config = tuning_config(course.config, entry.candidate, option)
    built = run_together(fabric, lambda: copy.deepcopy(course.load_model(entry.candidate)))
    built.model.head = entry.head.as_linear()
    path.mkdir(parents=True, exist_ok=True)
    begin = partial(assemble, config, path, fabric, course.dataset, built, select="last", progress=course.log)
    session, _, note = run_in_turn(fabric, begin)
    course.log.message(note)
    return session


@dataclass(frozen=True, eq=False)
class _Training:
    """A training whose end moves as the clock asks, or as `moves` (update, new end) on record say."""

    course: Course
    session: Session
    state: TrainState
    pace: Pace
    moves: list[tuple[int, int]]

    def run(self, on_epoch: OnEpoch, pool: ThreadPoolExecutor | None) -> bool:
        """Train to the end of the pace; False if a signal came."""
        session, state, pace, team = self.session, self.state, self.pace, self.course.team
        state.schedule = lambda step: pace.shape.factor(step)
        if (session.writer.path / folder.STATE).is_file():
            session.writer.restore(state)
        while self.moves and self.moves[0][0] <= state.step:
            pace.shape = pace.shape.moved(*self.moves.pop(0))
        pace.shape = team.agree(lambda: pace.shape)
        planned = pace.shape.end
        state.set_rates()
        options = session.make_update_options()
        reports = train_epochs(
            session.fabric,
            state,
            epochs=10**6,
            steps_per_epoch=session.plan.steps_per_epoch,
            batches=self._watch,
            evaluate=lambda model: session.validate(model, step=state.step),
            options=replace(options, pool=pool),
        )
        for report in reports:
            session.writer.save(state)
            if team.agree(lambda: bool(team.stop)):
                return False
            if not report.is_complete or state.step >= pace.shape.end:
                break
            team.agree(partial(on_epoch, report, session.config, state.kept_model.state_dict()))
        if options.replay is not None:
            options.replay.give_up()
        if state.step != planned:
            self.course.log.message(f"fine-tuning: {planned} updates were planned, and the clock allowed {state.step}")
        return True

    def _watch(self, epoch: int, first: int) -> Iterator[TrainBatch]:
        """Yield batches until the pace's end."""
        team, clock, state, pace = self.course.team, self.course.plan.clock, self.state, self.pace
        minutes = min(self.session.config.train.save_minutes, 1.0)
        # To agree at each update would let GPUs wait for their hosts.
        every = REPLAN_EVERY if team.fabric.world_size > 1 and team.fabric.device.type != "cpu" else 1
        pace.observe(None)
        now = saved = clock()

        def decide() -> tuple[bool, tuple[int, int] | None, bool]:
            is_stopped = bool(team.stop)
            return is_stopped, None if is_stopped else self._choose_move(), 0 < 60 * minutes < now - saved

        for batch in self.session.train_batches(epoch, first):
            now = clock()
            pace.observe(now)
            if state.step % every == 0:
                is_stopped, move, is_unsaved = team.agree(decide)
                if is_stopped:
                    return
                if move is not None:
                    pace.shape = pace.shape.moved(*move)
                if is_unsaved:
                    self.session.writer.save(state)
                    saved = now
            if state.step >= pace.shape.end:
                return
            yield batch
        pace.observe(clock())

    def _choose_move(self) -> tuple[int, int] | None:
        """In the first process: a new end from this update on, if there is one."""
        plan, pace, step = self.course.plan, self.pace, self.state.step
        if self.moves:
            return self.moves.pop(0) if self.moves[0][0] <= step else None
        # A record that goes on after the moves says that there were no others.
        end = None if plan.is_repeating else pace.propose(step)
        return None if end is None else plan.decide(MOVES, lambda: (step, end))

    def mix_with(self, probe: Weights) -> dict[str, tuple[Weights, NDArray[np.float32]]]:
        """Evaluate the last weights, their average and interpolations with the probe, as far as time allows.

        Source:
            Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv:2109.01903 (WiSE-FT).
        """
        plan, state = self.course.plan, self.state
        last = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        networks: dict[str, Weights] = {"last": last}
        if state.average is not None:
            networks["average"] = state.average.module.state_dict()
        for share in (0.5, 0.75, 0.25):
            networks[f"{share:.0%} of the way from the probe"] = interpolate(probe, last, share)
        evaluated: dict[str, tuple[Weights, NDArray[np.float32]]] = {}
        seconds = 0.0
        for name, weights in networks.items():
            has_time = partial(plan.decide, f"evaluate {name}", lambda needed=seconds: plan.left > 2 * needed + 4)
            if not self.course.team.agree(has_time):
                continue
            began = plan.elapsed
            state.model.load_state_dict(weights)
            found = self.session.validate(state.model.eval(), step=state.step).predictions
            assert found is not None
            evaluated[name] = (weights, found.probabilities())
            seconds = plan.elapsed - began
        return evaluated


def interpolate(first: Weights, second: Weights, share: float) -> dict[str, Tensor]:
    """Weights that are `share` of the way from `first` to `second`; integer buffers are the second's."""
    return {
        name: torch.lerp(first[name].to(tensor.device), tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }
