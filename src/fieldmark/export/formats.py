"""A torch model as ONNX, in float32 or int8; the only module besides `exported` that knows ONNX.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ExportError, MissingExtraError
from fieldmark.inference.exported import FILE, KEY, import_openvino

if TYPE_CHECKING:
    from torch import nn

    from fieldmark.augment.reference import EvalSpec


INPUT, OUTPUT = "images", "logits"
OPSET = 18  # the oldest that torch's exporter writes without conversion; runtimes since 2023 read it


def write_onnx(model: nn.Module, path: Path, *, size: int, metadata: str) -> None:
    """Write `model` as one ONNX file.

    Args:
        model: (B, 3, S, S) float32 -> (B, K) logits, in eval mode, on the CPU.
        path: File to write; weights are inside.
        size: S.
        metadata: Stored under the key "fieldmark" of the file's metadata.

    Raises:
        ExportError: The model cannot be exported.
        MissingExtraError: onnx is not installed.
    """
    import torch

    try:
        import onnx

        importlib.import_module("onnxscript")  # torch needs it and would say so less clearly
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from None
    example = torch.zeros(2, 3, size, size)
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # torch's exporter raises many kinds; each means the same to the user
        raise ExportError(f"the model cannot be written as ONNX: {_first_line(error)}") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {KEY: metadata})
    onnx.save_model(proto, path)


def quantize_onnx(source: Path, path: Path, *, calibration: NDArray[np.float32], metadata: str) -> None:
    """Write an int8 copy of an ONNX file: static ranges, weights per channel.

    Args:
        source: ONNX in float32.
        path: File to write.
        calibration: (N, 3, S, S) normalised photos that set the ranges of the activations.
        metadata: Stored in the file, as by `write_onnx`.

    Raises:
        MissingExtraError: onnxruntime is not installed.

    Source:
        Jacob et al., arXiv:1712.05877; QDQ form of ONNX Runtime. Weights use 7 bits: without VNNI, products of
        uint8 and int8 are summed in pairs in 16 bits and would saturate (ONNX Runtime, "Quantize ONNX models", on
        reduce_range).
    """
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "export") from None
    reader: Any = _Reader(calibration)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # quantization advises through the root logger on what is done here already
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
    finally:
        root.setLevel(level)
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {KEY: metadata})
    onnx.save_model(proto, path)


class _Reader:
    """Calibration photos in small batches, as ONNX Runtime asks for them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(
            images[start : start + 8] for start in range(0, len(images), 8)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_openvino(source: Path, path: Path, *, metadata: str) -> None:
    """Write an ONNX file as IR with float16 weights; OpenVINO computes in what the processor does best.

    Args:
        source: ONNX in float32.
        path: The .xml file to write; the weights go beside it as .bin.
        metadata: Stored under "fieldmark" in the model's runtime info.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    ov = import_openvino()
    _save(ov, ov.convert_model(source), path, metadata, compress_to_fp16=True)


def quantize_openvino(source: Path, path: Path, *, calibration: NDArray[np.float32], metadata: str) -> None:
    """Write an ONNX file as int8 IR.

    Args:
        source: ONNX in float32.
        path: The .xml file to write.
        calibration: (N, 3, S, S) normalised photos that set the ranges of the activations.
        metadata: As for `write_openvino`.

    Raises:
        MissingExtraError: openvino or nncf is not installed.

    Source:
        NNCF's post-training quantisation with bias correction; "mixed" is symmetric weights, asymmetric activations.
    """
    ov = import_openvino()
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("nncf", "openvino") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    photos: Iterable[NDArray[np.float32]] = [image[None] for image in calibration]
    quantized = nncf.quantize(
        ov.convert_model(source),
        nncf.Dataset(photos),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calibration),
    )
    _save(ov, quantized, path, metadata, compress_to_fp16=False)


def _save(ov: Any, model: Any, path: Path, metadata: str, *, compress_to_fp16: bool) -> None:
    model.set_rt_info(metadata, [KEY])
    ov.save_model(model, path, compress_to_fp16=compress_to_fp16)


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
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine
    # By way of memory: on a full disk torch's own writer would abort the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FILE: metadata})
    path.write_bytes(buffer.getbuffer())


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
