"""Settings become parts: the only module that knows both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

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
from fieldmark.errors import ConfigError
from fieldmark.models.classifier import Classifier, check_parameter_budget, count_parameters, create_classifier
from fieldmark.models.names import resolve_name
from fieldmark.models.provenance import InputConfig
from fieldmark.models.weights import WeightsReport, data_config, load_weights
from fieldmark.runs.dataset import PhotoReader, TrainPhotos
from fieldmark.runs.environment import keep_freed_memory, quiet_fabric, usable_cores
from fieldmark.training.optim import create_optimizer, parameter_groups
from fieldmark.training.schedule import Schedule, ScheduleSpec

if TYPE_CHECKING:
    from fieldmark.data.cache import PhotoCache


@dataclass(frozen=True)
class Choice:
    """A setting that was `auto`, what it became, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Phase:
    """What holds during one epoch.

    Attributes:
        size: Side of the training images, in pixels.
        freeze: Frozen stages from the input, or `all`.
        is_fixres: Head and norms alone learn, on the evaluation picture.
        is_mixing: Whether batches may be mixed.
    """

    size: int
    freeze: int | Literal["all"]
    is_fixres: bool
    is_mixing: bool


def choose_device(config: Config) -> Choice:
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


def choose_precision(config: Config, device: str) -> Choice:
    """Number format of the computation."""
    if config.train.precision != "auto":
        return Choice(config.train.precision, "as asked")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", "the GPU computes in bf16")
        return Choice("16-mixed", "the GPU computes in fp16 but not in bf16")
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Choice("bf16-mixed", "the processor computes in bf16")
    return Choice("32-true", f"this {device} has no fast bf16")


def choose_threads(config: Config, *, workers: int) -> Choice:
    """Compute threads of a CPU run: more threads than cores, workers included, would collapse."""
    if config.train.threads:
        return Choice(config.train.threads, "as asked")
    cores = usable_cores() // config.train.devices
    return Choice(max(cores - workers, 1), f"{cores} cores, {workers} of them for the loader")


def build_fabric(config: Config) -> tuple[Fabric, dict[str, Choice]]:
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
        precision=precision.value,
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


def phase_at(config: Config, epoch: int, *, size: int, eval_size: int, num_stages: int) -> Phase:
    """What holds during an epoch.

    Args:
        config: The settings.
        epoch: 0-based.
        size: Training size where `train.resolution_steps` says nothing.
        eval_size: Evaluation size, for FixRes.
        num_stages: Stages of the backbone.
    """
    train = config.train
    is_fixres = train.epochs - train.fixres_epochs <= epoch < train.epochs
    for start, side in train.resolution_steps:
        size = side if epoch >= start * train.epochs else size
    freeze = config.model.freeze
    if config.model.unfreeze_every_epochs:
        frozen = num_stages if freeze == "all" else int(freeze)
        freeze = max(frozen - epoch // config.model.unfreeze_every_epochs, 0)
        freeze = "all" if freeze == num_stages else freeze
    return Phase(
        size=eval_size if is_fixres else size,
        freeze=freeze,
        is_fixres=is_fixres,
        is_mixing=epoch < train.epochs - config.mix.off_epochs,
    )


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
    return Schedule(optimizer, build_schedule_spec(config), steps_per_epoch=steps_per_epoch)


def build_class_weights(config: Config, prior: NDArray[np.float64]) -> Tensor | None:
    """(K,) float32 weights of the loss, whose mean over the training photos is 1, or None."""
    if config.train.class_weights == "none":
        return None
    present = prior > 0
    weights = np.where(present, 1.0 / (np.maximum(prior, 1e-12) * present.sum()), 0.0)
    return torch.from_numpy(weights.astype(np.float32))


def describe_model(built: BuiltModel, evaluation: EvalSpec, *, precision: str, channels_last: bool) -> dict[str, Any]:
    """model.json: all that is needed to predict, and what a reader wants to know of the weights."""
    return {
        "create": built.create,
        "eval": asdict(evaluation),
        "train_size": built.data.train_size,
        "precision": precision,
        "channels_last": channels_last,
        "parameters": count_parameters(built.model),
        "weights": asdict(built.weights),
    }


def global_batches(order: Sequence[int], batch_size: int, *, processes: int) -> list[Sequence[int]]:
    """Cut an epoch's order into updates; no photo is dropped.

    A last batch that would leave a process with fewer than two photos joins the one before: BatchNorm has no variance
    of one value, which is what a single photo comes to at the end of a network on small images.
    """
    cuts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(cuts) > 1 and len(cuts[-1]) < 2 * processes:
        cuts[-2:] = [order[(len(cuts) - 2) * batch_size :]]
    return cuts
