"""Weights for a backbone from the hub, a file, a folder or an installed package, with a report of what matched.

Nothing here unpickles code: files are read as safetensors or with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fieldmark.errors import WeightsError
from fieldmark.models.classifier import Classifier
from fieldmark.models.provenance import InputConfig, describe_pretraining, input_config, provenance_warnings
from fieldmark.models.sources import (
    Source,
    as_config,
    find_package,
    from_file,
    from_folder,
    from_hub,
    from_package,
    read_folder_config,
    timm_config,
)

MIN_MATCHED_FRACTION = 0.5
"""Of the backbone's tensors; below it, the weights are those of another model."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded, from where, and what of it fitted.

    Args:
        name: timm name of the backbone.
        source: "pretrained", "random", "package:..." or the file's name.
        matched: Tensors of the backbone that were filled. BatchNorm's counters of batches are never counted.
        total: Tensors of the backbone.
        missing: Names of the backbone's tensors that stayed random.
        unexpected: Names in the source without a counterpart.
        mismatched: Names with another shape than the backbone's, and both shapes.
        skipped: Names in the source of its own classifier, which a new head replaces.
        licence: SPDX-like name, or "unknown".
        pretraining: timm's tag or a description of the data seen, or "unknown".
        sha256: Of the file, in hex; "" where there is no single file.
    """

    name: str
    source: str
    matched: int
    total: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    licence: str = "unknown"
    pretraining: str = "unknown"
    sha256: str = ""

    def summary(self) -> str:
        """One line for people."""
        if self.source == "random":
            return f"{self.name}: random weights, nothing pre-trained"
        parts = [f"{self.name} from {self.source}: {self.matched} of {self.total} tensors"]
        left = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        parts += [f"{len(names)} {what} ({_some(names)})" for what, names in left if names]
        described = describe_pretraining(self.pretraining)
        seen = self.pretraining if described == "unknown" else described
        parts += [f"licence {self.licence}", f"pre-trained on {seen}" if seen != "unknown" else "pre-training unknown"]
        parts += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        return "; ".join(parts)

    def warnings(self) -> list[str]:
        """Licence, contamination of a test set, and tensors that stayed random: one sentence each."""
        if self.source == "random":
            return []
        what = self.name if self.source == "pretrained" else self.source
        found = provenance_warnings(name=what, licence=self.licence, pretraining=self.pretraining)
        if self.missing or self.mismatched:
            random = len(self.missing) + len(self.mismatched)
            found.append(f"{what}: {random} of {self.total} tensors of {self.name} stay random")
        return found


def load_weights(model: Classifier, source: str) -> WeightsReport:
    """Fill the backbone; the head stays as it is.

    Half-precision tensors become float32. Names may carry `module.`, `model.`, `backbone.` or be nested under
    `state_dict`, `model` or `model_ema` (preferred, as in timm).

    Args:
        model: Changed in place, all at once or not at all.
        source: "pretrained" (timm's hub), "random", a .safetensors, .pth or .pt file, a folder with config.json and a
            weight file (timm's local-dir form), or "package:NAME" with a NAME from `packages.PACKAGES`.

    Raises:
        WeightsError: The source cannot be had or read, holds code or values that are not finite, or fits less than
            half of the backbone.
    """
    if source == "random":
        return WeightsReport(model.name, "random", 0, len(_target(model.backbone)), licence="none", pretraining="none")
    if source == "pretrained":
        return _apply(model, from_hub(model.name))
    if source.startswith("package:"):
        return _apply(model, from_package(model.name, source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _apply(model, from_folder(model.name, path))
    return _apply(model, from_file(path))


def data_config(name: str, source: str) -> InputConfig:
    """Size, crop, interpolation and normalization that the weights expect.

    A file or random weights under a bare architecture name get that architecture's configuration at its training
    size. A name with a tag (`resnet101.a1h_in1k`) says that the file holds those weights; a folder says it itself.

    Args:
        name: timm name, as from `names.resolve_name`.
        source: As for `load_weights`. Nothing is loaded.

    Raises:
        WeightsError: A package or folder that does not exist or does not fit the name.
    """
    is_own = True
    if source.startswith("package:"):
        config = timm_config(find_package(source, name).timm_name)
    elif source not in ("pretrained", "random") and (settings := read_folder_config(Path(source).expanduser(), name)):
        config = as_config(settings)
    else:
        config = timm_config(name)
        is_own = source == "pretrained" or "." in name
    return input_config(config, is_own=is_own)


def _apply(model: Classifier, source: Source) -> WeightsReport:
    target = _target(model.backbone)
    counters = model.backbone.state_dict().keys() - target.keys()
    fitting: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    unexpected: list[str] = []
    mismatched: list[str] = []
    skipped: list[str] = []
    for given, tensor in source.tensors.items():
        name = _strip(given, target, counters)
        if name in target and tensor.shape == target[name].shape:
            fitting[name] = _as_float32(tensor, given, source.label)
        elif name in target:
            mismatched.append(f"{name}: {tuple(tensor.shape)} for {tuple(target[name].shape)}")
        elif _is_classifier(name, model.backbone):
            skipped.append(given)
        elif name in counters:
            counts[name] = tensor
        elif not name.endswith("num_batches_tracked"):
            unexpected.append(given)
    if len(fitting) < MIN_MATCHED_FRACTION * len(target):
        raise WeightsError(
            f"model.weights: {source.label} does not hold weights of {model.name}: {len(fitting)} of its {len(target)} "
            f"tensors match, {len(mismatched)} have another shape, {len(unexpected)} are unknown"
            f"{f' ({_some(unexpected)})' if unexpected else ''}. Set model.name to the model that they belong to"
        )
    model.backbone.load_state_dict({**fitting, **counts}, strict=False)
    wrong = {entry.partition(":")[0] for entry in mismatched}
    return WeightsReport(
        name=model.name,
        source=source.label,
        matched=len(fitting),
        total=len(target),
        missing=tuple(name for name in target if name not in fitting and name not in wrong),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        skipped=tuple(skipped),
        licence=source.licence,
        pretraining=source.pretraining,
        sha256=source.sha256,
    )


def _target(backbone: nn.Module) -> dict[str, Tensor]:
    state = backbone.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _strip(name: str, *known: Collection[str]) -> str:
    """Drop wrappers' prefixes, but never one that the model itself has."""
    while not any(name in names for names in known):
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def _is_classifier(name: str, backbone: nn.Module) -> bool:
    own: Any = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = (own,) if isinstance(own, str) else tuple(own)
    return any(name.startswith(f"{head}.") for head in (*heads, "head", "fc", "classifier"))


def _as_float32(tensor: Tensor, name: str, label: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise WeightsError(
            f"model.weights: {name} in {label} holds values that are not finite (variances saved in 16 bit overflow, "
            "for one). Get the file again, or save it in 32 bit"
        )
    return tensor


def _some(names: Any, count: int = 3) -> str:
    shown = [str(name) for name in names[:count]]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")
