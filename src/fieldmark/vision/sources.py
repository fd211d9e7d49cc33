"""Where weights come from (hub, installed package, folder, file): tensors, and what is known about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fieldmark.errors import WeightsError
from fieldmark.vision.hub import fetch, pretrained_file
from fieldmark.vision.names import HUB_PREFIXES
from fieldmark.vision.packages import find_package, package_file
from fieldmark.vision.tensors import read_tensors, sha256_of

_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")


@dataclass(frozen=True)
class Source:
    """Tensors by name, and what is known about them."""

    label: str
    tensors: Mapping[str, Tensor]
    licence: str = "unknown"
    pretraining: str = "unknown"
    sha256: str = ""


def timm_config(name: str) -> Any:
    """Timm's PretrainedCfg of a model, with the default tag where the name has none; None where timm has none."""
    import timm

    for prefix in HUB_PREFIXES:
        if name.startswith(prefix):
            return as_config(_read_json(fetch(name.removeprefix(prefix), ["config.json"])))
    return timm.get_pretrained_cfg(name)


def as_config(settings: Mapping[str, Any]) -> Any:
    """Timm's PretrainedCfg from a config.json in its form."""
    from timm.models import PretrainedCfg

    inner: dict[str, Any] = {"architecture": settings.get("architecture"), **settings.get("pretrained_cfg", settings)}
    return PretrainedCfg(**{key: value for key, value in inner.items() if key in PretrainedCfg.__dataclass_fields__})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"model.weights: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"model.weights: {path} is not timm's config.json: it must be a JSON object")
    return cast("dict[str, Any]", content)


def read_folder_config(path: Path, name: str) -> dict[str, Any]:
    """Timm's config.json of a folder, or beside a file where it describes the same architecture; {} for none."""
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.is_file():
        if path.is_dir():
            raise WeightsError(f"model.weights: the folder {path} has no config.json; give the weight file in it")
        return {}
    if not path.is_dir():
        try:
            settings = _read_json(config_file)
        except WeightsError:  # some other program's config.json
            return {}
        return settings if settings.get("architecture") == name.partition(".")[0] else {}
    settings = _read_json(config_file)
    if settings.get("architecture") != name.partition(".")[0]:
        raise WeightsError(
            f"model.weights: {config_file} describes {settings.get('architecture')!r}; got model.name {name!r}. "
            "Set model.name to what the folder holds"
        )
    return settings


def from_hub(name: str) -> Source:
    """The weights that timm calls pretrained. Raises WeightsError where they cannot be had."""
    import timm

    config = timm_config(name)
    path = pretrained_file(config, name)
    overlay = {"file": str(path), "source": "", "hf_hub_filename": None} if path else None
    try:
        # A second model, so that timm's own conversions of the file for this architecture apply.
        loaded = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"model.weights: the pretrained weights of {name} cannot be loaded: {error}") from None
    return Source(
        "pretrained",
        loaded.state_dict(),
        licence=config.license or "unknown",
        pretraining=config.tag or "unknown",
        sha256=sha256_of(path) if path else "",
    )


def from_package(name: str, source: str) -> Source:
    """The weights in an installed package. Raises WeightsError or MissingExtraError where there are none."""
    import timm

    package = find_package(source, name)
    path = package_file(package)
    tensors, _ = read_tensors(path)
    with torch.device("meta"):
        layout = timm.create_model(package.timm_name, num_classes=1000 if package.has_classifier else 0)
    return Source(
        source,
        match_by_position(tensors, layout.state_dict(), path.name),
        licence=package.licence,
        pretraining=package.pretraining,
        sha256=sha256_of(path),
    )


def match_by_position(tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """Give tensors the names of a layout whose order and shapes they share.

    Raises:
        WeightsError: Another number of tensors, or another shape at some place.
    """
    if len(tensors) != len(layout):
        raise WeightsError(f"model.weights: {file_name} holds {len(tensors)} tensors, the model {len(layout)}")
    for (theirs, tensor), (ours, expected) in zip(tensors.items(), layout.items(), strict=True):
        if tensor.shape != expected.shape:
            raise WeightsError(
                f"model.weights: {file_name} does not have the model's order: {theirs} is {tuple(tensor.shape)} "
                f"where {ours} is {tuple(expected.shape)}"
            )
    return dict(zip(layout, tensors.values(), strict=True))


def from_folder(name: str, folder: Path) -> Source:
    """A folder in timm's local-dir form: config.json and a weight file. Raises WeightsError where it is not."""
    config = as_config(read_folder_config(folder, name))
    path = next((folder / file for file in _FOLDER_FILES if (folder / file).is_file()), None)
    if path is None:
        raise WeightsError(f"model.weights: the folder {folder} has none of {', '.join(_FOLDER_FILES)}")
    tensors, _ = read_tensors(path)
    licence, tag = config.license or "unknown", config.tag or "unknown"
    return Source(folder.name, tensors, licence=licence, pretraining=tag, sha256=sha256_of(path))


def from_file(path: Path) -> Source:
    """A .safetensors or torch file; safetensors metadata may say `license` and `pretraining`."""
    tensors, metadata = read_tensors(path)
    return Source(
        path.name,
        tensors,
        licence=metadata.get("license", "unknown"),
        pretraining=metadata.get("pretraining", "unknown"),
        sha256=sha256_of(path),
    )
