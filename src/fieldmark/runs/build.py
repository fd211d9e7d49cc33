"""Settings become the parts of a training, which know no settings themselves."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray

from fieldmark.augment.mixing import MixSpec
from fieldmark.augment.reference import EvalSpec
from fieldmark.augment.sample import AugmentSpec
from fieldmark.config import Config
from fieldmark.data.cache import PhotoCache, Read, open_cache
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import auto_workers, cut_plan
from fieldmark.data.shards import PhotoFile
from fieldmark.errors import ConfigError, FieldmarkError, first_line
from fieldmark.files import user_folder
from fieldmark.models.catalog import InputConfig, resolve_name
from fieldmark.models.classifier import (
    Classifier,
    check_parameter_budget,
    count_parameters,
    create_classifier,
    require_size,
)
from fieldmark.models.weights import WeightsReport, data_config, load_weights
from fieldmark.progress import Progress
from fieldmark.runs.dataset import Cached, EvalPhotos, PhotoReader, TrainPhotos, TrainPlan, decode_spec
from fieldmark.runs.environment import can_compile, processor_name, quiet_fabric, usable_cores
from fieldmark.training.evaluate import has_fast_bf16, keep_freed_memory
from fieldmark.training.loop import UpdateOptions
from fieldmark.training.optim import ScheduleSpec, create_optimizer, parameter_groups
from fieldmark.training.replay import Replay
from fieldmark.training.trial import Computation, choose_computation

Value = TypeVar("Value", str, int)
POOL_PHOTOS = 64  # of which the feature maps choose the directions of covariance pooling


@dataclass(frozen=True)
class Choice(Generic[Value]):
    """A setting that was `auto`, what it became, and why."""

    value: Value
    reason: str


def choose_device(config: Config) -> Choice[str]:
    """Choose where to compute: `cuda`, `mps` or `cpu`."""
    asked = config.train.device
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        name = next(name for name, is_there in there.items() if is_there)
        reasons = {"cuda": "a CUDA GPU is there", "mps": "an Apple GPU is there", "cpu": "there is no GPU"}
        return Choice(name, reasons[name])
    if not there[asked]:
        raise ConfigError(f"train.device = {asked!r}, but this machine has none; set train.device=auto or cpu")
    return Choice(asked, "as asked")


def choose_precision(config: Config, device: str) -> Choice[str]:
    """Choose the number format of the computation."""
    asked = config.train.precision
    if asked == "16-mixed" and device == "cpu":
        return Choice("bf16-mixed", "16-mixed was asked for, which needs a GPU: processors compute in bf16")
    if asked != "auto":
        return Choice(asked, "as asked")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", "the GPU computes in bf16")
        return Choice("16-mixed", "the GPU computes in fp16 but not in bf16")
    if device == "cpu" and has_fast_bf16():
        return Choice("bf16-mixed", "the processor computes in bf16")
    return Choice("32-true", f"this {device} has no fast bf16")


def choose_threads(config: Config, *, workers: int) -> Choice[int]:
    """Choose the compute threads of a CPU run: more threads than cores, workers included, would collapse."""
    if config.train.threads:
        return Choice(config.train.threads, "as asked")
    cores = usable_cores()
    return Choice(max(cores - workers, 1), f"{cores} cores, {workers} of them for the loader")


def choose_workers(config: Config, *, is_cached: bool, device: torch.device) -> Choice[int]:
    """Choose how many processes prepare batches."""
    if config.loader.workers != "auto":
        return Choice(config.loader.workers, "as asked")
    cores = usable_cores()
    return Choice(*auto_workers(cores=cores, is_cached=is_cached, has_gpu=device.type != "cpu"))


def fill_cache(
    config: Config, files: Sequence[PhotoFile], sizes: NDArray[np.int64], *, read: Read, progress: Progress
) -> Cached:
    """Open the cache of reduced photos of (N, 2) sizes, write what it lacks, and say in a line what was done."""
    settings = config.cache
    if config.augment.executor == "reference":
        return None, "cache: off (the reference executor works on whole photos)"
    folder = Path(settings.folder) if settings.folder else user_folder("photos")
    own: dict[str, Any] = {**settings.model_dump(exclude={"folder"}), "threads": usable_cores()}
    own |= {"decoding": decode_spec(config.data), "folder": folder}
    cache, report = open_cache(files, sizes=sizes, read=read, progress=progress, **own)
    return cache, str(report)


def is_channels_last(config: Config) -> bool:
    """Whether images and convolutions are laid out channels last."""
    return config.train.channels_last != "off"


def first_micro_batch(config: Config, *, processes: int) -> int:
    """Photos per forward pass in each process, before memory runs out."""
    per_process = -(-config.train.batch_size // processes)
    return min(config.train.micro_batch_size or per_process, per_process)


def compile_model(config: Config, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Compile the model where that is asked for: it takes half a minute, and gained nothing on an H200."""
    if config.train.compile != "on":
        return model
    if not can_compile(device.type):
        raise ConfigError("train.compile=on needs a C++ compiler, and for CUDA Triton: set train.compile=auto")
    return torch.compile(model)  # type: ignore[return-value]


