"""Settings become parts: the only module that knows both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.augment.mixing import MixSpec
from fieldmark.augment.reference import EvalSpec
from fieldmark.augment.sample import AugmentSpec
from fieldmark.config import Config
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import PhotoIndex
from fieldmark.data.loader import Loader, auto_workers
from fieldmark.errors import ConfigError, FieldmarkError
from fieldmark.models.catalog import InputConfig, resolve_name
from fieldmark.models.classifier import Classifier, check_parameter_budget, count_parameters, create_classifier
from fieldmark.models.weights import WeightsReport, data_config, load_weights
from fieldmark.progress import Progress
from fieldmark.runs.dataset import Dataset, PhotoReader, TrainPhotos, user_folder
from fieldmark.runs.environment import keep_freed_memory, processor_name, quiet_fabric, usable_cores
from fieldmark.runs.plan import PhaseRules, TrainPlan
from fieldmark.training.loop import UpdateOptions
from fieldmark.training.optim import Schedule, ScheduleSpec, create_optimizer, parameter_groups
from fieldmark.training.trial import Computation, choose_computation

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache


Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Choice(Generic[Value]):
    """A setting that was `auto`, what it became, and why."""

    value: Value
    reason: str


@dataclass(frozen=True)
class ProbeSpec:
    """How the head is fitted before fine-tuning; see `training.loop.train_head`."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int


@dataclass(frozen=True)
class RunRules:
    """When a run saves and stops; the names are those of the settings."""

    metric: str
    select: str
    patience_epochs: int
    save_minutes: float
    trackers: tuple[str, ...]


def choose_device(config: Config) -> Choice[str]:
    """Where to compute: `cuda`, `mps` or `cpu`.

    Raises:
        ConfigError: The device asked for is not there.
    """
    asked = config.train.device
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked != "auto":
        if not there[asked]:
            raise ConfigError(f"train.device = {asked!r}, but this machine has none; set train.device=auto or cpu")
        return Choice(asked, "as asked")
    for name, reason in (("cuda", "a CUDA GPU is there"), ("mps", "an Apple GPU is there")):
        if there[name]:
            return Choice(name, reason)
    return Choice("cpu", "there is no GPU")


def choose_precision(config: Config, device: str) -> Choice[str]:
    """Number format of the computation."""
    if config.train.precision == "16-mixed" and device == "cpu":
        return Choice("bf16-mixed", "16-mixed was asked for, which needs a GPU: processors compute in bf16")
    if config.train.precision != "auto":
        return Choice(config.train.precision, "as asked")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", "the GPU computes in bf16")
        return Choice("16-mixed", "the GPU computes in fp16 but not in bf16")
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Choice("bf16-mixed", "the processor computes in bf16")
    return Choice("32-true", f"this {device} has no fast bf16")


def choose_threads(config: Config, *, workers: int) -> Choice[int]:
    """Compute threads of a CPU run: more threads than cores, workers included, would collapse."""
    if config.train.threads:
        return Choice(config.train.threads, "as asked")
    cores = usable_cores() // config.train.devices
    return Choice(max(cores - workers, 1), f"{cores} cores, {workers} of them for the loader")


def choose_workers(config: Config, *, is_cached: bool, device: torch.device) -> tuple[int, str]:
    """Choose how many processes prepare batches, and say why in a line."""
    if config.loader.workers != "auto":
        return config.loader.workers, f"loader: {config.loader.workers} workers, as asked"
    cores = usable_cores() // config.train.devices
    workers, reason = auto_workers(cores=cores, is_cached=is_cached, has_gpu=device.type != "cpu")
    return workers, f"loader: {workers} workers ({reason})"


def build_loader(workers: int) -> Loader:
    """Prepare batches in that many processes, or here with all cores."""
    return Loader(workers=workers, threads=1 if workers else usable_cores())


