"""Settings and a path become photos that can be trained on: found, divided, inspected, read, and put in an order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fieldmark.augment.reference import EvalSpec, Views, augment_reference, eval_picture, picture_shape
from fieldmark.augment.sample import AugmentSpec, BatchParams, sample_params
from fieldmark.config import DataConfig
from fieldmark.data import splits
from fieldmark.data.audit import find_doubts, find_gaps_in_training, find_leaks
from fieldmark.data.cache import PhotoCache
from fieldmark.data.columns import TRAIN, VAL
from fieldmark.data.decode import DecodeSpec, Source
from fieldmark.data.index import PhotoIndex, apply_corrections, load_index
from fieldmark.data.inspection import Inspection, PhotoFacts, name_folder
from fieldmark.data.loader import Batch, cut_plan, epoch_order
from fieldmark.data.shards import fetch_ahead
from fieldmark.errors import ConfigError, DataError, PhotoError
from fieldmark.files import user_folder
from fieldmark.progress import Progress
from fieldmark.runs.environment import usable_cores

Cached = tuple[PhotoCache | None, str]  # the cache of some photos, if there is one, and what was done about it
# Of (files, their (N, 2) sizes); what is missing comes by `read=`, and `progress=` is told.
Fill = Callable[..., Cached]


@dataclass(frozen=True)
class Dataset:
    """Photos that a run may use."""

    index: PhotoIndex  # usable photos, each in a split
    facts: tuple[PhotoFacts, ...]  # one for each photo of `index`
    broken: tuple[tuple[str, str], ...]  # (path, reason) of photos that were skipped
    notes: tuple[str, ...] = ()  # how the data were read, what was skipped, what looks wrong
    cached: Cached | None = None  # None where nothing was done about it yet

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class numbers of all photos."""
        return self.index.label_numbers()

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(N, 2) upright width and height in pixels."""
        return np.asarray([(fact.width, fact.height) for fact in self.facts], np.int64).reshape(-1, 2)


def find_photos(config: DataConfig) -> PhotoIndex:
    """Find the photos as they are, before splits."""
    if not config.path:
        raise ConfigError("no data: give a folder of class folders, or a table, as DATA or with --set data.path=...")
    columns = config.model_dump(include={"path_column", "label_column", "split_column"})
    group = config.group_column if config.group_by == "column" else None
    index = load_index(config.path, **columns, group_column=group)
    return apply_corrections(index, Path(config.corrections)) if config.corrections else index


SKIP_BROKEN = "train without them: --set data.broken=skip"


def prepare_dataset(
    config: DataConfig, *, progress: Progress, skip: str = "", fill: Fill | None = None, known: Sequence[str] = ()
) -> Dataset:
    """Find, inspect and divide the photos, and `fill` their cache meanwhile; `skip` is the way out of broken ones.

    Classes that are `known` from elsewhere need no photo to learn from.
    """
    everything = find_photos(config)
    # Photos without labels have no part in training: `check` and `predict` look at them.
    found = everything.select(everything.photos.is_labeled())
    facts, cached = inspect(found, config, progress=progress, fill=fill)
    problems = [(path, fact.problem) for path, fact in zip(found.photos.paths, facts, strict=True) if fact.problem]
    broken = [*found.damaged, *problems]
    if broken and config.broken == "refuse":
        raise DataError(f"{list_broken(broken, len(found.photos))}\nFix or remove them, or {skip or SKIP_BROKEN}")
    kept = [fact for fact in facts if not fact.problem]
    index = found.select(np.fromiter((not fact.problem for fact in facts), np.bool_, len(facts)))
    notes = [everything.describe(), *find_doubts(index, kept)]
    if broken:
        notes.append(f"{len(broken)} photos cannot be used and are skipped, such as {broken[0][0]!r}: {broken[0][1]}")
    groups = find_groups(index, kept, config)
    index = divide(index, groups, config)
    notes += find_leaks(index, kept)
    if groups is not None and (alone := sum(not group for group in groups)):
        notes.append(f"{alone} of {len(index)} photos have no group by {config.group_by}, and are divided one by one")
    num_train = {name: count.get("train", 0) for name, count in index.counts().items()} | dict.fromkeys(known, 1)
    for gap in find_gaps_in_training(num_train):
        raise DataError(f"{index.root}: {gap}")
    return Dataset(index, tuple(kept), tuple(broken), tuple(f"data: {note}" for note in notes), cached)


def inspect(
    index: PhotoIndex, config: DataConfig, *, progress: Progress, with_hash: bool = False, fill: Fill | None = None
) -> tuple[list[PhotoFacts], Cached | None]:
    """Decode every photo once, or remember that it was done; `with_hash` for finding near-duplicates.

    Also gives the cache of the usable photos, where `fill` opens one.
    """
    decoding, folder, cached = decode_spec(config), user_folder("inspections") / name_folder(index.root), None
    with Inspection(index.files(), decoding=decoding, with_hash=with_hash, cache_folder=folder) as inspection:
        if fill is not None:
            cached = fill(inspection.files, inspection.estimate_sizes(), read=inspection.read, progress=progress)
        facts = inspection.finish(threads=usable_cores(), progress=progress)
    if cached is not None and cached[0] is not None:
        usable = [number for number, fact in enumerate(facts) if not fact.problem]
        cached = (cached[0].select(usable), cached[1])
    return facts, cached


def decode_spec(config: DataConfig) -> DecodeSpec:
    """Say how files become pixels."""
    return DecodeSpec(config.background, config.max_pixels)


def find_groups(index: PhotoIndex, facts: Sequence[PhotoFacts], config: DataConfig) -> Sequence[str] | None:
    """(N,) the group of each photo, "" for none, as the settings say; None where they ask for no groups."""
    if config.group_by == "pattern":
        return splits.groups_by_pattern(index, config.group_pattern)
    if config.group_by == "capture_time":
        return splits.groups_by_capture_time(index, facts)
    return splits.groups_by_column(index) if config.group_by == "column" else None


def divide(index: PhotoIndex, groups: Sequence[str] | None, config: DataConfig) -> PhotoIndex:
    """Give every labeled photo a split, as the settings say, and those of a group the same."""
    if config.folds and config.test_fraction:
        raise ConfigError("data.folds divides all photos but those of test/: leave data.test_fraction at 0")
    if config.folds:
        index = splits.fold_index(index, folds=config.folds, fold=config.fold, seed=config.split_seed, groups=groups)
    else:
        shares = config.model_dump(include={"val_fraction", "test_fraction"})
        settings = {"group_by": config.group_by, "pattern": config.group_pattern, "gap": splits.BURST_SECONDS}
        index = splits.remembered_split(
            index, **shares, seed=config.split_seed, groups=groups, settings=settings, folder=user_folder("splits")
        )
    if config.train_on == "train+val":
        splits_now = index.photos.splits
        index = replace(index, photos=replace(index.photos, splits=np.where(splits_now == VAL, TRAIN, splits_now)))
    return index


def list_broken(broken: Sequence[tuple[str, str]], total: int, *, most: int = 10) -> str:
    """List the photos that cannot be used, a line each."""
    lines = [f"  {path!r} {reason}" for path, reason in broken[:most]]
    more = [f"  ... and {len(broken) - most} more (`fieldmark check --json` lists all)"] if len(broken) > most else []
    return "\n".join([f"{len(broken)} of {total} photos cannot be used:", *lines, *more])


@dataclass(frozen=True)
class PhotoReader:
    """The pixels of photos by number."""

    files: Sequence[Source | PhotoError]  # N
    labels: NDArray[np.int64]  # (N,) class numbers, -1 for unlabeled
    decoding: DecodeSpec

    def read(self, number: int, *, min_short_side: float | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 upright: whole, or with a short side of at least `min_short_side` or the photo's own."""
        return self.decoding.read(self.files[number], min_short_side=min_short_side)


