"""A run folder predicts photos, exactly as it did while it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Batch, auto_workers, batches
from fieldmark.engine.evaluate import predict_batches
from fieldmark.experiment.batches import EvalPhotos, PhotoReader
from fieldmark.experiment.dataset import Progress
from fieldmark.experiment.ensemble import load_members, mean_probabilities
from fieldmark.experiment.environment import keep_freed_memory, quiet_fabric, usable_cores
from fieldmark.experiment.folder import Run


def predict_photos(
    run: Run, index: PhotoIndex, numbers: NDArray[np.int64], *, flips: bool, progress: Progress
) -> NDArray[np.float32]:
    """Probabilities of some photos of an index, or with `flips` of each photo and its mirror image in the mean.

    Returns:
        (N, K) float32 in the order of `numbers`, which must rise.

    Raises:
        PhotoError: A photo cannot be read.
    """
    if run.is_ensemble:
        members = load_members(run)
        return mean_probabilities(
            [predict_photos(member.run, index, numbers, flips=flips, progress=progress) for member in members],
            [member.temperature for member in members],
            [member.order for member in members],
        )
    return predict_with(run.load_model(), run, index, numbers, flips=flips, progress=progress)


def predict_with(
    model: nn.Module, run: Run, index: PhotoIndex, numbers: NDArray[np.int64], *, flips: bool, progress: Progress
) -> NDArray[np.float32]:
    """The same, by a model that stands in for the run's own; it is moved to the device."""
    data, info = run.config.data, run.model_info
    fabric = open_fabric(info)
    reader = PhotoReader(tuple(index.files()), index.label_numbers(), data.background, data.max_pixels)
    size = run.config.eval.batch_size
    plan = [numbers[start : start + size].tolist() for start in range(0, len(numbers), size)]
    prepare = EvalPhotos(reader, run.eval_spec(), keeps_broken=False)
    workers, _ = auto_workers(cores=usable_cores(), is_cached=False, has_gpu=fabric.device.type != "cpu")
    if info["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress.start(len(numbers), 0)
    predictions = predict_batches(
        fabric,
        fabric.to_device(model),
        _counted(batches(prepare, plan, epoch=0, workers=workers), progress),
        flips=flips,
        channels_last=info["channels_last"],
    )
    return predictions.probabilities()


def open_fabric(info: dict[str, Any]) -> Fabric:
    """One process with the precision that the run was trained in, where this machine has it."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        keep_freed_memory()
    precision = info["precision"] if has_gpu or info["precision"] != "16-mixed" else "32-true"
    quiet_fabric()
    return Fabric(accelerator="cuda" if has_gpu else "cpu", devices=1, precision=precision)


def _counted(loaded: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
    for batch in loaded:
        yield batch
        progress.advance(len(batch.numbers))