def fill_cache(config: Config, dataset: Dataset, *, progress: Progress) -> tuple[PhotoCache | None, str]:
    """Open the cache of reduced photos, write what it lacks, and say in a line what was done."""
    settings = config.cache
    if settings.mode == "off":
        return None, "cache: off (asked for)"
    if config.augment.executor == "reference":
        return None, "cache: off (the reference executor works on whole photos)"

    from fieldmark.data.cache import open_cache

    cache, report = open_cache(
        dataset.index.files(),
        sizes=dataset.sizes,
        mode=settings.mode,
        short_side=settings.short_side,
        folder=Path(settings.folder) if settings.folder else user_folder("photos"),
        disk_gigabytes=settings.disk_gigabytes,
        decoding=DecodeSpec(config.data.background, config.data.max_pixels),
        threads=usable_cores(),
        progress=progress,
    )
    return cache, str(report)


def is_channels_last(config: Config) -> bool:
    """Whether images and convolutions are laid out channels last."""
    return config.train.channels_last != "off"


def augments_on_device(config: Config, device: torch.device) -> bool:
    """Whether workers hand over uint8 photos, and the random parameters are executed where the model is."""
    executor = config.augment.executor
    return executor == "device" or (executor == "fast" and device.type == "cuda")


def first_micro_batch(config: Config, *, processes: int) -> int:
    """Photos per forward pass in each process, before memory runs out."""
    per_process = -(-config.train.batch_size // processes)
    return min(config.train.micro_batch_size or per_process, per_process)


def compile_model(config: Config, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Compile the model where that pays: on the CPU it takes a minute and gains nothing, nor does it in short runs."""
    is_worth_it = device.type == "cuda" and config.train.epochs >= 10
    wanted = config.train.compile == "on" or (config.train.compile == "auto" and is_worth_it)
    return torch.compile(model) if wanted else model  # type: ignore[return-value]


def guard_computation(config: Config) -> tuple[Config, str]:
    """Replace a layout or precision that would kill this process; also a warning for the user, or "".

    What is chosen is written into the settings, so that a resumed run computes as the run began.

    Raises:
        TrainingError: The model crashes in every layout and precision.
    """
    if choose_device(config).value != "cpu":
        return config, ""
    try:
        model = create_arguments(config, num_classes=2)
    except FieldmarkError:  # raised again, in its turn, by those who need the model
        return config, ""
    wanted = Computation(is_channels_last(config), choose_precision(config, "cpu").value)
    chosen, reason = choose_computation(model, wanted, processor=processor_name(), memory=user_folder("trials"))
    if not reason:
        return config, ""
    changes = {"channels_last": "on" if chosen.channels_last else "off", "precision": chosen.precision}
    settings = config.train.model_copy(update=changes)
    return config.model_copy(update={"train": settings}), f"warning: {reason}"


def build_fabric(config: Config) -> tuple[Fabric, dict[str, Choice[str]]]:
    """Device, precision and processes, and what was chosen for `auto`."""
    device = choose_device(config)
    if device.value == "cpu":
        keep_freed_memory()
    precision = choose_precision(config, device.value)
    is_distributed = config.train.devices * config.train.nodes > 1
    quiet_fabric()
    fabric = Fabric(
        accelerator=device.value,
        devices=config.train.devices,
        num_nodes=config.train.nodes,
        strategy="ddp" if is_distributed else "auto",
        precision=precision.value,  # type: ignore[arg-type]
    )
    return fabric, {"device": device, "precision": precision}


@dataclass(frozen=True)
class BuiltModel:
    """A model and what is known of its weights.

    Attributes:
        model: On the CPU.
        create: Arguments of `create_classifier` that make it again.
        weights: What was loaded.
        data: The weights' own data configuration.
    """

    model: Classifier
    create: dict[str, Any]
    weights: WeightsReport
    data: InputConfig


def create_arguments(config: Config, *, num_classes: int) -> dict[str, Any]:
    """Arguments of `create_classifier`.

    Raises:
        ConfigError: No such model.
    """
    settings = config.model
    return {
        "name": resolve_name(settings.name, settings.weights),
        "num_classes": num_classes,
        "head": settings.head,
        "head_hidden": settings.head_hidden,
        "head_dropout": settings.head_dropout,
        "feature_dropout": settings.feature_dropout,
        "drop_path": settings.drop_path,
        "stride_in_1x1": settings.stride_in_1x1,
    }


def build_model(config: Config, *, num_classes: int) -> BuiltModel:
    """Backbone, head and weights.

    Raises:
        WeightsError: Unknown model, or weights that cannot be had.
        ConfigError: Over the parameter budget.
    """
    settings = config.model
    create = create_arguments(config, num_classes=num_classes)
    model = create_classifier(**create)
    if settings.max_parameters_millions is not None:
        counts = [(create["name"], count_parameters(model))]
        check_parameter_budget(counts, max_millions=settings.max_parameters_millions)
    weights = load_weights(model, settings.weights)
    return BuiltModel(model, create, weights, data_config(create["name"], settings.weights))


def train_size(config: Config, data: InputConfig) -> int:
    """Side of the training images in pixels, before progressive resolution."""
    return config.augment.size or data.train_size


def build_eval_spec(config: Config, data: InputConfig) -> EvalSpec:
    """The evaluation transform: the weights' own, or the report's squash, with what the settings override."""
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


def build_augment_spec(config: Config, *, size: int, evaluation: EvalSpec, is_fixres: bool) -> AugmentSpec:
    """What is drawn for a training photo. FixRes epochs see the evaluation picture and its mirror image."""
    settings = config.augment.model_dump(exclude={"executor", "size"})
    settings |= {
        "crop": "weights" if config.augment.crop == "pretrained" else config.augment.crop,
        "crop_fraction": evaluation.crop_fraction,
        "crop_interpolation": evaluation.interpolation,
        "size": size,
    }
    if is_fixres:
        crop = "weights" if evaluation.transform == "weights" else "squash"
        off = dict.fromkeys(
            ("vertical_flip", "degrees", "shear", "brightness", "contrast", "saturation", "hue", "erase"), 0.0
        )
        settings |= {"crop": crop, "size": evaluation.size, "translate": (0.0, 0.0), "policy": "none", **off}
    return AugmentSpec(**settings)


def build_reader(config: Config, index: PhotoIndex) -> PhotoReader:
    """The pixels of an index's photos by number."""
    decoding = DecodeSpec(config.data.background, config.data.max_pixels)
    return PhotoReader(tuple(index.files()), index.label_numbers(), decoding)


def build_train_photos(
    config: Config,
    index: PhotoIndex,
    sizes: NDArray[np.int64],
    *,
    size: int,
    evaluation: EvalSpec,
    is_fixres: bool,
    cache: PhotoCache | None,
) -> TrainPhotos:
    """What prepares training batches.

    Args:
        config: The settings.
        index: N photos.
        sizes: (N, 2) upright width and height in pixels.
        size: Side of the training images in pixels.
        evaluation: The evaluation transform.
        is_fixres: Whether the epoch sees the evaluation picture.
        cache: Reduced photos, or None.
    """
    return TrainPhotos(
        reader=build_reader(config, index),
        cache=cache,
        sizes=sizes,
        spec=build_augment_spec(config, size=size, evaluation=evaluation, is_fixres=is_fixres),
        mean=evaluation.mean,
        std=evaluation.std,
        seed=config.train.seed,
        is_fast=config.augment.executor == "fast",
    )


def build_mix_spec(config: Config) -> MixSpec:
    """How often and how strongly batches are mixed."""
    return MixSpec(**config.mix.model_dump(exclude={"off_epochs"}))


def build_probe(config: Config) -> ProbeSpec | None:
    """Give how the head is fitted before fine-tuning; None where it is not."""
    return ProbeSpec(**config.probe.model_dump()) if config.probe.epochs else None


def build_rules(config: Config) -> RunRules:
    """Give when a run saves and stops."""
    train = config.train
    return RunRules(train.metric, train.select, train.patience_epochs, train.save_minutes, train.trackers)


def build_plan(
    config: Config, index: PhotoIndex, built: BuiltModel, evaluation: EvalSpec, *, processes: int
) -> TrainPlan:
    """Give the order of the photos, and what holds in which epoch."""
    train = config.train
    rules = PhaseRules(
        epochs=train.epochs,
        size=train_size(config, built.data),
        eval_size=evaluation.size,
        num_stages=built.model.count_stages(),
        resolution_steps=train.resolution_steps,
        fixres_epochs=train.fixres_epochs,
        mix_off_epochs=config.mix.off_epochs,
        freeze=config.model.freeze,
        unfreeze_every_epochs=config.model.unfreeze_every_epochs,
    )
    return TrainPlan(
        rules=rules,
        train_numbers=_list_numbers(index, "train"),
        val_numbers=_list_numbers(index, "val"),
        seed=train.seed,
        batch_size=train.batch_size,
        eval_batch_size=config.eval.batch_size,
        processes=processes,
    )


def _list_numbers(index: PhotoIndex, split: str) -> NDArray[np.int64]:
    numbers = [number for number, photo in enumerate(index.photos) if photo.split == split and photo.label is not None]
    return np.asarray(numbers, np.int64)


def build_optimizer(config: Config, model: Classifier, *, precision: Precision) -> torch.optim.Optimizer:
    """The optimiser over all parameters that may ever learn.

    The fused kernel unscales fp16's gradients within its step, so there is no moment at which Fabric could clip them:
    `MixedPrecision.unscale_gradients` refuses where there is a scaler, and nowhere else.
    """
    settings = config.optim
    is_thawing = bool(config.model.unfreeze_every_epochs)
    groups = parameter_groups(
        model.stage_parameters(),
        lr=settings.lr,
        backbone_lr_scale=settings.backbone_lr_scale,
        layer_decay=settings.layer_decay,
        weight_decay=settings.weight_decay,
        decay_norms_and_biases=settings.decay_norms_and_biases,
        no_weight_decay=model.no_weight_decay(),
        include_frozen=is_thawing,
    )
    is_scaled = getattr(precision, "scaler", None) is not None
    return create_optimizer(settings.name, groups, use_fused=not (settings.clip_norm and is_scaled))


def build_schedule_spec(config: Config) -> ScheduleSpec:
    """The shape of the schedule."""
    return ScheduleSpec(total_epochs=config.train.epochs, **config.schedule.model_dump())


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int) -> Schedule:
    """Learning rates as a function of the update's number."""
    spec = build_schedule_spec(config)
    return Schedule(optimizer, lambda step: spec.factor(step, steps_per_epoch=steps_per_epoch))


def warn_of_schedule(config: Config) -> list[str]:
    """List what is likely to disappoint about the schedule, where there is one."""
    return build_schedule_spec(config).warnings()


def build_update_options(config: Config, prior: NDArray[np.float64], device: torch.device) -> UpdateOptions:
    """Give how each update is done; class weights come from the classes' (K,) shares of the training photos."""
    weights = build_class_weights(config, prior)
    return UpdateOptions(
        class_weights=None if weights is None else weights.to(device),
        clip_norm=config.optim.clip_norm,
        fit_memory=config.train.fit_memory,
    )


def build_class_weights(config: Config, prior: NDArray[np.float64]) -> Tensor | None:
    """(K,) float32 weights of the loss, whose mean over the training photos is 1, or None."""
    if config.train.class_weights == "none":
        return None
    present = prior > 0
    weights = np.where(present, 1.0 / (np.maximum(prior, 1e-12) * present.sum()), 0.0)
    return torch.from_numpy(weights.astype(np.float32))


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