@dataclass(frozen=True)
class TrainPhotos:
    """Prepares augmented training batches: `prepare(numbers, epoch)`."""

    reader: PhotoReader
    cache: PhotoCache | None  # reduced photos
    sizes: NDArray[np.int64]  # (N, 2) upright width and height of the photos
    spec: AugmentSpec  # what is drawn
    seed: int
    is_fast: bool  # the fast executor; else torchvision's transforms one by one, on whole photos
    preload: ClassVar[tuple[str, ...]] = ("fieldmark.augment.fast",)

    def __call__(self, numbers: Sequence[int], epoch: int) -> Batch:
        """(B, 3, S, S) float32, normalized and erased; a photo is the same in any batch and any process."""
        from fieldmark.augment.fast import augment_fast  # compiles, which a prediction need not wait for

        rows = np.asarray(numbers, np.int64)
        params = self.params(rows, epoch)
        if self.is_fast:
            photos = self._read(rows, params)
            array = augment_fast(photos, self.sizes[rows], params, self.spec)
            images = torch.from_numpy(array)
        else:
            fetch_ahead(self.reader.files[number] for number in rows)
            whole = (self.reader.read(int(number)) for number in rows)  # one at a time: they are large
            images = torch.stack([augment_reference(photo, params, row, self.spec) for row, photo in enumerate(whole)])
        return Batch(images, torch.from_numpy(rows), torch.from_numpy(self.reader.labels[rows]), ())

    def params(self, rows: NDArray[np.int64], epoch: int) -> BatchParams:
        """The random numbers of some photos."""
        return sample_params(self.spec, self.sizes[rows], seed=self.seed, epoch=epoch, numbers=rows)

    def _read(self, rows: NDArray[np.int64], params: BatchParams) -> list[NDArray[np.uint8]]:
        numbers = rows.tolist()
        photos = [self.cache.get(number) if self.cache is not None else None for number in numbers]
        fetch_ahead(self.reader.files[number] for number, photo in zip(numbers, photos, strict=True) if photo is None)
        # Decode no larger than the crop needs: its shorter side becomes `size` pixels.
        needed = self.spec.size * self.sizes[rows].min(axis=1) / np.maximum(params.box[:, 2:].min(axis=1), 1.0)
        return [
            self.reader.read(number, min_short_side=side) if photo is None else photo
            for number, side, photo in zip(numbers, needed.tolist(), photos, strict=True)
        ]


