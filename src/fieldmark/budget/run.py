"""`fieldmark train PHOTOS --minutes N`: the best model that the minutes of this machine can make, on time.

Shape letters: N training photos, M validation photos, F features, K classes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fieldmark.budget import tune as tuning
from fieldmark.budget.candidates import SIZE_STEP, Backbone, Candidate, change, find_backbones, list_candidates
from fieldmark.budget.heads import refit_head
from fieldmark.budget.plan import EPOCHS, LEAST_EPOCHS, PLAN, Clock, Plan, default_minutes
from fieldmark.budget.race import FEATURES, STORED, Course, Entry, best_average, rungs, stratified_order
from fieldmark.budget.shelf import Answer, Floats, Model, Shelf, choose_temperature
from fieldmark.budget.team import StoppedError, Team
from fieldmark.config import Config, dump_config, parse_config
from fieldmark.errors import ConfigError, FieldmarkError, InterruptedRunError, RunError, command
from fieldmark.files import fill_template, write_whole
from fieldmark.inference.calibration import apply_temperature, log_probabilities
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.dataset import prepare_dataset
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.folder import Run, format_accuracy
from fieldmark.runs.session import claim_together, load_together, run_together, setup_fabric
from fieldmark.runs.train import StopRequest, next_steps, stop_requests
from fieldmark.study.statistics import optimism_from_photos, paired_difference
from fieldmark.training.loop import EpochReport
from fieldmark.training.metrics import log_loss

# Shares of the budget by which the floor stands, by which all photos' features of its picture could be had, by which
# the race ends where fine-tuning follows, and by which it ends where none does.
FLOOR_SHARE, FEATURE_SHARE, RACE_SHARE, PROBE_SHARE = 0.15, 0.75, 0.40, 0.93
TUNE_SHARE = 0.5  # of the budget, for fine-tuning
SHOWN, SHOWN_CHOICES = 8, 4
# Photos x features x classes of a head of which the products take as long as the search around them (measured).
SEARCH_SIZE = 1.3e8
BALANCED = "-balanced"  # at the end of a member's name
REFITTED, DIVIDED = "(heads fitted on train+val)", "(the class shares of training divided out)"  # of an answer's
MEMBERS = 4  # the most networks with fitted heads that answer together; a fine-tuned one may join them


def machine_minutes(config: Config) -> float:
    """The budget where the user names none."""
    return default_minutes(cores=usable_cores(), has_gpu=build.choose_device(config).value != "cpu")


def require_no_epochs(config: Config, recipe: str | Path | None) -> None:
    """Refuse epochs that a user gave without a recipe: a budget plans them."""
    if recipe is None and "epochs" in config.train.model_fields_set:
        raise ConfigError(
            "train.epochs goes with a recipe, such as --recipe laptop: within minutes the plan decides it"
        )


def describe_plan(config: Config) -> str:
    """Return what a training without a recipe would choose from, and what it would cost; nothing is trained."""
    processes = config.train.devices * config.train.nodes
    config = config.model_copy(update={"train": config.train.model_copy(update={"devices": 1, "nodes": 1})})
    try:
        with TemporaryDirectory() as path:
            team = Team(setup_fabric(config)[0], StopRequest())
            work = _prepare(config, Path(path), Plan(Path(path) / PLAN, math.inf), Quiet(), team)
            count = len(work.course.order) + len(work.course.val)
            firsts = [list_candidates(config, [backbone])[0] for backbone in work.backbones]
            costs = [(candidate, count * work.course.time_photos(candidate)) for candidate in firsts]
    except FieldmarkError as error:
        return f"train without a recipe is not possible here: {error}"
    return fill_template("plan.md", {"minutes": machine_minutes(config), "costs": costs, "processes": processes})


def train_within(
    config: Config,
    out: str | Path,
    *,
    minutes: float | None,
    spent_seconds: float = 0.0,
    progress: Progress | None = None,
    clock: Clock = time.monotonic,
) -> Run:
    """Make the best model that fits a time, and write a run folder, which must not exist, or be empty.

    Without minutes it takes as many as suit the machine, and says so. What the settings name explicitly (model,
    evaluation size, view) is not varied. `spent_seconds` of the minutes are gone already: those of a program that took
    time to start. After an InterruptedRunError (Ctrl-C or SIGTERM) the folder holds the best model so far.

    Of several processes each calls this; the first makes the plan, and the others compute with it.
    """
    plan = Plan(Path(out) / PLAN, 60 * (machine_minutes(config) if minutes is None else minutes), clock, spent_seconds)
    return _spend(config, plan, progress, is_new=True, is_default=minutes is None)


def resume_within(
    out: str | Path, *, minutes: float | None, progress: Progress | None = None, clock: Clock = time.monotonic
) -> Run:
    """Go on with a run that a budget was set for: with what was left of it, or with new minutes."""
    path = Path(out)
    is_over, spent = folder.run_status(path) == "finished", 0.0
    with suppress(RunError):  # killed before there was a run
        spent = float(Run(path).summary.get("seconds", 0.0))
    if is_over and (minutes is None or 60 * minutes < spent):
        more = command("train", "--resume", path, "--minutes", "N")
        took = f", an N longer than the {spent / 60:.1f} minutes that it took, which are computed again"
        raise RunError(f"{path} is finished. Give it more time with: {more}{took}")
    plan = Plan.resume(path / PLAN, minutes=minutes, spent=spent, is_over=is_over, clock=clock)
    config = parse_config(plan.decide("settings", dict), PLAN)
    return _spend(config, plan, progress, is_new=False)


def _spend(config: Config, plan: Plan, progress: Progress | None, *, is_new: bool, is_default: bool = False) -> Run:
    """Prepare in all processes; then the first spends the budget, with the others at its hand."""
    with stop_requests() as stop:
        team = Team(setup_fabric(config)[0], stop)
        path = team.agree(lambda: plan.path.parent)
        with claim_together(team.fabric, path, is_new=is_new, progress=progress or Quiet()) as log:
            if is_default:
                minutes = f"{plan.seconds / 60:g} minutes"
                log.message(f"no recipe and no --minutes: taking {minutes}, which suit this machine")
            work = _prepare(config, path, plan, log, team)
            if not is_new and (path / folder.RECIPE).is_file():
                run_together(team.fabric, partial(Run(path).require_photos, work.course.dataset.index))
            team.work(work.course, partial(work.run, is_new=is_new))
    return Run(path)


def _prepare(config: Config, path: Path, plan: Plan, log: Progress, team: Team) -> _Work:
    """Gather photos and weights; what is missing is said before anything but the log is written."""
    fabric = team.fabric
    processes = f" in each of {fabric.world_size} processes" if fabric.world_size > 1 else ""
    log.message(f"budget: {plan.left / 60:.1f} minutes, on {usable_cores()} cores{processes}")
    backbones = team.agree(lambda: find_backbones(config))
    log.message("weights at hand: " + ", ".join(f"{one.name} ({one.parameters / 1e6:.1f} M)" for one in backbones))
    if fabric.device.type == "cpu":
        torch.set_num_threads(build.choose_threads(config, workers=0).value)
    # Validation photos choose first; `train+val` lets the heads learn from them at the end.
    settings = config.data.model_copy(update={"train_on": "train"})
    dataset = load_together(fabric, partial(prepare_dataset, settings, progress=log))
    if dataset.notes:
        log.message("\n".join(dataset.notes))
    index, labels = dataset.index, dataset.labels
    train, val = index.numbers("train"), index.numbers("val")
    log.message(f"data: {len(train)} photos of {len(index.classes)} classes to learn from, {len(val)} to validate on")
    order = train[stratified_order(labels[train], seed=config.train.seed)]
    course = Course(config, path, plan, log, team, dataset, order, val)
    return _Work(course, backbones, Shelf(path, dataset, train=train, val=val))


@dataclass(eq=False)
class _Work:
    """A budget being spent."""

    course: Course
    backbones: Sequence[Backbone]  # cheapest first
    shelf: Shelf
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])  # by candidate, the one on most photos
    tried: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # as summary.json says it
    history: list[tuple[float, Answer]] = field(default_factory=list[tuple[float, Answer]])  # the best from a second on
    curve: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # the same, as summary.json says it
    choices: list[Answer] = field(default_factory=list[Answer])  # what the validation photos chose from
    standing: Answer | None = None  # what an earlier process left, which only a better answer replaces
    is_new: bool = True
    was_running: bool = False  # when it was killed, so that its folder is not settled
    best_epoch: Answer | None = None  # what answered best before the end of a fine-tuning
    epochs: float = 0.0  # of fine-tuning that half of the time allows

    @property
    def best(self) -> Answer:
        """The last answer, which the folder holds unless an earlier process left a better one."""
        return self.history[-1][1]

    @property
    def reserve(self) -> float:
        """Seconds to leave for what follows fine-tuning: the evaluations, and the folder."""
        slowest = max(entry.seconds_per_photo for entry in self.entries.values())
        return 5 * 1.3 * slowest * len(self.course.val) + 5 + 0.01 * self.course.plan.seconds

    def run(self, *, is_new: bool) -> None:
        """Spend the budget; a signal leaves what is best by then."""
        course, plan, self.is_new = self.course, self.course.plan, is_new
        if is_new:
            try:
                self.require_pace()
            except StoppedError:
                raise InterruptedRunError(f"stopped by {course.team.stop.signal_name} before anything began") from None
            plan.decide("budget", lambda: plan.seconds)
            plan.decide("settings", lambda: course.config.model_dump(mode="json", exclude_unset=True))
        else:
            status, self.standing = folder.run_status(course.path), self.shelf.load()
            self.was_running = status == "running"
            if status == "finished":
                self._clean()
        if self.standing is None:
            self.shelf.open(course.config)
        try:
            self.floor()
            may_tune = self.may_tune()
            self.race(RACE_SHARE if may_tune else PROBE_SHARE)
            if may_tune or self.may_tune_late():
                self.tune()
            else:
                self.catch_up()
        except StoppedError:
            kept, name = " before anything answered", course.team.stop.signal_name
            if self.history or self.standing:
                self.end("interrupted")
                kept = f": {course.path} holds {self.best.name}, which answers"
            again = command("train", "--resume", course.path)
            raise InterruptedRunError(f"stopped by {name}{kept}. Go on with: {again}") from None
        self.end("finished")

    def require_pace(self) -> None:
        """Raise ConfigError where the smallest network does not answer as many photos a second as are asked for."""
        pace = self.course.config.model.min_photos_per_second
        if not pace:
            return
        smallest = min(list_candidates(self.course.config, self.backbones[:1]), key=lambda one: one.size)
        with TemporaryDirectory() as path:
            seconds = replace(self.course, path=Path(path), kept={}).time_photos(smallest)
        if seconds * pace > 1:
            raise ConfigError(
                f"model.min_photos_per_second: {pace:g} are wanted; {smallest.backbone.name}, the smallest backbone at "
                f"hand, answers {1 / seconds:.0f} photos a second here, at {smallest.size} pixels. Lower it"
            )

    def floor(self) -> None:
        """The cheapest backbone's features and a head: from here on the folder answers."""
        course, plan = self.course, self.course.plan
        own = list_candidates(self.course.config, self.backbones[:1])
        seconds = course.time_photos(own[0])  # computed also where the choice is on record: batches must be the same
        size = plan.decide("size of the floor", lambda: self._choose_floor(own, seconds))
        candidate = replace(own[0], size=size)
        least = min(len(course.order), max(2 * course.num_classes, 20))
        course.collect_features(candidate, np.concatenate([course.order[:least], course.val]))
        self._check()
        entry = course.enter(candidate, len(course.order), deadline=FLOOR_SHARE * plan.seconds)
        entry = entry or course.score(candidate, course.order[:least])
        self._note(entry)
        self._put(Answer(f"a linear head on {candidate.key}", (self._probed_model(entry),)))
        if plan.elapsed > plan.seconds and self.standing is None:
            self.course.log.message(
                f"the {plan.seconds / 60:g} minutes were over before the least that answers was made: "
                f"this took {plan.elapsed:.0f} s"
            )

    def _choose_floor(self, own: Sequence[Candidate], seconds: float) -> int:
        """The largest side, up to the picture's own, that all photos fit into by the time of a few; else the smallest.

        The floor has time for some of them only, and the rest go on from there.
        """
        course, first = self.course, own[0]
        count = len(course.order) + len(course.val)
        left = FEATURE_SHARE * course.plan.seconds - course.plan.elapsed
        smallest = min(one.size for one in own)
        needed = {size: seconds * (size / first.size) ** 2 for size in range(first.size, smallest - 1, -SIZE_STEP)}
        pace = course.config.model.min_photos_per_second or 0
        fast = {size: each for size, each in needed.items() if each * pace <= 1}
        return next((size for size, each in fast.items() if count * each <= left), smallest)

    def may_tune(self) -> bool:
        """Measure an update of the cheapest backbone: without time for some epochs, the race has all of it."""
        if not len(self.course.val):
            self.course.log.message("no fine-tuning: without validation photos nothing could tell whether it helped")
            return False
        entry = next(iter(self.entries.values()))

        def count_epochs() -> float:
            # An update takes the time of some three predictions: where those alone do not fit, none is measured.
            seconds = TUNE_SHARE * self.course.plan.seconds
            guess = seconds / (3 * entry.seconds_per_photo * len(self.course.order))
            # Predictions decode whole photos, and updates take reduced ones: where measuring is cheap, it tells.
            if guess < LEAST_EPOCHS / 3 and 200 * entry.seconds_per_photo > 0.02 * self.course.plan.seconds:
                return guess
            options = tuning.list_options(self.course, entry.candidate, seconds=seconds, depths=1)
            return max(option.epochs for option in options)

        self.epochs = epochs = self.course.plan.decide(EPOCHS, count_epochs)
        is_enough = epochs >= LEAST_EPOCHS
        what = "about half of the time goes to it" if is_enough else "too few to pay, so the race may take all of it"
        self.course.log.message(f"fine-tuning: {TUNE_SHARE:.0%} of the time would allow {epochs:.1f} epochs; {what}")
        self._check()
        return is_enough

    def may_tune_late(self) -> bool:
        """Whether the race left time for the epochs that half of it did not allow.

        Frozen stages and a smaller picture make an update about twice as fast.
        """
        plan = self.course.plan
        needed = LEAST_EPOCHS * TUNE_SHARE * plan.seconds
        return bool(len(self.course.val)) and plan.decide(
            "time for epochs is left", lambda: 2 * self.epochs * (plan.left - self.reserve) >= needed
        )

    def race(self, share_of_time: float) -> None:
        """Candidates on growing shares of the photos; then the best, and their average, on all."""
        course, plan = self.course, self.course.plan
        end = share_of_time * plan.seconds
        everything = list_candidates(course.config, self.backbones)
        pace = course.config.model.min_photos_per_second or 0
        fast = plan.decide(
            "fast enough", lambda: [one.key for one in everything if self._guess_seconds(one) * pace <= 1]
        )
        running = everything = [one for one in everything if one.key in fast]
        counts = rungs(len(course.order), course.num_classes)
        if not plan.decide("compare on a share of the photos", lambda: self._fits(running[:2], end)):
            # All photos of the floor's first, then of what else there is time for.
            floor = next(iter(self.entries.values())).candidate
            others = [one for one in running if one.backbone != floor.backbone or one.size > floor.size]
            running, counts = [floor, *others], counts[-1:]
        for number, count in enumerate(counts[:-1], start=1):
            share = number / len(counts) * 0.5
            deadline = plan.decide(f"round of {count}", lambda share=share: plan.elapsed + share * (end - plan.elapsed))
            ranked = sorted(self._round(running, count, deadline), key=lambda entry: entry.log_loss)
            firsts = _firsts(ranked)  # the best picture of each backbone, then the next best
            best = (*firsts, *(one for one in ranked if one not in firsts))
            running = [entry.candidate for entry in best[: max(2, -(-len(running) // 3))]]
        # What was not compared for lack of time may still fit into what is left.
        untried = sorted((one for one in everything if one.key not in self.entries), key=lambda one: -one.size)
        for number, candidate in enumerate(dict.fromkeys([*running, *untried])):
            deadline = end
            if not plan.decide(f"all photos of {candidate.key}", lambda one=candidate: self._fits([one], end)):
                if number:
                    continue
                # As many as there is time for: a head on more photos than the floor's is worth it.
                deadline = end - max(map(self._guess_fit, self.entries.values()))
            self._round([candidate], counts[-1], deadline)
            self._average()

    def catch_up(self) -> None:
        """All photos for those that lost on a part of them: nothing else waits for the time."""
        end, count = PROBE_SHARE * self.course.plan.seconds, len(self.course.order)
        lost = [entry for entry in self.entries.values() if len(entry.numbers) < count]
        for candidate in [entry.candidate for entry in sorted(lost, key=lambda entry: entry.log_loss)]:
            if self.course.plan.decide(f"catch up {candidate.key}", partial(self._fits, [candidate], end)):
                self._round([candidate], count, end)
                self._average()

    def _round(self, running: Sequence[Candidate], count: int, deadline: float) -> list[Entry]:
        entries: list[Entry] = []
        for candidate in running:
            if not self.course.plan.decide(f"try {candidate.key}", lambda: self.course.plan.elapsed < deadline):
                break
            entry = self.entries.get(candidate.key)
            if entry is None or len(entry.numbers) < count:
                entry = self.course.enter(candidate, count, deadline=deadline)
                if entry is not None:
                    self._note(entry)
            elif len(entry.numbers) > count:  # compared on the photos that the others saw
                entry = self.course.score(candidate, self.course.order[:count])
            self._check()
            if entry is not None:
                entries.append(entry)
        # What the deadline cut short is not compared with the others, unless it is all there is.
        return [entry for entry in entries if len(entry.numbers) == count] or entries

    def _fits(self, wanted: Sequence[Candidate], end: float) -> bool:
        """Whether the features of all photos, and heads on them, can be had of these candidates together by `end`."""
        course = self.course
        fit = max(self._guess_fit(entry) for entry in self.entries.values())
        needed = 0.0
        for candidate in dict.fromkeys(wanted):
            entry = self.entries.get(candidate.key)
            missing = len(course.order) + len(course.val) - (len(entry.numbers) if entry else 0)
            seconds = entry.seconds_per_photo if entry else self._guess_seconds(candidate)
            needed += missing * seconds + fit
        return course.plan.elapsed + needed < end

    def _guess_fit(self, entry: Entry) -> float:
        """Seconds of a head on all photos, from one on some: its products grow, and the search around them does not."""
        num_all, num_features = len(self.course.order), entry.head.weight.shape[1]
        sizes = [num * min(num, num_features) * self.course.num_classes for num in (num_all, len(entry.numbers))]
        return entry.fit_seconds * (1 + sizes[0] / SEARCH_SIZE) / (1 + sizes[1] / SEARCH_SIZE)

    def _guess_seconds(self, candidate: Candidate) -> float:
        """Seconds per photo of a candidate that was not tried, from those that were."""
        return min(
            entry.seconds_per_photo
            * (candidate.size / entry.candidate.size) ** 2
            * (candidate.backbone.parameters / entry.candidate.backbone.parameters)
            for entry in self.entries.values()
        )

    def _average(self) -> None:
        """Promote the average of the best entries on the most photos."""
        most = max(len(entry.numbers) for entry in self.entries.values())
        alike = [entry for entry in self.entries.values() if len(entry.numbers) == most]
        labels = self.course.dataset.labels[self.course.order[:most]]
        chosen = best_average(alike, labels, is_allowed=self._may_answer)
        if not chosen:
            return
        names = " and ".join(entry.candidate.key for entry in chosen)
        what = f"a linear head on {names}" if len(chosen) == 1 else f"the average of linear heads on {names}"
        self._put(Answer(what, tuple(map(self._probed_model, chosen))))

    def _may_answer(self, members: Sequence[Entry | Model], most: int = MEMBERS) -> bool:
        """Whether these networks may answer together, by their number, their parameters and their pace."""
        settings = self.course.config.model
        parameters = sum(member.parameters for member in members)
        seconds = sum(member.seconds_per_photo for member in members)
        is_small = parameters <= 1e6 * (settings.max_parameters_millions or math.inf)
        return len(members) <= most and is_small and seconds * (settings.min_photos_per_second or 0) <= 1

    def _note(self, entry: Entry) -> None:
        known = self.entries.get(entry.candidate.key)
        if known is None or len(entry.numbers) >= len(known.numbers):
            self.entries[entry.candidate.key] = entry
        seconds = entry.seconds_per_photo * len(entry.numbers) + entry.fit_seconds
        figures = {"photos": len(entry.numbers), "top1": entry.top1, "log_loss": entry.log_loss, "l2": entry.head.l2}
        pace = {"seconds": seconds, "milliseconds_per_photo": 1000 * entry.seconds_per_photo}
        self.tried.append({"what": entry.candidate.key, **figures, **pace})
        self.course.log.message(
            f"{entry.candidate.key}: top-1 {entry.top1:.4f}, log loss {entry.log_loss:.3f}, cross-validated on "
            f"{len(entry.numbers)} photos"
        )

    def _put(self, answer: Answer) -> None:
        """Let an answer stand in the folder from now on, and say so."""
        if self.history and answer.keys == self.best.keys:
            return
        self.history.append((self.course.plan.elapsed, answer))
        kept = self._choose_kept(answer)
        if kept is answer:
            self.shelf.put(answer)
        figures = self.shelf.score(kept)
        shown = f", validation top-1 {figures['top1']:.4f}" if figures else ""
        self.course.log.message(f"{max(self.course.plan.left, 0):.0f} s left; kept if it ended now: {kept.name}{shown}")
        self.curve.append({"seconds": self.history[-1][0], "kept": kept.name, "top1": figures.get("top1")})
        self._note_time()

    def _choose_kept(self, answer: Answer, *, is_last: bool = False) -> Answer:
        """This answer, or what an earlier process left if that is better, or if nothing could tell before the end."""
        if self.standing is not None:
            rival = self._balance(answer) if DIVIDED in self.standing.name else answer
            if self._loss(self.standing) < self._loss(rival) - 1e-6 if len(self.course.val) else not is_last:
                return self.standing
            self.standing = None
            self.shelf.open(self.course.config)
        return answer

    def _note_time(self) -> None:
        """Say in the folder how far the run is, so that one that is killed goes on with the time that is left."""
        summary = {"status": "running", "kept": self.curve[-1]["kept"], "history": self.curve}
        folder.write_json(self.course.path / folder.SUMMARY, summary | {"seconds": self.course.plan.elapsed})

    def tune(self) -> None:
        """Fine-tune the best backbone, then others as long as time allows, and choose among all that answers."""
        course, probed = self.course, self.best
        tuned: dict[str, list[Answer]] = {}  # by backbone
        reserve = self.reserve
        while record := course.plan.decide("fine-tune", lambda: self._choose_tuning(reserve, done=tuned)):
            key, seconds_of_others, *values = record
            entry, option = self.entries[key], tuning.Option(*values)
            course.log.message(
                f"fine-tuning {key} at {option.size} pixels, {option.freeze} stages frozen, {option.epochs:.1f} epochs"
            )
            own = {"reserve": reserve + seconds_of_others, "on_epoch": partial(self._keep_epoch, entry)}
            found = course.team.ask(course, tuning.tune, tuning.soften(course, entry), option, **own)
            if found is None:
                raise StoppedError
            self.tried.append({"what": f"fine-tuning of {key}", "updates": found.updates, "seconds": found.seconds})
            tuned[entry.candidate.backbone.name] = [
                Answer(f"{key} fine-tuned ({name})", (self._tuned_model(entry, name, found.config, weights, val),))
                for name, (weights, val) in found.networks.items()
            ]
            self._choose(probed, tuned)
        if not tuned:
            course.log.message("fine-tuning: the time left allows too few epochs to pay")

    def _choose_tuning(self, reserve: float, *, done: Container[str]) -> list[Any]:
        """Key of the best entry that can be fine-tuned for long enough, what it leaves to others, and how; or nothing.

        Time that buys enough epochs for several is shared: their average errs less than one does after more epochs.
        """
        self._check()
        seconds = self.course.plan.left - reserve
        if seconds <= 0:
            return []
        ranked = sorted(self.entries.values(), key=lambda entry: (-len(entry.numbers), entry.log_loss))
        ranked = [one for one in ranked if one.candidate.backbone.name not in done and self._may_answer([one])]
        firsts = _firsts(ranked)
        found: list[Any] = []
        fallback = found
        for entry in (*firsts, *(one for one in ranked if one not in firsts)):
            is_first = entry in firsts
            if fallback and not is_first:
                break
            options = tuning.list_options(self.course, entry.candidate, seconds=seconds, measures=is_first)
            for sharing in range(len(firsts), 0, -1):
                option = tuning.choose_option(options, sharing=sharing)
                found = [entry.candidate.key, seconds - seconds / sharing, *astuple(option)] if option else []
                if option and option.epochs >= tuning.ENOUGH_EPOCHS:
                    return found
            fallback = fallback or found
        return fallback

    def _keep_epoch(self, entry: Entry, report: EpochReport, config: Config, weights: tuning.Weights) -> None:
        """Let the network of an epoch answer if it is better than what answers."""
        if report.predictions is None:
            return
        val = report.predictions.probabilities()
        weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}  # training goes on in them
        model = self._tuned_model(entry, f"epoch {report.epoch}", config, weights, val)
        self.course.log.message(f"fine-tuning, epoch {report.epoch}: validation top-1 {report.metrics['top1']:.4f}")
        answer = Answer(f"{entry.candidate.key}, fine-tuned for {report.epoch} epochs", (model,))
        if self._loss(answer) < self._loss(self.best):
            self._put(answer)
            self.best_epoch = answer
        self._note_time()

    def _choose(self, probed: Answer, tuned: Mapping[str, Sequence[Answer]]) -> None:
        """Choose by validation loss among probes, fine-tuned weights, interpolations, and their averages."""
        alone = [answer for answers in tuned.values() for answer in answers]
        joint = tuple(min(answers, key=self._loss).members[0] for answers in tuned.values() if answers)
        if len(joint) > 1 and self._may_answer(joint):
            alone.append(Answer(f"the average of {' and '.join(member.key for member in joint)}", joint))
        self.choices = [probed, *([self.best_epoch] if self.best_epoch else []), *alone]
        # Beside a fine-tuned network, heads on its own backbone before that add little to those on others.
        others = tuple(one for one in probed.members if one.config.model.name not in tuned)
        for members in dict.fromkeys((probed.members, others)):
            names = " and ".join(member.key for member in members)
            self.choices += [
                Answer(f"{answer.name}, averaged with heads on {names}", (*members, *answer.members))
                for answer in alone
                if members and self._may_answer([*members, *answer.members], MEMBERS + 1)
            ]
        self._put(min(self.choices, key=self._loss))

    def _loss(self, answer: Answer) -> float:
        """Validation log loss at the temperature that fits best: an average of sure answers is less sure than it is."""
        temperature = choose_temperature(answer.val, self._labels)
        return log_loss(apply_temperature(log_probabilities(answer.val), temperature), self._labels)

    def _tuned_model(self, entry: Entry, name: str, config: Config, weights: tuning.Weights, val: Floats) -> Model:
        key = f"{entry.candidate.key}-tuned-{name.replace(' ', '-').replace('%', '')}"
        temperature, pace = choose_temperature(val, self._labels), entry.seconds_per_photo
        return Model(key, config, self._describe(entry, config), dict(weights), val, temperature, pace)

    def _probed_model(self, entry: Entry) -> Model:
        """The network of an entry, with its answers on the validation photos."""
        course, head = self.course, entry.head
        config = entry.candidate.configure(course.config)
        val = head.answer(course.collect_features(entry.candidate, course.val).select(course.val))
        own = course.load_model(entry.candidate).model.state_dict()
        weights = {name: tensor for name, tensor in own.items() if not name.startswith("head.")}
        weights |= {"head.weight": head.weight, "head.bias": head.bias}
        temperature = choose_temperature(head.out_of_fold, course.dataset.labels[entry.numbers])
        pace = entry.seconds_per_photo
        return Model(_key(entry), config, self._describe(entry, config), weights, val, temperature, pace)

    def _describe(self, entry: Entry, config: Config) -> dict[str, Any]:
        """Return the model.json of an entry's network."""
        built = self.course.load_model(entry.candidate)
        evaluation = build.build_eval_spec(config, built.data)
        precision = self.course.team.fabric.strategy.precision.precision
        return build.describe_model(built, evaluation, precision=precision, channels_last=True)

    def _check(self) -> None:
        if self.course.team.stop:
            raise StoppedError

    def end(self, status: str) -> None:
        """Leave the best answer as an ordinary run, and say how it came about."""
        self.tried += [{"what": answer.name, **self.shelf.score(answer)} for answer in self.choices]
        answer = self._choose_kept(self.best, is_last=status == "finished") if self.history else self.standing
        assert answer is not None
        if answer is self.standing:
            self.history, self.choices = [(0.0, answer)], [answer, *self.choices]
        if answer is not self.standing or self.was_running:
            answer = self._balance(self._refit(answer) if status == "finished" else answer)
            self.shelf.settle(answer)
            (self.course.path / STORED).unlink(missing_ok=True)
            if status == "finished":
                self._store_features(answer)
        figures = self.shelf.score(answer)
        if figures:
            figures |= {"optimistic_bias": self._optimistic_bias()}
            # Where an earlier process found answers, nobody knows when.
            if self.standing is None and (self.is_new or not self.course.plan.spent_before):
                figures |= {"more_time": self._more_time()}
        spent = {"seconds": self.course.plan.elapsed, "budget_seconds": self.course.plan.seconds}
        selection = {"epochs": 0, "select": "best", "metric": "log_loss", "best_epoch": 0}
        found = {"kept": answer.name, "tried": self.tried, "history": self.curve}
        summary = {"status": status, **found, **spent, **selection}
        folder.write_json(self.course.path / folder.SUMMARY, summary | ({"val": figures} if figures else {}))
        if status == "finished":
            self.shelf.clear(answer)
            self._clean()

    def _clean(self) -> None:
        for name in (FEATURES, tuning.TUNING):
            shutil.rmtree(self.course.path / name, ignore_errors=True)

    def _refit(self, answer: Answer) -> Answer:
        """The answer with its probed heads fitted on the validation photos too, if `data.train_on` asks for it.

        What it says of the validation photos stays that of the heads that have not learned from them.
        """
        course, labels = self.course, self.course.dataset.labels
        if self.course.config.data.train_on != "train+val" or not len(course.val) or REFITTED in answer.name:
            return answer
        entries = {_key(entry): entry for entry in self.entries.values()}
        if not any(member.key in entries for member in answer.members):
            course.log.message("what answers has no head of this run, so none was fitted on the validation photos too")
            plain = {"data": {"train_on": "train"}}
            write_whole(course.path / folder.RECIPE, dump_config(change(course.config, plain)))
            own = (replace(member, config=change(member.config, plain)) for member in answer.members)
            return replace(answer, members=tuple(own))
        members: list[Model] = []
        for member in answer.members:
            if (entry := entries.get(member.key)) is not None:
                numbers = np.concatenate([entry.numbers, course.val])
                features = course.collect_features(entry.candidate, numbers).select(numbers)
                head = refit_head(features, labels[numbers], entry.head)
                weights = {**member.weights, "head.weight": head.weight, "head.bias": head.bias}
                member = replace(member, key=f"{member.key}-refitted", weights=weights)
            members.append(member)
        self.tried.append({"what": f"{answer.name}: heads fitted on train+val"})
        return Answer(f"{answer.name} {REFITTED}", tuple(members))

    def _balance(self, answer: Answer) -> Answer:
        """The answer with the class shares of training divided out, if `train.class_weights` asks for it."""
        if self.course.config.train.class_weights == "none" or DIVIDED in answer.name:
            return answer
        balanced = [member.balance(self.shelf.prior) for member in answer.members]
        members = [replace(member, key=f"{member.key}{BALANCED}") for member in balanced]
        return Answer(f"{answer.name} {DIVIDED}", tuple(members))

    def _store_features(self, answer: Answer) -> None:
        """Keep what the heads of the answer were fitted on: `fieldmark extend` fits them again."""
        entries = {_key(entry): entry for entry in self.entries.values()}
        for member in answer.members:
            if (entry := entries.get(member.key.removesuffix(BALANCED).removesuffix("-refitted"))) is not None:
                known = self.course.collect_features(entry.candidate, entry.numbers)
                known.save(self.shelf.place(answer, member) / STORED, kind=torch.float16)

    def _optimistic_bias(self) -> float:
        """Expected excess of the accuracy on the photos that chose the answer, in [0, 1]."""
        if len(self.choices) < 2:
            return 0.0
        correct = np.stack(list(map(self._hits, self.choices)))
        return optimism_from_photos(correct, draws=2000, rng=np.random.default_rng(0))

    def _more_time(self) -> dict[str, float]:
        """Return what the second half of the time earned in accuracy, with its 95 % interval: more would earn less."""
        half = self.course.plan.elapsed / 2
        before = next((answer for at, answer in reversed(self.history) if at <= half), self.history[0][1])
        hits = [self._hits(answer).astype(np.float64)[None] for answer in (before, self.best)]
        found = paired_difference(*hits, level=0.95).interval
        return {"second_half_earned": found.estimate, "low": found.low, "high": found.high}

    def _hits(self, answer: Answer) -> NDArray[np.bool_]:
        """(M,) whether each validation photo is named correctly."""
        return answer.val.argmax(1) == self._labels

    @property
    def _labels(self) -> NDArray[np.int64]:
        return self.course.dataset.labels[self.course.val]


def _firsts(ranked: Sequence[Entry]) -> list[Entry]:
    """Return the first entry of each backbone."""
    firsts: dict[str, Entry] = {}
    for entry in ranked:
        firsts.setdefault(entry.candidate.backbone.name, entry)
    return list(firsts.values())


def _key(entry: Entry) -> str:
    """Name of the network with an entry's head."""
    return f"{entry.candidate.key}-{len(entry.numbers)}"


def format_result(run: Run) -> str:
    """Return what was tried, what is kept, and what to do with it."""
    summary = run.summary
    raced = {row["what"]: row for row in summary["tried"] if "photos" in row}
    chosen_from = [row for row in summary["tried"] if "top1" in row and "photos" not in row]
    values = {
        "path": run.path,
        "summary": summary,
        "raced": sorted(raced.items(), key=lambda item: item[1]["log_loss"])[:SHOWN],
        "chosen_from": sorted(chosen_from, key=lambda row: row["log_loss"])[:SHOWN_CHOICES],
        "accuracy": format_accuracy(summary["val"]) if "val" in summary else "",
        "next_steps": next_steps(run),
    }
    return fill_template("budget.md", values)
