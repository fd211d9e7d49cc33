"""What a run will cost: photos prepared and trained on for a few seconds, and from that time, memory and bottleneck.

The weights' values do not change the cost, so none are loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fieldmark.config import Config
from fieldmark.data.index import PhotoIndex
from fieldmark.experiment import build
from fieldmark.experiment.dataset import known_sizes
from fieldmark.experiment.environment import usable_cores
from fieldmark.vision.model import Classifier, count_parameters, create_classifier
from fieldmark.vision.names import resolve_name
from fieldmark.vision.weights import data_config

PHOTOS_PREPARED = 32
PHOTOS_TRAINED = 8
SECONDS_MEASURED = 2.0
BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two averages, in 32 bit."""


@dataclass(frozen=True)
class Preflight:
    """What was measured, and what follows for the run.

    Attributes:
        prepared_per_second: Photos decoded and augmented in a second by one core, without a cache.
        trained_per_second: Photos trained on in a second by all of the device.
        epoch_seconds: One epoch with its validation.
        run_hours: All epochs, and the probe.
        memory_gigabytes: Weights, gradients, optimiser and activations of one update.
        parameters_millions: Size of the model.
    """

    prepared_per_second: float
    trained_per_second: float
    epoch_seconds: float
    run_hours: float
    memory_gigabytes: float
    parameters_millions: float

    @property
    def bottleneck(self) -> str:
        """What the time goes into: "preparing photos" or "training"."""
        one_photo = 1 / (self.prepared_per_second * usable_cores())
        return "preparing photos" if one_photo > 1 / self.trained_per_second else "training"

    def estimates(self) -> dict[str, float]:
        """Plain numbers, names with units."""
        return asdict(self)


def measure(config: Config, index: PhotoIndex, sizes: dict[int, tuple[int, int]]) -> Preflight:
    """Prepare and train on a few photos.

    Args:
        config: The settings.
        index: The photos, with their splits.
        sizes: Photo number -> upright width and height, of training photos that can be read.

    Raises:
        ConfigError: No such model, or no such device.
    """
    fabric, _ = build.build_fabric(config)
    if fabric.device.type == "cpu":
        torch.set_num_threads(build.choose_threads(config, workers=0).value)
    weights = data_config(resolve_name(config.model.name, config.model.weights), config.model.weights)
    size = build.train_size(config, weights)
    evaluation = build.build_eval_spec(config, weights)
    known = known_sizes(index, sizes)
    prepare = build.build_train_photos(
        config, index, known, size=size, evaluation=evaluation, is_fixres=False, cache=None
    )
    numbers = list(sizes)[:PHOTOS_PREPARED]
    prepared = _rate(lambda: len(prepare(numbers, 0).numbers))
    model = _model(config, num_classes=len(index.classes))
    fabric.to_device(model)
    micro_batch = config.train.micro_batch_size or config.train.batch_size
    images = torch.zeros(PHOTOS_TRAINED, 3, size, size, device=fabric.device)
    plain = build.build_optimizer(config, model, precision=fabric.strategy.precision)
    network, optimizer = fabric.setup(model, plain)

    def loss() -> Tensor:
        return functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long).to(fabric.device))

    def step() -> int:
        fabric.backward(loss())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return len(images)

    activations = _saved_bytes(loss) / len(images) * micro_batch
    trained = _rate(step)
    parameters = count_parameters(model)
    is_shared = fabric.device.type == "cpu"  # then preparing photos takes cores from training
    counts = [sum(photo.split == split for photo in index.photos) for split in ("train", "val")]
    epoch = _epoch_seconds(counts[0], counts[1], trained, prepared * usable_cores(), is_shared=is_shared)
    probe = counts[0] / (3 * trained) if config.probe.epochs else 0.0
    return Preflight(
        prepared_per_second=prepared,
        trained_per_second=trained,
        epoch_seconds=epoch,
        run_hours=(config.train.epochs * epoch + probe) / 3600,
        memory_gigabytes=(parameters * BYTES_PER_PARAMETER + activations) / 2**30,
        parameters_millions=parameters / 1e6,
    )


def _epoch_seconds(num_train: int, num_val: int, trained: float, prepared: float, *, is_shared: bool) -> float:
    """One epoch with validation, whose forward pass is a third of a training step."""
    compute = num_train / trained + num_val / (3 * trained)
    preparation = (num_train + num_val) / prepared
    return compute + preparation if is_shared else max(compute, preparation)


def _model(config: Config, *, num_classes: int) -> Classifier:
    model = create_classifier(**build.create_arguments(config, num_classes=num_classes))
    if config.train.channels_last != "off":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()


def _rate(work: Callable[[], int]) -> float:
    """Units per second of `work`, which says how many it did; the first call warms up (a kernel may be compiled)."""
    work()
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < SECONDS_MEASURED:
        done += work()
    return done / (time.perf_counter() - started)


def _saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(kept.values())
