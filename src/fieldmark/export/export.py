"""A run folder as a model for elsewhere, written only if it is proven to be the same model.

An export is a folder: the model file, fieldmark.json (everything between a photo and a named probability) and
README.md, the model card. Letters: N photos, K classes, S side in pixels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ExportError
from fieldmark.files import explain_disk_error
from fieldmark.inference.exported import FILE, ExportedModel, ModelMetadata

if TYPE_CHECKING:
    from fieldmark.models.classifier import Classifier
    from fieldmark.runs.folder import Run


KINDS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "timm": "model.safetensors"}
INT8_KINDS = ("onnx", "openvino")
# Largest difference of a logit over the largest logit: rounding in float32, and in float16 weights.
LIMITS = {"float32": 1e-3, "float16": 2e-2}
_CHUNK = 16

Loader = Callable[[Sequence[int]], NDArray[np.float32]]


@dataclass(frozen=True)
class Photos:
    """Photos that prove an export.

    Attributes:
        labels: (N,) class numbers, -1 where unknown.
        load: Places among these N -> (n, 3, S, S) normalised pictures.
    """

    labels: NDArray[np.int64]
    load: Loader


def export_run(
    run: Run,
    out: Path,
    *,
    to: str,
    is_int8: bool,
    max_accuracy_loss: float,
    max_photos: int,
) -> ModelMetadata:
    """Export the kept weights of a run, with its calibration where `fieldmark calibrate` made one.

    Args:
        run: A finished run whose validation photos are still there: they prove the export.
        out: Folder to create.
        to: "onnx", "openvino", "torch" or "timm".
        is_int8: Quantise (onnx and openvino).
        max_accuracy_loss: Largest loss of accuracy by int8, as a share.
        max_photos: Most validation photos to use; half of them calibrate int8, the other half judge it.

    Returns:
        What was written as fieldmark.json, with the evidence.

    Raises:
        ExportError: The form cannot hold the model, or the model written disagrees with the run.
    """
    from fieldmark.export.model_card import model_card

    if run.is_ensemble:
        raise ExportError(
            f"{run.path} is an ensemble, and an export is one model: export one of its runs, or make one model of them "
            "with `fieldmark combine --method soup`"
        )
    metadata = describe_run(run, to)
    return export_model(
        run.load_model(),
        metadata,
        out,
        photos=validation_photos(run, max_photos=max_photos),
        is_int8=is_int8,
        max_accuracy_loss=max_accuracy_loss,
        is_plain=not run.model_info["create"].get("stride_in_1x1", False),
        card=lambda written: model_card(run, written),
        run=run,
    )


def export_model(
    model: Classifier,
    metadata: ModelMetadata,
    out: Path,
    *,
    photos: Photos,
    is_int8: bool,
    max_accuracy_loss: float,
    is_plain: bool,
    card: Callable[[ModelMetadata], str],
    run: Run | None = None,
) -> ModelMetadata:
    """Export a classifier and prove it on photos; see `export_run`.

    Args:
        model: (B, 3, S, S) -> (B, K) logits, in eval mode on the CPU.
        metadata: Of the model; `precision` and `evidence` are filled in.
        out: Folder to create, whole or not at all.
        photos: At least one; labelled where int8 is asked for.
        is_int8: See `export_run`.
        max_accuracy_loss: See `export_run`.
        is_plain: Whether timm's architecture is unchanged.
        card: Model card from the final metadata.
        run: The model's run, to say how far the answers of `predict` differ where it computes in less than 32 bit.
    """
    _check(metadata.kind, out, photos, is_int8=is_int8)
    part: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        metadata = _write(model, metadata, part, photos, is_int8=is_int8, is_plain=is_plain)
        metadata = _prove(model, metadata, part, photos, is_int8=is_int8, max_accuracy_loss=max_accuracy_loss)
        if run is not None and (gap := compare_answers(run, part, photos)):
            metadata = replace(metadata, evidence=metadata.evidence | {"predict": gap})
        (part / FILE).write_text(metadata.to_json(), encoding="utf-8")
        (part / "README.md").write_text(card(metadata), encoding="utf-8")
        # mkdtemp makes private folders and safetensors private files; an export is for others.
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        part.rename(out)
    except Exception as error:
        if failure := explain_disk_error(out, error):
            raise failure from error
        raise
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return metadata


def describe_run(run: Run, to: str) -> ModelMetadata:
    """The metadata of a run's model before it is exported to the form `to`."""
    from fieldmark.inference.calibration import load_calibration

    calibration = load_calibration(run)
    groups = calibration.fallback if calibration else None
    info = run.model_info
    weights: dict[str, Any] = info.get("weights", {})
    return ModelMetadata(
        kind=to,
        precision="float32",
        file=KINDS.get(to, ""),
        architecture=str(info["create"]["name"]),
        classes=run.classes,
        preprocessing=asdict(run.eval_spec()),
        background=run.config.data.background,
        max_pixels=run.config.data.max_pixels,
        batch_size=run.config.eval.batch_size,
        temperature=calibration.temperature if calibration else 1.0,
        threshold=calibration.threshold if calibration else 0.0,
        parameters=int(info["parameters"]),
        licence=str(weights.get("licence", "unknown")),
        pretraining=str(weights.get("pretraining", "unknown")),
        run=run.name,
        metrics=run.summary,
        back_off=groups.to_dict() if groups else None,
    )