def make_replay(config: Config, fabric: Fabric, model: torch.nn.Module) -> Replay | None:
    """Make the replay of an update's passes: on a single GPU, with train.compile=auto."""
    is_wanted = fabric.device.type == "cuda" and fabric.world_size == 1 and config.train.compile == "auto"
    return Replay(fabric, model) if is_wanted else None


def guard_computation(config: Config) -> tuple[Config, str]:
    """Replace a layout or precision that would kill this process; also a warning for the user, or "".

    What is chosen is written into the settings, so that a resumed run computes as the run began.
    """
    if choose_device(config).value != "cpu":
        return config, ""
    try:
        model = create_arguments(config, num_classes=2)
    except FieldmarkError:  # raised again, in its turn, by those who need the model
        return config, ""
    wanted = Computation(is_channels_last(config), choose_precision(config, "cpu").value)
    folder = user_folder("trials")
    chosen, reason = choose_computation(model, wanted, processor=processor_name(), memory=folder)
    if not reason:
        return config, ""
    changes = {"channels_last": "on" if chosen.channels_last else "off", "precision": chosen.precision}
    settings = config.train.model_copy(update=changes)
    return config.model_copy(update={"train": settings}), f"warning: {reason}"


def build_fabric(config: Config) -> tuple[Fabric, dict[str, Choice[str] | Choice[int]]]:
    """Device, precision and processes, and what was chosen for `auto`."""
    device = choose_device(config)
    if device.value == "cpu":
        keep_freed_memory()
    precision = choose_precision(config, device.value)
    options: dict[str, Any] = {"devices": config.train.devices, "num_nodes": config.train.nodes}
    launched = os.environ.get("LOCAL_WORLD_SIZE")
    if launched:
        options = {"devices": int(launched), "plugins": [_Launched()]}
    is_distributed = bool(launched) or config.train.devices * config.train.nodes > 1
    quiet_fabric()
    fabric = _make_fabric(
        accelerator=device.value,
        # The others wait while the first looks at all photos.
        strategy=DDPStrategy(timeout=timedelta(hours=6)) if is_distributed else "auto",
        precision=precision.value,  # type: ignore[arg-type]
        **options,
    )
    return fabric, {"device": device, "precision": precision}


def _make_fabric(**options: Any) -> Fabric:
    try:
        return Fabric(**options)
    except (MisconfigurationException, RuntimeError) as error:  # as where there are fewer GPUs
        raise ConfigError(f"train.devices = {options['devices']}: {first_line(error)}") from None


