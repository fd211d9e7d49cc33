"""ONNX as OpenVINO's IR, in float16 weights or int8; the only module besides `exported` that knows OpenVINO."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import MissingExtraError
from fieldmark.outputs.metadata import KEY


def write_openvino(source: Path, path: Path, *, metadata: str) -> None:
    """Write an ONNX file as IR with float16 weights; OpenVINO computes in what the processor does best.

    Args:
        source: ONNX in float32.
        path: The .xml file to write; the weights go beside it as .bin.
        metadata: Stored under "fieldmark" in the model's runtime info.

    Raises:
        MissingExtraError: openvino is not installed.
    """
    ov = _openvino()
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
    ov = _openvino()
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


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino") from None
    return openvino