def validation_photos(run: Run, *, max_photos: int) -> Photos:
    """Up to `max_photos` validation photos of a run, spread evenly over its classes."""
    from fieldmark.augment.reference import eval_reference

    index = run.split.of("val")
    if not index.photos:
        raise ExportError(f"{run.path} has no validation photos, and an export is proven on photos")
    files = index.files()
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        raise ExportError(
            f"none of the run's {len(files)} validation photos is there any more (the first is {missing[0]}), and an "
            "export is proven on photos: put the data set back where it was"
        )
    present = [number for number, file in enumerate(files) if file.is_file()]
    count = min(max_photos, len(present))
    chosen = [present[place] for place in np.linspace(0, len(present) - 1, count).round().astype(int)]
    spec, decoding = run.eval_spec(), run.decode_spec()

    def load(places: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([eval_reference(decoding.read(files[chosen[place]]), spec).numpy() for place in places])

    return Photos(labels=index.label_numbers()[chosen], load=load)


def _check(kind: str, out: Path, photos: Photos, *, is_int8: bool) -> None:
    if kind not in KINDS:
        raise ExportError(f"there is no form {kind!r}; choose one of {', '.join(KINDS)}")
    if is_int8 and kind not in INT8_KINDS:
        raise ExportError(f"int8 is made for {' and '.join(INT8_KINDS)}, not for {kind}")
    if out.exists():
        raise ExportError(f"{out} exists already; give another --out, or remove it")
    if not len(photos.labels):
        raise ExportError("an export is proven on photos, and there are none")
    if is_int8 and (len(photos.labels) < 4 or photos.labels.min() < 0):
        raise ExportError(f"int8 takes at least 4 labelled photos to calibrate and to judge; got {len(photos.labels)}")


def _write(
    model: Classifier, metadata: ModelMetadata, folder: Path, photos: Photos, *, is_int8: bool, is_plain: bool
) -> ModelMetadata:
    """Write the model file into `folder`; the metadata inside it lacks the evidence, which is measured on the file."""
    from fieldmark.export import formats

    spec = metadata.eval_spec()
    default = "float16" if metadata.kind == "openvino" else "float32"
    metadata = replace(metadata, precision="int8" if is_int8 else default)
    text, path = metadata.to_json(), folder / metadata.file
    if metadata.kind == "torch":
        formats.write_torch(model, path, size=spec.size, metadata=text)
    elif metadata.kind == "timm":
        formats.write_timm(
            model,
            folder,
            architecture=metadata.architecture,
            classes=metadata.classes,
            eval_spec=spec,
            is_plain=is_plain,
        )
    else:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            plain = Path(scratch) / "model.onnx"
            formats.write_onnx(model, plain, size=spec.size, metadata=text)
            if is_int8:
                write = formats.quantize_onnx if metadata.kind == "onnx" else formats.quantize_openvino
                calibration, _ = _halves(photos)
                write(plain, path, calibration=photos.load(calibration), metadata=text)
            elif metadata.kind == "openvino":
                formats.write_openvino(plain, path, metadata=text)
            else:
                shutil.move(plain, path)
    return metadata


def _prove(
    model: Classifier,
    metadata: ModelMetadata,
    folder: Path,
    photos: Photos,
    *,
    is_int8: bool,
    max_accuracy_loss: float,
) -> ModelMetadata:
    import torch

    (folder / FILE).write_text(metadata.to_json(), encoding="utf-8")
    exported = ExportedModel.load(folder, threads=0, precision="f32")
    calibration, judges = _halves(photos) if is_int8 else ([], list(range(len(photos.labels))))
    expected: list[NDArray[np.float32]] = []
    got: list[NDArray[np.float32]] = []
    for start in range(0, len(judges), _CHUNK):
        images = photos.load(judges[start : start + _CHUNK])
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(images)).numpy())
        got.append(exported.logits(images))
    reference, measured = np.concatenate(expected), np.concatenate(got)
    if is_int8:
        loss = require_small_loss(
            reference,
            measured,
            photos.labels[judges],
            calibration_photos=len(calibration),
            limit=max_accuracy_loss,
        )
        return replace(metadata, evidence={"int8": loss.to_dict()})
    parity = require_parity(reference, measured, limit=LIMITS[metadata.precision])
    return replace(metadata, evidence={"parity": parity.to_dict()})