class _Launched(TorchElasticEnvironment):
    """Processes that torchrun or Ray has started: how many there are is theirs to say, not the settings'."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


@dataclass(frozen=True)
class BuiltModel:
    """A model and what is known of its weights."""

    model: Classifier  # on the CPU
    create: dict[str, Any]  # arguments of `create_classifier` that make it again
    weights: WeightsReport
    data: InputConfig  # the weights' own data configuration


def create_arguments(config: Config, *, num_classes: int) -> dict[str, Any]:
    """Give the arguments of `create_classifier`."""
    settings = config.model
    names = ("head", "head_hidden", "head_dropout", "feature_dropout", "drop_path", "stride_in_1x1", "pool")
    name = resolve_name(settings.name, settings.weights)
    return {"name": name, "num_classes": num_classes, **{key: getattr(settings, key) for key in names}}


def build_model(config: Config, *, num_classes: int) -> BuiltModel:
    """Backbone, head and weights."""
    settings = config.model
    create = create_arguments(config, num_classes=num_classes)
    model = create_classifier(**create)
    if settings.max_parameters_millions is not None:
        counts = [(create["name"], count_parameters(model))]
        check_parameter_budget(counts, max_millions=settings.max_parameters_millions)
    data = build_input_config(config)
    require_sizes(config, data)
    return BuiltModel(model, create, load_weights(model, settings.weights), data)


def fit_pool(model: Classifier, pictures: EvalPhotos, numbers: NDArray[np.int64]) -> None:
    """Let covariance pooling, if the model has it, choose its directions by a few of these photos."""
    if model.pool is not None:
        numbers = np.sort(numbers)[np.linspace(0, len(numbers) - 1, min(POOL_PHOTOS, len(numbers))).astype(np.int64)]
        device, is_training = model.pool.projection.device, model.training
        batches = [pictures(few, 0).images.to(device) for few in cut_plan(numbers.tolist(), POOL_PHOTOS // 8)]
        with torch.inference_mode():
            model.pool.fit(torch.cat([model.eval().feature_map(images).float() for images in batches]))
        model.train(is_training)


def build_input_config(config: Config) -> InputConfig:
    """Give the picture that the weights expect."""
    return data_config(resolve_name(config.model.name, config.model.weights), config.model.weights)


def require_sizes(config: Config, data: InputConfig) -> None:
    """Raise ConfigError where the model does not take all images that the settings show it."""
    steps = [side for _, side in config.train.resolution_steps] or [train_size(config, data)]
    sizes = {build_eval_spec(config, data).size, *(steps if config.train.epochs else ())}
    for size in sorted(sizes - {data.train_size}) if data.is_size_fixed else ():
        require_size(resolve_name(config.model.name, config.model.weights), size)


def train_size(config: Config, data: InputConfig) -> int:
    """Side of the training images in pixels, before progressive resolution."""
    return config.augment.size or data.train_size


def build_eval_spec(config: Config, data: InputConfig) -> EvalSpec:
    """The evaluation transform: the weights' own, or the competition's squash, with what the settings override."""
    settings = config.eval
    is_squash = settings.transform == "squash"
    default_size = train_size(config, data) if is_squash else data.test_size
    return EvalSpec(
        transform="squash" if is_squash else "weights",
        size=settings.size or default_size,
        crop_fraction=1.0 if is_squash else settings.crop_fraction or data.crop_fraction,
        interpolation=settings.interpolation
        or ("bilinear" if is_squash or data.interpolation == "bilinear" else "bicubic"),
        mean=data.mean,
        std=data.std,
    )


def build_augment_spec(config: Config, data: InputConfig, *, size: int | None = None) -> AugmentSpec:
    """Return what is drawn for a training photo, of `size` pixels if that is not what the settings begin with."""
    evaluation = build_eval_spec(config, data)
    settings = config.augment.model_dump(exclude={"executor", "size"})
    settings |= {
        "crop": "weights" if config.augment.crop == "pretrained" else config.augment.crop,
        "crop_fraction": evaluation.crop_fraction,
        "crop_interpolation": evaluation.interpolation,
        "size": size or train_size(config, data),
        "mean": evaluation.mean,
        "std": evaluation.std,
    }
    return AugmentSpec(**settings)


def build_reader(config: Config, index: PhotoIndex) -> PhotoReader:
    """The pixels of an index's photos by number."""
    return PhotoReader(index.files(), index.label_numbers(), decode_spec(config.data))


