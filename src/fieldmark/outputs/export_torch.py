"""A torch model as a torch.export program, or as a folder that timm loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.errors import ExportError
from fieldmark.outputs.metadata import FILE

if TYPE_CHECKING:
    from torch import nn

    from fieldmark.vision.augment import EvalSpec


def write_torch(model: nn.Module, path: Path, *, size: int, metadata: str) -> None:
    """Write `model` as a torch.export program (.pt2): it runs without Fieldmark and without timm.

    Args:
        model: (B, 3, S, S) float32 -> (B, K) logits, in eval mode, on the CPU.
        path: File to write.
        size: S, in pixels.
        metadata: Stored in the archive as fieldmark.json.

    Raises:
        ExportError: The model cannot be exported.
    """
    import torch

    shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},)
    try:
        program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds; each means the same to the user
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"the model cannot be written by torch.export: {line}") from error
    torch.export.save(program, path, extra_files={FILE: metadata})


def write_timm(
    model: nn.Module,
    folder: Path,
    *,
    architecture: str,
    classes: Sequence[str],
    eval_spec: EvalSpec,
    is_plain: bool,
) -> None:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, and so for the Hub.

    Args:
        model: A classifier with `backbone` (timm, without its own head) and `head` (one linear layer).
        folder: Exists and is empty.
        architecture: timm name of the backbone, without its pre-training tag.
        classes: Class names; stored as label names.
        eval_spec: Becomes the model's data configuration.
        is_plain: Whether timm's own architecture is unchanged.

    Raises:
        ExportError: timm's architecture cannot hold this model.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    parts: Any = model
    linear = _only_linear(parts.head)
    if linear is None:
        raise ExportError(
            "the timm form holds a linear head only, and this run has another: export --to onnx or torch, or train "
            'with model.head = "linear"'
        )
    if not is_plain:
        raise ExportError(
            "the timm form cannot say that strides were moved (model.stride_in_1x1): export --to onnx or torch"
        )
    architecture = architecture.split(".")[0]
    whole: Any = timm.create_model(architecture, num_classes=len(classes))
    classifier = str(whole.pretrained_cfg["classifier"])
    weights = dict(parts.backbone.state_dict())
    weights[f"{classifier}.weight"] = linear.weight.detach()
    if linear.bias is not None:
        weights[f"{classifier}.bias"] = linear.bias.detach()
    problem = set(weights) ^ set(whole.state_dict())
    if problem:
        raise ExportError(f"timm's {architecture} has other weights than this run: {', '.join(sorted(problem)[:5])}")
    save_file({name: torch.clone(value).contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    config = _timm_config(architecture, classes, asdict(eval_spec), whole, classifier)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _timm_config(
    architecture: str, classes: Sequence[str], spec: dict[str, Any], whole: Any, classifier: str
) -> dict[str, Any]:
    """The config.json of timm's Hub models (timm/models/_hub.py, save_config_for_hf)."""
    size = [3, spec["size"], spec["size"]]
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": whole.num_features,
        "label_names": list(classes),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": bool(whole.pretrained_cfg.get("fixed_input_size", False)),
            "interpolation": spec["interpolation"],
            "crop_pct": spec["crop_fraction"] if spec["transform"] == "weights" else 1.0,
            "crop_mode": "center" if spec["transform"] == "weights" else "squash",
            "mean": list(spec["mean"]),
            "std": list(spec["std"]),
            "num_classes": len(classes),
            "pool_size": whole.pretrained_cfg.get("pool_size"),
            "first_conv": whole.pretrained_cfg.get("first_conv"),
            "classifier": classifier,
        },
    }


def _only_linear(head: nn.Module) -> Any:
    """The linear layer of a head that is nothing else in evaluation, or None."""
    from torch import nn

    idle = nn.Dropout | nn.Identity | nn.Flatten
    layers = [layer for layer in head.modules() if not list(layer.children()) and not isinstance(layer, idle)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None