def compare_answers(run: Run, folder: Path, photos: Photos) -> dict[str, Any] | None:
    """How far `predict` of the export is from `predict` of the run; None where the run too answers in 32 bit."""
    from fieldmark.inference.predictor import Device, Predictor

    precision = Device.choose(str(run.model_info["precision"])).precision
    if precision == "32-true":
        return None
    predictor, exported = Predictor.load(run), ExportedModel.load(folder, threads=0)
    same, largest, count = 0, 0.0, len(photos.labels)
    for start in range(0, count, _CHUNK):
        images = photos.load(range(start, min(start + _CHUNK, count)))
        ours, theirs = predictor.probabilities(images), exported.probabilities(images)
        same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        largest = max(largest, float(np.abs(ours - theirs).max()))
    return {"precision": precision, "photos": count, "same_answer": same / count, "largest_difference": largest}


def _halves(photos: Photos) -> tuple[list[int], list[int]]:
    """Every other photo calibrates int8, the rest judge it: no photo does both."""
    places = list(range(len(photos.labels)))
    return places[::2], places[1::2]


Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Parity:
    """How far two models agree.

    Attributes:
        photos: N.
        largest_difference: Largest absolute difference of a logit.
        relative_difference: The same over the largest absolute logit of the reference.
        same_answer: Share of photos with the same likeliest class, in [0, 1].
        limit: Largest `relative_difference` that was allowed.
    """

    photos: int
    largest_difference: float
    relative_difference: float
    same_answer: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AccuracyLoss:
    """What int8 costs on photos that the quantisation was not calibrated on.

    Attributes:
        photos: N.
        reference: Accuracy of the original, in [0, 1].
        quantized: Accuracy of the int8 model, in [0, 1].
        loss: `reference` minus `quantized`.
        worse: Photos that only the original has right.
        better: Photos that only the int8 model has right.
        calibration_photos: Other photos, which set the ranges of the activations.
        limit: Largest `loss` that was allowed.
    """

    photos: int
    reference: float
    quantized: float
    loss: float
    worse: int
    better: int
    calibration_photos: int
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def require_parity(reference: Logits, exported: Logits, *, limit: float) -> Parity:
    """Compare logits of the same photos.

    Args:
        reference: (N, K) of the run's own model.
        exported: (N, K) of the exported one.
        limit: Largest difference of a logit over the largest absolute logit of the reference.

    Raises:
        ExportError: They disagree: says on how many photos and by how much.
    """
    if reference.shape != exported.shape or not len(reference):
        raise ExportError(f"the exported model gives logits {exported.shape}, the run's {reference.shape}")
    gaps = np.abs(reference - exported)
    scale = max(float(np.abs(reference).max()), 1e-12)
    finite = np.where(np.isfinite(gaps), gaps, np.inf)
    parity = Parity(
        photos=len(reference),
        largest_difference=float(finite.max()),
        relative_difference=float(finite.max()) / scale,
        same_answer=float((reference.argmax(axis=1) == exported.argmax(axis=1)).mean()),
        limit=limit,
    )
    if not parity.relative_difference <= limit:
        raise ExportError(
            f"the exported model disagrees with the run on {parity.photos} photos: logits differ by up to "
            f"{parity.largest_difference:.3g} ({parity.relative_difference:.2%} of the largest, allowed {limit:.2%}), "
            f"the answer is the same on {parity.same_answer:.1%}. Nothing was written; another form may fit the model"
        )
    return parity


def require_small_loss(
    reference: Logits, quantized: Logits, labels: NDArray[np.integer[Any]], *, calibration_photos: int, limit: float
) -> AccuracyLoss:
    """Compare accuracies on the same labelled photos.

    Args:
        reference: (N, K) logits of the run's own model.
        quantized: (N, K) logits of the int8 model.
        labels: (N,) class numbers.
        calibration_photos: How many other photos set the ranges.
        limit: Largest loss of accuracy, as a share: 0.01 is one point.

    Raises:
        ExportError: No photos, or the loss is above the limit: says both accuracies.
    """
    if not len(labels):
        raise ExportError("int8 is only given with its accuracy measured, and there are no labelled photos to measure")
    was_right, is_right = reference.argmax(axis=1) == labels, quantized.argmax(axis=1) == labels
    loss = AccuracyLoss(
        photos=len(labels),
        reference=float(was_right.mean()),
        quantized=float(is_right.mean()),
        loss=float(was_right.mean() - is_right.mean()),
        worse=int((was_right & ~is_right).sum()),
        better=int((~was_right & is_right).sum()),
        calibration_photos=calibration_photos,
        limit=limit,
    )
    if loss.loss > limit + 1e-12:
        raise ExportError(
            f"int8 loses {100 * loss.loss:.2f} points of accuracy ({loss.reference:.2%} to {loss.quantized:.2%} on "
            f"{loss.photos} photos), allowed are {100 * limit:.2f}. Nothing was written; export without int8, or allow "
            "more with --max-accuracy-loss"
        )
    return loss