@dataclass(frozen=True)
class EvalPhotos:
    """Prepares evaluation batches: the same picture of a photo every time."""

    reader: PhotoReader
    spec: EvalSpec | Views
    keeps_broken: bool  # a photo that cannot be read becomes a gray image and a problem, instead of an error

    def __call__(self, numbers: Sequence[int], epoch: int) -> Batch:
        """(B, 3, S, S) float32, normalized; several views as `augment.reference` lays them out."""
        rows = np.asarray(numbers, np.int64)
        images = torch.zeros((len(rows), *picture_shape(self.spec)))
        problems: list[tuple[int, str]] = []
        fetch_ahead(self.reader.files[number] for number in rows)
        for row, number in enumerate(rows):
            try:
                images[row] = eval_picture(self.reader.read(int(number)), self.spec)
            except PhotoError as error:
                if not self.keeps_broken:
                    raise
                problems.append((row, error.reason))
        labels = torch.from_numpy(self.reader.labels[rows])
        return Batch(images, torch.from_numpy(rows), labels, tuple(problems))


@dataclass(frozen=True)
class TrainPlan:
    """The order of the photos over all epochs: a pure function of these values."""

    epochs: int
    train_numbers: NDArray[np.int64]  # photos of the training split
    val_numbers: NDArray[np.int64]  # photos of the validation split
    seed: int
    batch_size: int  # photos per update over all processes
    eval_batch_size: int
    processes: int  # at most, that train together

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one epoch: arithmetic alone, since it is asked for often."""
        return count_updates(len(self.train_numbers), self.batch_size, processes=self.processes)

    def updates(self, epoch: int) -> list[Sequence[int]]:
        """Shuffle an epoch and cut it into updates of photo numbers, over all processes."""
        order = epoch_order(len(self.train_numbers), seed=self.seed, epoch=epoch)
        return cut_updates(self.train_numbers[order], self.batch_size, processes=self.processes)  # type: ignore[arg-type]

    def eval_share(self, numbers: NDArray[np.int64], *, rank: int, processes: int) -> list[Sequence[int]]:
        """Give one process every n-th evaluation batch, so that batches do not depend on the number of processes."""
        return cut_plan(numbers.tolist(), self.eval_batch_size)[rank::processes]


def count_updates(num_photos: int, batch_size: int, *, processes: int) -> int:
    """Count the updates of an epoch.

    A last batch that would leave a process with fewer than two photos joins the one before: BatchNorm has no variance
    of one value, which is what a single photo amounts to at the end of a network on small images.
    """
    count = -(-num_photos // batch_size)
    last = num_photos - (count - 1) * batch_size
    return count - (count > 1 and last < 2 * processes)


def cut_updates(order: Sequence[int], batch_size: int, *, processes: int) -> list[Sequence[int]]:
    """Cut an epoch's order into updates; no photo is dropped."""
    count = count_updates(len(order), batch_size, processes=processes)
    return [order[start:end] for start, end in pairwise([*range(0, count * batch_size, batch_size), len(order)])]
