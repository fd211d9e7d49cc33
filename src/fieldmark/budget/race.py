"""Features of candidates, and the race that finds the few worth all photos: no training but that of heads.

Shape letters: N photos, F features, K classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from fieldmark.budget.candidates import Backbone, Candidate
from fieldmark.budget.heads import STRENGTHS, Head, fit_head
from fieldmark.budget.plan import Plan
from fieldmark.budget.team import StoppedError, Team
from fieldmark.config import Config
from fieldmark.data.loader import Batch, Loader, Prepare, cut_plan, join_batches, shard_plan
from fieldmark.models.catalog import InputConfig
from fieldmark.models.classifier import Classifier
from fieldmark.models.weights import fuse_batch_norm
from fieldmark.progress import Progress
from fieldmark.runs import build
from fieldmark.runs.dataset import Dataset, EvalPhotos, PhotoReader
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.session import run_together
from fieldmark.training.checkpoint import load_saved_weights, save_weights
from fieldmark.training.metrics import log_loss

FEATURES = "features"

# In a run folder: what its network gives before the head, so that `fieldmark extend` needs no old photos.
STORED = "features.safetensors"
CHUNK = 64  # photos between two looks at the clock, at least
# Photos of a pass on a core: activations stay in its caches. Lite0 at 224 pixels: 37 photos/s of one core in batches of
# 8, 24 in batches of 32 (docs/performance.md).
CPU_BATCH = 8
FEW_PHOTOS, MANY_FOLDS, FEW_FOLDS = 1000, 5, 3  # of few photos heads are compared on more folds, since each counts
MIN_PER_CLASS = 8  # photos of a class below which a comparison of candidates says nothing

Numbers = NDArray[np.int64]


def stratified_order(labels: Numbers, *, seed: int) -> Numbers:
    """(N,) an order of which every beginning holds the classes as the whole does."""
    rng = np.random.default_rng([seed, 0x62756467])
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position, kind="stable").astype(np.int64)


def make_folds(labels: Numbers, groups: Sequence[str], *, folds: int, seed: int) -> Numbers:
    """(N,) fold of each photo, stratified by class; photos of one group ("" is none) share a fold."""
    if any(groups):
        from sklearn.model_selection import StratifiedGroupKFold

        alone = [group or f"\0{number}" for number, group in enumerate(groups)]
        result = np.zeros(len(labels), np.int64)
        possible = min(folds, len(set(alone)), int(np.bincount(labels).max()))
        if possible > 1:  # a single group cannot be kept together and left out
            splitter = StratifiedGroupKFold(possible, shuffle=True, random_state=seed % 2**32)
            for fold, (_, held_out) in enumerate(splitter.split(labels, labels, alone)):
                result[held_out] = fold
            return result
    order = stratified_order(labels, seed=seed)
    by_class = order[np.argsort(labels[order], kind="stable")]
    result = np.empty(len(labels), np.int64)
    result[by_class] = np.arange(len(labels)) % folds
    return result


def chunk_size(device: str) -> int:
    """Photos of each process between two looks at the clock: on a CPU at least a pass for each core; a GPU's batch."""
    return max(CHUNK, CPU_BATCH * usable_cores()) if device == "cpu" else CHUNK


