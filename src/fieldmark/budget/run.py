"""`fieldmark train PHOTOS --minutes N`: the best model that the minutes of this machine can make, on time.

Shape letters: N training photos, M validation photos, F features, K classes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.budget import candidates
from fieldmark.budget.candidates import Backbone, Candidate
from fieldmark.budget.plan import PLAN, Clock, Plan, default_minutes
from fieldmark.budget.race import Course, Entry, FeatureStore, best_average, rungs, stratified_order
from fieldmark.budget.shelf import Answer, Model, Shelf, temperature_of
from fieldmark.budget.tune import ENOUGH_EPOCHS, LEAST_EPOCHS, Option, Tuned, Tuner, choose_option, list_options
from fieldmark.config import Config, parse_config
from fieldmark.errors import FieldmarkError, InterruptedRunError, RunError
from fieldmark.progress import Logged, Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import Dataset, prepare_dataset
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.folder import Run
from fieldmark.runs.session import setup_fabric
from fieldmark.runs.train import StopRequest, format_accuracy, stop_requests
from fieldmark.runs.writer import claim_folder
from fieldmark.study.statistics import optimism_from_photos, paired_difference
from fieldmark.training.evaluate import softmax
from fieldmark.training.loop import EpochReport

FEATURES = "features"

FLOOR_SHARE, RACE_SHARE, PROBE_SHARE = 0.15, 0.40, 0.90
"""Shares of the budget by which the floor stands, the race ends where fine-tuning follows, and where none does."""

TUNE_SHARE = 0.5
"""Of the budget, for fine-tuning."""

TUNING = "tuning"

SHOWN = 8

MEMBERS = 3
"""The most networks that answer together."""


class _StoppedError(Exception):
    """A signal came."""


def machine_minutes(config: Config) -> float:
    """The budget where the user names none."""
    return default_minutes(cores=usable_cores(), has_gpu=build.choose_device(config).value != "cpu")


def describe_plan(config: Config) -> str:
    """Return what a training without a recipe would choose from, and how long it takes by default."""
    try:
        weights = ", ".join(found.name for found in candidates.find_backbones(config))
    except FieldmarkError as error:
        return f"train without a recipe is not possible here: {error}"
    return f"train without a recipe: {machine_minutes(config):g} minutes on this machine, choosing among {weights}"


def train_within(
    config: Config,
    out: str | Path,
    *,
    minutes: float,
    progress: Progress | None = None,
    clock: Clock = time.monotonic,
) -> Run:
    """Make the best model that fits a time, and write a run folder.

    Args:
        config: The settings; what they set explicitly (model, evaluation size, view) is not varied.
        out: The run folder; must not exist, or be empty.
        minutes: From the call to the end of this function.
        progress: Where to report.
        clock: Seconds from any fixed moment.

    Raises:
        FieldmarkError: Settings, data, weights or machine do not allow it.
        InterruptedRunError: Ctrl-C or SIGTERM came; the folder holds the best model so far.
    """
    path = Path(out)
    plan = Plan(path / PLAN, 60 * minutes, clock)
    with claim_folder(path, is_new=True), stop_requests() as stop:
        log = Logged(progress or Quiet(), path / folder.LOG)
        parts = _gather(config, plan, log)
        plan.begin()
        plan.decide("settings", lambda: config.model_dump(mode="json", exclude_unset=True))
        return _follow(config, path, plan, log, stop, parts)


def resume_within(
    out: str | Path, *, minutes: float | None, progress: Progress | None = None, clock: Clock = time.monotonic
) -> Run:
    """Go on with a run that a budget was set for: with what was left of it, or with new minutes.

    Raises:
        RunError: It is no such run, or it is finished and no new minutes are given.
    """
    path = Path(out)
    plan = Plan.resume(path / PLAN, minutes=minutes, clock=clock)
    status = folder.run_status(path)
    if minutes is None and status == "finished":
        raise RunError(f"{path} is finished. Give it more time with: fieldmark train --resume {path} --minutes N")
    config = parse_config(plan.decide("settings", dict), PLAN)
    with claim_folder(path, is_new=False), stop_requests() as stop:
        log = Logged(progress or Quiet(), path / folder.LOG)
        return _follow(config, path, plan, log, stop, _gather(config, plan, log))


def is_budgeted(out: str | Path) -> bool:
    """Whether a run folder was made within a budget."""
    return (Path(out) / PLAN).is_file()


def _follow(config: Config, path: Path, plan: Plan, log: Progress, stop: StopRequest, parts: _Parts) -> Run:
    work = _assemble(config, path, plan, log, stop, parts)
    try:
        work.floor()
        work.consider_tuning()
        work.race()
        work.tune()
    except _StoppedError:
        work.end("interrupted")
        raise InterruptedRunError(
            f"stopped by {stop.signal_name}: {path} holds {work.best.name}, which answers. Go on with: "
            f"fieldmark train --resume {path}"
        ) from None
    work.end("finished")
    return Run(path)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What must be there before a folder is written: photos, weights and a device.

    Attributes:
        dataset: The photos.
        backbones: Cheapest first.
        fabric: Device and precision.
        precision: Its name.
    """

    dataset: Dataset
    backbones: Sequence[Backbone]
    fabric: Fabric
    precision: str