def build_train_photos(
    config: Config,
    data: InputConfig,
    reader: PhotoReader,
    sizes: NDArray[np.int64],
    *,
    size: int | None = None,
    cache: PhotoCache | None = None,
) -> TrainPhotos:
    """What prepares training batches from a reader's photos of (N, 2) sizes; `size` pixels differ with the epoch."""
    return TrainPhotos(
        reader=reader,
        cache=cache,
        sizes=sizes,
        spec=build_augment_spec(config, data, size=size),
        seed=config.train.seed,
        is_fast=config.augment.executor == "fast",
    )


def build_mix_spec(config: Config) -> MixSpec:
    """Return how often and how strongly batches are mixed."""
    return MixSpec(**config.mix.model_dump(exclude={"off_epochs"}))


def build_phase(config: Config, epoch: int, data: InputConfig) -> tuple[int, bool]:
    """Give the side of an epoch's (0-based) training images in pixels, and whether its batches may be mixed."""
    epochs, size = config.train.epochs, train_size(config, data)
    for start, side in config.train.resolution_steps:
        size = side if epoch >= start * epochs else size
    return size, epoch < epochs - config.mix.off_epochs


def build_plan(config: Config, index: PhotoIndex, *, processes: int) -> TrainPlan:
    """Give the order of the photos that learn and of those that validate."""
    processes = max(processes, config.train.devices * config.train.nodes)  # where some are lost, batches stay
    batch_sizes = config.train.batch_size, config.eval.batch_size
    if config.train.batch_size < processes:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is that of all processes together, and there are {processes}: "
            "each needs a photo of every batch"
        )
    return TrainPlan(
        config.train.epochs, index.numbers("train"), index.numbers("val"), config.train.seed, *batch_sizes, processes
    )


def build_optimizer(config: Config, model: Classifier, *, precision: Precision) -> torch.optim.Optimizer:
    """The optimizer over all parameters that may ever learn."""
    settings = config.optim
    rates = settings.model_dump(exclude={"name", "clip_norm"})
    groups = parameter_groups(model.stage_parameters(), **rates, no_weight_decay=model.no_weight_decay())
    is_scaled = getattr(precision, "scaler", None) is not None
    return create_optimizer(settings.name, groups, use_fused=not (settings.clip_norm and is_scaled))


def build_schedule_spec(config: Config) -> ScheduleSpec:
    """The shape of the schedule."""
    return ScheduleSpec(total_epochs=config.train.epochs, **config.schedule.model_dump())


def build_update_options(config: Config, prior: NDArray[np.float64], device: torch.device) -> UpdateOptions:
    """Give how each update is done; class weights come from the classes' (K,) shares of the training photos."""
    weights = None
    if config.train.class_weights != "none":  # their mean over the training photos is 1
        shares = np.where(prior > 0, 1.0 / (np.maximum(prior, 1e-12) * (prior > 0).sum()), 0.0)
        weights = torch.from_numpy(shares.astype(np.float32)).to(device)
    return UpdateOptions(weights, config.optim.clip_norm)


def describe_model(built: BuiltModel, evaluation: EvalSpec, *, precision: str, channels_last: bool) -> dict[str, Any]:
    """Give model.json: all that is needed to predict, and what a reader wants to know of the weights."""
    return {
        "create": built.create,
        "eval": asdict(evaluation),
        "train_size": built.data.train_size,
        "precision": precision,
        "channels_last": channels_last,
        "parameters": count_parameters(built.model),
        "weights": asdict(built.weights),
    }