@dataclass(frozen=True, eq=False)
class Features:
    """A candidate's features of some photos, in the order of computing."""

    numbers: Numbers  # (N,) photos
    values: NDArray[np.float32]  # (N, F)
    seconds: float  # that they take at the median pace, without what a network's first pictures pay once

    @property
    def seconds_per_photo(self) -> float:
        """Mean time of one photo."""
        return self.seconds / max(len(self.numbers), 1)

    def select(self, numbers: Numbers) -> NDArray[np.float32]:
        """(M, F) features of these photos, all of which must be there."""
        row = {int(number): row for row, number in enumerate(self.numbers)}
        return self.values[[row[int(number)] for number in numbers]]

    def join(self, numbers: Numbers, values: NDArray[np.float32], *, seconds: float = 0.0) -> Features:
        """These and those of other photos."""
        parts = [self.values, values] if len(self.numbers) else [values]
        return Features(np.concatenate([self.numbers, numbers]), np.concatenate(parts), self.seconds + seconds)

    def save(self, path: Path, *, kind: torch.dtype = torch.float32) -> None:
        """Write them as shares of a power of two, so that `kind` may be float16, which is enough for a head."""
        scale = torch.tensor(2.0 ** int(np.frexp(np.abs(self.values).max(initial=0.0))[1]))
        values = (torch.from_numpy(self.values) / scale).to(kind)
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"numbers": torch.from_numpy(self.numbers), "values": values, "scale": scale, "seconds": seconds}
        save_weights(path, tensors)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote; empty where there is no file."""
        if not path.is_file():
            return cls(np.zeros(0, np.int64), np.zeros((0, 0), np.float32), 0.0)
        stored = load_saved_weights(path)
        values = stored["values"].float() * stored["scale"]
        return cls(stored["numbers"].numpy(), values.numpy(), float(stored["seconds"]))


@dataclass(frozen=True, eq=False)
class Entry:
    """Says how a candidate did on the photos that it was shown; losses and accuracies are out of fold."""

    candidate: Candidate
    numbers: Numbers  # (N,) training photos
    head: Head
    log_loss: float
    top1: float
    seconds_per_photo: float
    fit_seconds: float

    @property
    def parameters(self) -> int:
        """Of backbone and head."""
        return self.candidate.backbone.parameters + self.head.weight.numel() + self.head.bias.numel()


@dataclass(frozen=True, eq=False)
class Course:
    """Holds what all candidates share: settings, photos, clock and device, and what was computed of them so far.

    Features are computed once and kept in files, so that a killed run need not repeat them.
    """

    config: Config
    path: Path  # the run folder
    plan: Plan
    log: Progress
    team: Team
    dataset: Dataset
    order: Numbers  # (N,) training photos, stratified
    val: Numbers  # (M,) validation photos
    models: dict[Backbone, build.BuiltModel] = field(default_factory=dict[Backbone, build.BuiltModel])
    fused: dict[Backbone, Classifier] = field(default_factory=dict[Backbone, Classifier])
    strengths: list[float] = field(default_factory=list[float])  # L2 penalties that heads took, in order
    kept: dict[str, Features] = field(default_factory=dict[str, Features])
    # Seconds per photo and pixel of an update with so many stages frozen, as last measured.
    paces: dict[tuple[Backbone, int], float] = field(default_factory=dict[tuple[Backbone, int], float])

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.dataset.index.classes)

    def load_model(self, candidate: Candidate) -> build.BuiltModel:
        """The candidate's network with its weights, on the device, in evaluation mode."""
        if candidate.backbone not in self.models:
            torch.manual_seed(self.config.train.seed)  # random weights are the same in all processes
            built = build.build_model(candidate.configure(self.config), num_classes=self.num_classes)
            built.model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.team.fabric.to_device(built.model)
            # By one picture of each backbone, whichever of its candidates comes first.
            own = replace(candidate, size=candidate.backbone.picture.test_size)
            build.fit_pool(built.model, self._pictures(own, built.data), self.order)
            self.models[candidate.backbone] = built
        return self.models[candidate.backbone]

    def _prepare_features(self, candidate: Candidate) -> Prepare:
        """Say how a loader prepares pictures; on a CPU their features too, so that each core has a network of its own.

        With all threads in one network they meet at every layer, which on a busy machine costs most of the time.
        """
        built = self.load_model(candidate)
        pictures = self._pictures(candidate, built.data)
        if self.team.fabric.device.type != "cpu":
            return pictures
        if candidate.backbone not in self.fused:
            fused = copy.deepcopy(built.model)
            fused.backbone, _ = fuse_batch_norm(built.model.backbone)
            self.fused[candidate.backbone] = fused
        model = self.fused[candidate.backbone]
        return lambda numbers, epoch: join_batches(
            [self._compute(model, pictures(few, epoch)) for few in cut_plan(numbers, CPU_BATCH)]
        )

    def _pictures(self, candidate: Candidate, data: InputConfig) -> EvalPhotos:
        evaluation = build.build_eval_spec(candidate.configure(self.config), data)
        return EvalPhotos(self._reader, evaluation, keeps_broken=False)

    @cached_property
    def _reader(self) -> PhotoReader:
        """Made once, as it names all files: that takes seconds for a million."""
        return build.build_reader(self.config, self.dataset.index)

    def _compute(self, model: Classifier, batch: Batch) -> Batch:
        """The batch with (B, F, 1, 1) features in place of its pictures."""
        images = batch.images.to(self.team.fabric.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), self.team.fabric.autocast():
            features = model.features(images).float().cpu()
        return replace(batch, images=features[:, :, None, None])

    def collect_features(self, candidate: Candidate, numbers: Numbers, *, deadline: float = math.inf) -> Features:
        """Features of at least the first of `numbers`: of as many as are done by `deadline`, in elapsed seconds.

        After a signal those that are done are kept, and a StoppedError says that they are not all.
        """
        file = self.path / FEATURES / f"{candidate.key}.safetensors"
        known = self.kept.get(candidate.key) or Features.load(file)
        missing = numbers[~np.isin(numbers, known.numbers)]
        if not len(missing):
            return known
        self.log.start(len(missing), 0)
        new = self.team.ask(self, Course.compute_features, candidate, missing, deadline)
        found = known.join(new.numbers, new.values, seconds=new.seconds)
        self.kept[candidate.key] = found
        found.save(file)
        if self.team.stop:
            raise StoppedError
        return found

    def compute_features(self, candidate: Candidate, numbers: Numbers, deadline: float) -> Features:
        """In all processes: each computes a share, and the first looks at the clock."""
        done, parts, rates = list[Numbers](), list[NDArray[np.float32]](), list[float]()
        rank, processes = self.team.fabric.global_rank, self.team.fabric.world_size
        with Loader(workers=0, threads=usable_cores()) as loader:
            prepare = run_together(self.team.fabric, lambda: self._prepare_features(candidate))

            def compute(share: Sequence[int]) -> tuple[list[NDArray[np.float32]], bool]:
                batches = list(loader.batches(prepare, [share] if len(share) else [], epoch=0))
                if self.team.fabric.device.type != "cpu":
                    batches = [self._compute(self.load_model(candidate).model, batch) for batch in batches]
                values = [batch.images.flatten(1).numpy() for batch in batches]
                return values, self.plan.elapsed > deadline or bool(self.team.stop)

            size = processes * self.team.agree(lambda: chunk_size(self.team.fabric.device.type))
            for start in range(0, len(numbers), size):
                began = time.perf_counter()
                chunk = np.sort(numbers[start : start + size])
                (share,) = shard_plan([chunk.tolist()], rank=rank, processes=processes)
                shares = self.team.gather(partial(compute, share))
                parts += [value for values, _ in shares for value in values]
                done.append(chunk)
                rates.append((time.perf_counter() - began) / len(chunk))
                self.log.advance(len(chunk))
                if shares[0][1]:
                    break
        return Features(np.concatenate(done), np.concatenate(parts), median(rates) * sum(map(len, done)))

    def time_photos(self, candidate: Candidate) -> float:
        """Seconds per photo of a few; those before them warm up."""
        sample = self.order[: chunk_size(self.team.fabric.device.type) * self.team.fabric.world_size]
        few = sample[: len(sample) // 4]
        self.collect_features(candidate, few)
        began = time.perf_counter()
        self.collect_features(candidate, sample)
        return (time.perf_counter() - began) / max(len(sample) - len(few), 1)

    def enter(self, candidate: Candidate, count: int, *, deadline: float) -> Entry | None:
        """Score a candidate on the first `count` training photos, or on as many as fit; None if they are too few."""
        wanted = self.order[:count]

        def compute() -> int:
            found = self.collect_features(candidate, wanted, deadline=deadline)
            return int(np.isin(wanted, found.numbers).sum())

        number = self.plan.decide(f"photos of {candidate.key}, of {count}", compute)
        if number < count and number < 2 * self.num_classes:
            return None
        return self.score(candidate, wanted[:number])

    def score(self, candidate: Candidate, numbers: Numbers) -> Entry:
        """Fit and cross-validate a head on these training photos; after the first, of strengths near the last one's."""
        features = self.collect_features(candidate, numbers)
        labels = self.dataset.labels[numbers]
        groups = self.dataset.index.photos.groups[numbers]
        count = min(MANY_FOLDS if len(numbers) < FEW_PHOTOS else FEW_FOLDS, len(numbers))
        folds = make_folds(labels, groups, folds=count, seed=self.config.train.seed)
        began = time.perf_counter()
        middle = STRENGTHS.index(self.strengths[-1]) if self.strengths else None
        near = STRENGTHS if middle is None else STRENGTHS[max(middle - 1, 0) : middle + 2]
        head = fit_head(features.select(numbers), labels, folds, num_classes=self.num_classes, strengths=near)
        self.strengths.append(head.l2)
        seconds = time.perf_counter() - began
        top1 = float((head.out_of_fold.argmax(1) == labels).mean())
        loss = log_loss(head.out_of_fold, labels)
        pace = self.plan.decide(f"seconds a photo of {candidate.key}", lambda: features.seconds_per_photo)
        return Entry(candidate, numbers, head, loss, top1, pace, seconds)


def rungs(num_photos: int, num_classes: int) -> list[int]:
    """Photos of each round of a race: a ninth, a third, all; fewer rounds where a share would say nothing."""
    least = max(MIN_PER_CLASS * num_classes, 200)
    return [count for count in (num_photos // 9, num_photos // 3) if count >= least] + [num_photos]


def best_average(
    entries: Sequence[Entry], labels: Numbers, *, is_allowed: Callable[[Sequence[Entry]], bool]
) -> list[Entry]:
    """The entries whose mean out-of-fold probabilities lose least, added one by one, best first."""
    chosen: list[Entry] = []
    best = np.inf
    while averages := [[*chosen, one] for one in entries if one not in chosen and is_allowed([*chosen, one])]:
        losses = [log_loss(np.mean([one.head.out_of_fold for one in each], axis=0), labels) for each in averages]
        if min(losses) >= best:
            break
        best, chosen = min(losses), averages[int(np.argmin(losses))]
    return chosen