@dataclass(eq=False)
class _Work:
    """A budget being spent.

    Attributes:
        config: The settings.
        path: The run folder.
        plan: The clock and the record.
        log: Where to report.
        stop: Set once a signal came.
        dataset: The photos.
        backbones: Cheapest first.
        course: What the race's candidates share.
        shelf: The run folder's keeper.
        entries: By candidate, the one on most photos.
        tried: What summary.json says of each thing tried.
        history: Seconds spent and the answer that was the best from then on.
        may_tune: Whether the time seems to allow fine-tuning.
        choices: What the validation photos chose from; empty where they chose nothing.
    """

    config: Config
    path: Path
    plan: Plan
    log: Progress
    stop: StopRequest
    dataset: Dataset
    backbones: Sequence[Backbone]
    course: Course
    shelf: Shelf
    precision: str
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    tried: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    history: list[tuple[float, Answer]] = field(default_factory=list[tuple[float, Answer]])
    may_tune: bool = False
    choices: list[Answer] = field(default_factory=list[Answer])

    @property
    def best(self) -> Answer:
        """The answer that the folder holds."""
        return self.history[-1][1]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N + M + ...,) class indices of all photos."""
        return self.dataset.index.label_numbers()

    def floor(self) -> None:
        """The cheapest backbone's features and a head: from here on the folder answers."""
        cheapest = self.backbones[0]
        course, plan = self.course, self.plan
        own = candidates.list_candidates(self.config, [cheapest])
        seconds = self._time_photos(own[0])  # computed also where the choice is on record: batches must be the same
        key = plan.decide("floor", lambda: self._choose_floor(own, seconds).key)
        candidate = next(one for one in own if one.key == key)
        least = min(len(course.order), max(2 * course.num_classes, 20))
        first = np.concatenate([course.order[:least], course.val])
        course.store.get(candidate, first, until=lambda: False)
        self._check()
        entry = course.enter(candidate, len(course.order), deadline=FLOOR_SHARE * plan.seconds)
        entry = entry or course.score(candidate, course.order[:least])
        self._note(entry)
        self._promote(f"a linear head on {candidate.key}", [entry])
        if plan.elapsed > plan.seconds:
            self.log.message(
                f"the {plan.seconds / 60:g} minutes were over before the least that answers was made: "
                f"this took {plan.elapsed:.0f} s"
            )

    def _time_photos(self, candidate: Candidate) -> float:
        """Seconds per photo of a few; those before them warm up."""
        sample = self.course.order[:16]
        self.course.store.get(candidate, sample[:8], until=lambda: False)
        began = time.perf_counter()
        self.course.store.get(candidate, sample, until=lambda: False)
        return (time.perf_counter() - began) / max(len(sample) - 8, 1)

    def _choose_floor(self, own: Sequence[Candidate], seconds: float) -> Candidate:
        """The first picture whose features fit the floor's time, by the time of a few photos; else the smallest."""
        course, first = self.course, own[0]
        count = len(course.order) + len(course.val)
        left = FLOOR_SHARE * self.plan.seconds - self.plan.elapsed
        sizes = sorted({one.size for one in own if one.size <= first.size}, reverse=True)
        for size in sizes:
            if count * seconds * (size / first.size) ** 2 <= left or size == sizes[-1]:
                return next(one for one in own if one.size == size)
        return first

    def consider_tuning(self) -> None:
        """Measure an update of the cheapest backbone: without time for some epochs, the race has all of it."""
        course = self.course
        if not len(course.val):
            self.log.message("no fine-tuning: without validation photos nothing could tell whether it helped")
            return
        entry = next(iter(self.entries.values()))

        def count_epochs() -> float:
            seconds = TUNE_SHARE * self.plan.seconds
            options = list_options(course.store, entry.candidate, num_photos=len(course.order), seconds=seconds,
                                   size=self.config.augment.size, depths=1)  # fmt: skip
            return max(option.epochs for option in options)

        epochs = self.plan.decide("epochs of fine-tuning that half of the time allows", count_epochs)
        self.may_tune = epochs >= LEAST_EPOCHS
        what = "about half of the time goes to it" if self.may_tune else "too few to pay, so all time goes to the race"
        self.log.message(f"fine-tuning: {TUNE_SHARE:.0%} of the time would allow {epochs:.1f} epochs; {what}")
        self._check()

    def race(self) -> None:
        """Candidates on growing shares of the photos; then the best, and their average, on all."""
        course, plan = self.course, self.plan
        end = (RACE_SHARE if self.may_tune else PROBE_SHARE) * plan.seconds
        running = candidates.list_candidates(self.config, self.backbones)
        counts = rungs(len(course.order), course.num_classes)
        for place, count in enumerate(counts[:-1]):
            share = (place + 1) / len(counts) * 0.5
            deadline = plan.decide(f"round of {count}", lambda share=share: plan.elapsed + share * (end - plan.elapsed))
            entries = self._round(running, count, deadline)
            running = self._survivors(entries, most=max(2, -(-len(running) // 3)))
        for candidate in running:
            if not plan.decide(f"all photos of {candidate.key}", lambda one=candidate: self._fits(one, end)):
                continue
            self._round([candidate], counts[-1], end)
            self._average()

    def _round(self, running: Sequence[Candidate], count: int, deadline: float) -> list[Entry]:
        entries: list[Entry] = []
        for candidate in running:
            if not self.plan.decide(f"try {candidate.key}", lambda: self.plan.elapsed < deadline):
                break
            entry = self.entries.get(candidate.key)
            if entry is None or len(entry.numbers) < count:
                entry = self.course.enter(candidate, count, deadline=deadline)
                if entry is not None:
                    self._note(entry)
            self._check()
            if entry is not None:
                entries.append(entry)
        return entries

    def _survivors(self, entries: Sequence[Entry], *, most: int) -> list[Candidate]:
        """The best picture of each backbone first, then the next best."""
        ranked = sorted(entries, key=lambda entry: entry.log_loss)
        firsts: dict[str, Entry] = {}
        for entry in ranked:
            firsts.setdefault(entry.candidate.backbone.name, entry)
        rest = [entry for entry in ranked if entry not in firsts.values()]
        return [entry.candidate for entry in [*firsts.values(), *rest]][:most]

    def _fits(self, candidate: Candidate, end: float) -> bool:
        """Whether the features of all photos can be had by `end`."""
        entry = self.entries.get(candidate.key)
        missing = len(self.course.order) + len(self.course.val) - (len(entry.numbers) if entry else 0)
        seconds = entry.seconds_per_photo if entry else self._guess_seconds(candidate)
        fit = max(one.fit_seconds * len(self.course.order) / len(one.numbers) for one in self.entries.values())
        return self.plan.elapsed + missing * seconds + fit < end

    def _guess_seconds(self, candidate: Candidate) -> float:
        """Seconds per photo of a candidate that was not tried, from those that were."""
        guesses = [
            entry.seconds_per_photo
            * (candidate.size / entry.candidate.size) ** 2
            * (candidate.backbone.parameters / entry.candidate.backbone.parameters)
            for entry in self.entries.values()
        ]
        return min(guesses)

    def _average(self) -> None:
        """Promote the average of the best entries on all photos, if it beats what answers."""
        whole = [entry for entry in self.entries.values() if len(entry.numbers) == len(self.course.order)]
        if not whole:
            return
        labels = self.labels[self.course.order]
        chosen = best_average(whole, labels, most=self._most_members())
        names = " and ".join(entry.candidate.key for entry in chosen)
        what = f"a linear head on {names}" if len(chosen) == 1 else f"the average of linear heads on {names}"
        self._promote(what, chosen)

    def _most_members(self) -> int:
        limit = self.config.model.max_parameters_millions
        if limit is None:
            return MEMBERS
        largest = max(backbone.parameters for backbone in self.backbones)
        return max(1, min(MEMBERS, int(limit * 1e6 / largest)))

    def _note(self, entry: Entry) -> None:
        known = self.entries.get(entry.candidate.key)
        if known is None or len(entry.numbers) >= len(known.numbers):
            self.entries[entry.candidate.key] = entry
        row = {"what": entry.candidate.key, "photos": len(entry.numbers), "top1": entry.top1,
               "log_loss": entry.log_loss, "l2": entry.head.l2,
               "seconds": entry.seconds_per_photo * len(entry.numbers) + entry.fit_seconds,
               "milliseconds_per_photo": 1000 * entry.seconds_per_photo}  # fmt: skip
        self.tried.append(row)
        self.log.message(
            f"{entry.candidate.key}: top-1 {entry.top1:.4f}, log loss {entry.log_loss:.3f}, cross-validated on "
            f"{len(entry.numbers)} photos"
        )

    def _promote(self, name: str, entries: Sequence[Entry]) -> None:
        answer = Answer(name, tuple(self._model(entry) for entry in entries))
        self._put(answer)

    def _put(self, answer: Answer) -> None:
        """Let an answer stand in the folder from now on, and say so."""
        if self.history and [m.key for m in answer.members] == [m.key for m in self.best.members]:
            return
        self.shelf.put(answer)
        self.history.append((self.plan.elapsed, answer))
        figures = self.shelf.figures(answer)
        shown = f", validation top-1 {figures['top1']:.4f}" if figures else ""
        self.log.message(f"{max(self.plan.left, 0):.0f} s left; kept if it ended now: {answer.name}{shown}")
        folder.write_json(self.path / folder.SUMMARY, {"status": "running", "kept": answer.name})

    def tune(self) -> None:
        """Fine-tune the best backbone that the time left allows, and choose among all that answers."""
        if not self.may_tune:
            return
        ranked = sorted(self.entries.values(), key=lambda entry: (-len(entry.numbers), entry.log_loss))
        reserve = self._reserve(ranked[0])
        record = self.plan.decide("fine-tune", lambda: self._choose_tuning(ranked, reserve))
        self._check()
        if not record:
            self.log.message("fine-tuning: the time left allows too few epochs to pay")
            return
        key, *values = record
        entry, option = self.entries[key], Option(*values)
        self.log.message(
            f"fine-tuning {key} at {option.size} pixels, {option.freeze} stages frozen, {option.epochs:.1f} epochs"
        )
        path = self.path / TUNING
        tuner = Tuner(self.course.store, self.dataset, self.plan, path, progress=self.log, reserve=reserve)
        probed = self.best
        tuned = tuner.tune(entry, option, on_epoch=lambda *args: self._keep_epoch(entry, *args))
        if tuned is None:
            raise _StoppedError
        self.tried.append({"what": f"fine-tuning of {key}", "updates": tuned.updates, "seconds": tuned.seconds})
        self._choose(entry, tuned, probed)

    def _reserve(self, entry: Entry) -> float:
        """Seconds for what follows fine-tuning: its evaluations, and the folder."""
        return 5 * 1.3 * entry.seconds_per_photo * len(self.course.val) + 5 + 0.01 * self.plan.seconds

    def _choose_tuning(self, ranked: Sequence[Entry], reserve: float) -> list[Any]:
        """Key and option of the best entry whose network can be fine-tuned for long enough; [] for none."""
        seen: set[str] = set()
        fallback: list[Any] = []
        for entry in ranked:
            if entry.candidate.backbone.name in seen:
                continue
            seen.add(entry.candidate.backbone.name)
            options = list_options(
                self.course.store,
                entry.candidate,
                num_photos=len(self.course.order),
                seconds=self.plan.left - reserve,
                size=self.config.augment.size,
            )
            option = choose_option(options)
            if option is None:
                continue
            found = [entry.candidate.key, option.size, option.freeze, option.seconds_per_photo, option.epochs]
            if option.epochs >= ENOUGH_EPOCHS:
                return found
            fallback = fallback or found
        return fallback

    def _keep_epoch(self, entry: Entry, report: EpochReport, config: Config, weights: Mapping[str, Tensor]) -> None:
        """Let the network of an epoch answer if it is better than what answers."""
        predictions = report.predictions
        if predictions is None:
            return
        model = self._tuned_model(entry, f"epoch {report.epoch}", config, weights, predictions.probabilities())
        self.log.message(f"fine-tuning, epoch {report.epoch}: validation top-1 {report.metrics['top1']:.4f}")
        answer = Answer(f"{entry.candidate.key}, fine-tuned for {report.epoch} epochs", (model,))
        if self._loss(answer) < self._loss(self.best):
            self._put(answer)

    def _choose(self, entry: Entry, tuned: Tuned, probed: Answer) -> None:
        """Choose by validation loss among probes, fine-tuned weights, interpolations, and their averages."""
        alone: list[Answer] = []
        for name, val in tuned.val.items():
            model = self._tuned_model(entry, name, tuned.config, tuned.weights[name], val)
            alone.append(Answer(f"{entry.candidate.key} fine-tuned ({name})", (model,)))
        answers = [probed, *alone]
        if len(probed.members) < self._most_members() + 1:
            answers += [
                Answer(f"{probed.name}, averaged with {answer.name}", (*probed.members, *answer.members))
                for answer in alone
            ]
        self.choices = answers
        for answer in answers:
            self.tried.append({"what": answer.name, **self.shelf.figures(answer)})
        self._put(min(answers, key=self._loss))

    def _loss(self, answer: Answer) -> float:
        return float(self.shelf.figures(answer)["log_loss"])

    def _tuned_model(
        self, entry: Entry, name: str, config: Config, weights: Mapping[str, Tensor], val: NDArray[np.float32]
    ) -> Model:
        built = self.course.store.model(entry.candidate)
        evaluation = build.build_eval_spec(config, built.data)
        description = build.describe_model(built, evaluation, precision=self.precision, channels_last=True)
        temperature = temperature_of(val, self.labels[self.course.val])
        key = f"{entry.candidate.key}-tuned-{name.replace(' ', '-').replace('%', '')}"
        return Model(key, config, description, dict(weights), val, temperature)

    def _model(self, entry: Entry) -> Model:
        """The network of an entry, with its answers on the validation photos."""
        candidate, course = entry.candidate, self.course
        config = candidate.configure(self.config)
        built = course.store.model(candidate)
        features = course.store.get(candidate, course.val, until=lambda: False)
        head = entry.head.as_linear()
        logits = np.zeros((0, course.num_classes), np.float32)
        if len(course.val):
            with torch.inference_mode():
                logits = head(torch.from_numpy(features.of(course.val))).numpy()
        weights = {f"backbone.{name}": tensor for name, tensor in built.model.backbone.state_dict().items()}
        weights |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        evaluation = build.build_eval_spec(config, built.data)
        description = build.describe_model(built, evaluation, precision=self.precision, channels_last=True)
        temperature = temperature_of(entry.head.out_of_fold, self.labels[entry.numbers])
        key = f"{candidate.key}-{len(entry.numbers)}"
        return Model(key, config, description, weights, softmax(logits), temperature)

    def _check(self) -> None:
        if self.stop and self.history:
            raise _StoppedError
        if self.stop:
            raise InterruptedRunError(
                f"stopped by {self.stop.signal_name} before anything answered. Go on with: "
                f"fieldmark train --resume {self.path}"
            )

    def end(self, status: str) -> None:
        """Leave the best answer as an ordinary run, and say how it came about."""
        answer = self.best
        self.shelf.settle(answer)
        if status == "finished":
            self.shelf.clear(answer)
            for name in (FEATURES, TUNING):
                shutil.rmtree(self.path / name, ignore_errors=True)
        figures = self.shelf.figures(answer)
        if figures:
            figures |= {"optimistic_bias": self._optimistic_bias(), "more_time": self._more_time()}
        summary: dict[str, Any] = {
            "status": status,
            "kept": answer.name,
            "seconds": self.plan.elapsed,
            "budget_seconds": self.plan.seconds,
            "tried": self.tried,
            "epochs": 0,
            "select": "best",
            "metric": "log_loss",
            "best_epoch": 0,
        }
        folder.write_json(self.path / folder.SUMMARY, summary | ({"val": figures} if figures else {}))

    def _optimistic_bias(self) -> float:
        """Expected excess of the accuracy on the photos that chose the answer, in [0, 1]."""
        labels = self.labels[self.course.val]
        if len(self.choices) < 2:
            return 0.0
        correct = np.stack([answer.val.argmax(1) == labels for answer in self.choices])
        return optimism_from_photos(correct, draws=2000, rng=np.random.default_rng(0)).points

    def _more_time(self) -> dict[str, float]:
        """What the second half of the time earned in accuracy, with its 95 % interval: more would earn less."""
        labels = self.labels[self.course.val]
        half = self.plan.elapsed / 2
        before = next((answer for at, answer in reversed(self.history) if at <= half), self.history[0][1])
        hits = [(answer.val.argmax(1) == labels).astype(np.float64)[None] for answer in (before, self.best)]
        found = paired_difference(*hits, level=0.95, draws=2000, rng=np.random.default_rng(0)).interval
        return {"second_half_earned": found.estimate, "low": found.low, "high": found.high}


def _gather(config: Config, plan: Plan, log: Progress) -> _Parts:
    log.message(f"budget: {plan.left / 60:.1f} minutes, on {usable_cores()} cores")
    backbones = candidates.find_backbones(config)
    log.message("weights at hand: " + ", ".join(f"{one.name} ({one.parameters / 1e6:.1f} M)" for one in backbones))
    fabric, choices = setup_fabric(config)
    if fabric.device.type == "cpu":
        torch.set_num_threads(build.choose_threads(config, workers=0).value)
    dataset = prepare_dataset(config.data, progress=log)
    return _Parts(dataset, backbones, fabric, str(choices["precision"].value))


def _assemble(config: Config, path: Path, plan: Plan, log: Progress, stop: StopRequest, parts: _Parts) -> _Work:
    dataset, index = parts.dataset, parts.dataset.index
    labels = index.label_numbers()
    split = np.asarray([photo.split for photo in index.photos])
    train, val = (np.flatnonzero((split == name) & (labels >= 0)) for name in ("train", "val"))
    counts = np.bincount(labels[train], minlength=len(index.classes))
    log.message(f"data: {len(train)} photos of {len(index.classes)} classes to learn from, {len(val)} to validate on")
    shelf = Shelf(path, index, val, counts / counts.sum())
    shelf.open(config, broken=len(dataset.broken))
    store = FeatureStore(config, index, parts.fabric, path / FEATURES, log, lambda: bool(stop))
    order = train[stratified_order(labels[train], seed=config.train.seed)]
    course = Course(store, plan, order, val, seed=config.train.seed)
    return _Work(config, path, plan, log, stop, dataset, parts.backbones, course, shelf, parts.precision)


def format_result(run: Run) -> str:
    """What was tried, what is kept, and what to do with it."""
    summary = run.summary
    minutes, budget = summary["seconds"] / 60, summary["budget_seconds"] / 60
    lines = [f"run: {run.path}, {minutes:.1f} of {budget:g} minutes", f"kept: {summary['kept']}"]
    raced = {row["what"]: row for row in summary["tried"] if "photos" in row}
    for name, row in sorted(raced.items(), key=lambda item: item[1]["log_loss"])[:SHOWN]:
        lines.append(
            f"  {name:36} {row['seconds']:5.0f} s  top-1 {row['top1']:.4f}, cross-validated on {row['photos']} photos"
        )
    for row in summary["tried"]:
        if "updates" in row:
            lines.append(f"  {row['what']}: {row['updates']} updates in {row['seconds']:.0f} s")
        elif "photos" not in row:
            lines.append(f"  {row['what']}: validation top-1 {row['top1']:.4f}, log loss {row['log_loss']:.3f}")
    if "val" in summary:
        val = summary["val"]
        lines.append(f"validation: {format_accuracy(val)}")
        if val["optimistic_bias"]:
            lines.append(f"  these photos chose among the last models: expect {val['optimistic_bias']:.4f} less")
        more = val["more_time"]
        lines.append(
            f"more time: the second half earned {more['second_half_earned']:+.4f} (95 % interval {more['low']:+.4f} to "
            f"{more['high']:+.4f}); as much time again would probably earn no more than that"
        )
    return "\n".join([*lines, "next:", f"  fieldmark evaluate {run.path}",
                      f"  fieldmark predict {run.path} PHOTOS --out prediction.csv"])  # fmt: skip
