"""A run folder as a model for elsewhere, written only if it is proven to be the same model.

An export is a folder: the model file, fieldmark.json (everything between a photo and a named probability) and
README.md, the model card. Letters: N photos, K classes, S side in pixels.
"""

import gzip
import lzma
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fieldmark.augment.reference import eval_reference
from fieldmark.errors import ExportError, command, first_line
from fieldmark.export import formats
from fieldmark.files import digest_file, whole_folder
from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.evaluation import METRIC_NAMES
from fieldmark.inference.exported import FILE, Compute, ExportedModel, ModelMetadata, compute_with
from fieldmark.inference.predictor import Predictor
from fieldmark.models.catalog import describe_pretraining
from fieldmark.models.classifier import Classifier
from fieldmark.models.weights import NON_COMMERCIAL
from fieldmark.runs.folder import RECIPE, Run, format_accuracy
from fieldmark.study.report import render_template
from fieldmark.training.evaluate import Device
from fieldmark.training.metrics import Floats, Ints, wilson_interval

KINDS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "timm": "model.safetensors"}
KINDS["web"] = KINDS["onnx"]  # which the page opens
INT8_KINDS = ("onnx", "openvino", "web")
PRECISIONS = {"openvino": ("float16",), "web": ("float16", "float32")}  # the first that is proven; of others float32
# Largest difference of a logit over the largest logit: rounding in float32, and in float16 weights.
LIMITS = {"float32": 1e-3, "float16": 2e-2}
_CHUNK = 16
_PACKAGE = Path(__file__).parents[1]
_SHARED = ("app.css", "app.js", "icon.svg")  # of the page of `serve`; there are no maps of attention
# Largest difference of a logit, over the largest logit, of a browser's answer to the probe.
_PROBE_LIMITS = {"float32": 1e-3, "float16": 1e-3, "int8": 0.1}


@dataclass(frozen=True)
class Photos:
    """N photos that prove an export."""

    labels: NDArray[np.int64]  # (N,) class numbers, -1 where unknown
    load: Callable[[Sequence[int]], NDArray[np.float32]]  # numbers of these -> (n, 3, S, S) normalized pictures

    def ask(self, numbers: Sequence[int], *models: Callable[[NDArray[np.float32]], Floats]) -> list[Floats]:
        """(n, K) of each model for these photos, a few of them at a time in memory."""
        answers: list[list[Floats]] = [[] for _ in models]
        for start in range(0, len(numbers), _CHUNK):
            images = self.load(numbers[start : start + _CHUNK])
            for rows, model in zip(answers, models, strict=True):
                rows.append(model(images))
        return [np.concatenate(rows) for rows in answers]


def export_run(
    run: Run, out: Path, *, to: str, is_int8: bool, max_accuracy_loss: float, max_photos: int
) -> ModelMetadata:
    """Export the kept weights of a run, with its calibration where `fieldmark calibrate` made one.

    Args:
        run: A finished run whose validation photos are still there: they prove the export.
        out: Folder to create.
        to: "onnx", "openvino", "torch", "timm" or "web".
        is_int8: Quantize (onnx, openvino and web).
        max_accuracy_loss: Largest loss of accuracy by int8, as a share.
        max_photos: Most validation photos to use; half of them calibrate int8, the other half evaluate it.

    Returns:
        What was written as fieldmark.json, with the evidence.

    Raises:
        ExportError: The form cannot hold the model, or the model written disagrees with the run.

    Examples:
        >>> run, out = fieldmark.Run("runs/mine"), Path("exported")
        >>> fieldmark.export_run(run, out, to="timm", is_int8=False, max_accuracy_loss=0.01, max_photos=50).classes
        ('jay', 'robin', 'wren')
    """
    if run.is_ensemble:
        _refuse_ensemble(run, to)
    return export_model(
        run.load_model(),
        describe_run(run, to),
        out,
        photos=validation_photos(run, max_photos=max_photos),
        is_int8=is_int8,
        max_accuracy_loss=max_accuracy_loss,
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
    run: Run | None = None,
) -> ModelMetadata:
    """Export a classifier in eval mode on the CPU, whole or not at all, and prove it on photos; see `export_run`.

    The `precision` and `evidence` of the metadata are filled in. Of a `run` there is a model card, which says how far
    the answers of `predict` differ where it computes in less than 32 bit.
    """
    _check(metadata.kind, out, photos, is_int8=is_int8)
    precisions = ("int8",) if is_int8 else PRECISIONS.get(metadata.kind, ("float32",))
    with whole_folder(out) as part:
        for precision in precisions:
            metadata = replace(metadata, precision=precision)
            _write(model, metadata, part, photos)
            metadata = replace(metadata, digests={f.name: digest_file(f) for f in part.iterdir() if f.name != FILE})
            (part / FILE).write_text(metadata.to_json(), encoding="utf-8")
            try:
                metadata = replace(metadata, evidence=_prove(model, metadata, part, photos, limit=max_accuracy_loss))
                break
            except ExportError:
                if precision == precisions[-1]:
                    raise
        if run is not None and (arithmetic := Device.choose(str(run.model_info["precision"])).precision) != "32-true":
            # How far `predict` of the export is from `predict` of the run.
            answers = photos.ask(range(len(photos.labels)), *(Predictor.load(one).probabilities for one in (run, part)))
            metadata.evidence["predict"] = {"precision": arithmetic, **_measure_agreement(*answers)}
        (part / FILE).write_text(metadata.to_json(), encoding="utf-8")
        if run is not None:
            (part / "README.md").write_text(model_card(run, metadata), encoding="utf-8")
        for file in part.iterdir():
            file.chmod(0o644)  # safetensors makes private files; an export is for others
        if metadata.kind == "web":
            write_page(part)
    return metadata


def _refuse_ensemble(run: Run, to: str) -> NoReturn:
    """Name the networks that may be exported, best first, with the accuracy of each alone where it is known."""
    known = {one: one.summary.get("val", {}) for one in run.members}
    members = sorted(known, key=lambda one: known[one].get("top1", 0), reverse=True)
    told = [f"{one.path}: {format_accuracy(val) if (val := known[one]) else 'not evaluated'}" for one in members]
    raise ExportError(
        f"{run.path} is an ensemble, and an export is one network: export the best of them by "
        f"`{command('export', members[0].path, '--to', to)}`. Each alone on the validation photos: {'; '.join(told)}"
    )


def push_export(folder: Path, repository: str) -> str:
    """Upload an export, with its card, to a repository of the model hub ("USER/NAME"), and give its address.

    A repository that is not there is made, private. Raises ExportError where the hub refuses: no token, no network.
    """
    import huggingface_hub as hub

    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the client raises its HTTP library's errors, and that library changes
        reason = first_line(error).rstrip(".")
        raise ExportError(
            f"{folder} is written, but could not be uploaded to {repository}: {reason}. Log in with `hf auth login`, "
            f"then `hf upload {repository} {folder}`"
        ) from None
    return str(address)


def describe_run(run: Run, to: str) -> ModelMetadata:
    """The metadata of a run's model before it is exported to the form `to`."""
    calibration = load_calibration(run)
    info = run.model_info
    weights: dict[str, Any] = info.get("weights", {})
    return ModelMetadata(
        kind=to,
        precision="float32",
        file=KINDS.get(to, ""),
        architecture=str(info["create"]["name"]),
        classes=run.classes,
        preprocessing=run.eval_spec(),
        background=run.config.data.background,
        max_pixels=run.config.data.max_pixels,
        batch_size=run.config.eval.batch_size,
        temperature=calibration.temperature if calibration else 1.0,
        threshold=calibration.threshold if calibration else 0.0,
        parameters=int(info["parameters"]),
        license=str(weights.get("license", "unknown")),
        pretraining=str(weights.get("pretraining", "unknown")),
        run=run.name,
        metrics=run.summary,
        back_off=calibration.back_off if calibration else None,
    )


def validation_photos(run: Run, *, max_photos: int) -> Photos:
    """Up to `max_photos` validation photos of a run, spread evenly over its classes."""
    index = run.split.of("val")
    files = index.files()
    if not files:
        raise ExportError(f"{run.path} has no validation photos, and an export is proven on photos")
    present = [number for number, file in enumerate(files) if file.is_file()]
    if not present:
        raise ExportError(
            f"none of the run's {len(files)} validation photos is there any more (the first is {files[0]}), and an "
            "export is proven on photos: put the data set back where it was"
        )
    spread = np.linspace(0, len(present) - 1, min(max_photos, len(present))).round().astype(int)
    chosen = np.array(present)[spread]
    spec, decoding = run.eval_spec(), run.decode_spec()

    def load(numbers: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([eval_reference(decoding.read(files[chosen[n]]), spec).numpy() for n in numbers])

    return Photos(labels=index.label_numbers()[chosen], load=load)


def _check(kind: str, out: Path, photos: Photos, *, is_int8: bool) -> None:
    if kind not in KINDS:
        raise ExportError(f"there is no form {kind!r}; choose one of {', '.join(KINDS)}")
    if is_int8 and kind not in INT8_KINDS:
        raise ExportError(f"int8 is made for {', '.join(INT8_KINDS)}, not for {kind}")
    if out.exists():
        raise ExportError(f"{out} exists already; give another --out, or remove it")
    if is_int8 and (len(photos.labels) < 4 or photos.labels.min() < 0):
        raise ExportError(f"int8 takes at least 4 labeled photos to calibrate and evaluate; got {len(photos.labels)}")


def _write(model: Classifier, metadata: ModelMetadata, folder: Path, photos: Photos) -> None:
    """Write the model file; the metadata inside it lacks the evidence, which is measured on the file."""
    size, text, path = metadata.preprocessing.size, metadata.to_json(), folder / metadata.file
    if metadata.kind == "torch":
        formats.write_torch(model, path, size=size, metadata=text)
    elif metadata.kind == "timm":
        formats.write_timm(model, folder, metadata)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            plain = Path(scratch) / "model.onnx"
            formats.write_onnx(model, plain, size=size, metadata=text)
            if metadata.precision == "int8":
                quantize = formats.quantize_openvino if metadata.kind == "openvino" else formats.quantize_onnx
                quantize(plain, path, calibration=photos.load(range(0, len(photos.labels), 2)), metadata=text)
            elif metadata.kind == "openvino":
                formats.write_openvino(plain, path, metadata=text)
            elif metadata.precision == "float16":
                formats.halve_onnx(plain, path, metadata=text)
            else:
                plain.rename(path)


def _prove(model: Classifier, metadata: ModelMetadata, folder: Path, photos: Photos, *, limit: float) -> dict[str, Any]:
    """Evidence that the model in the folder is the run's, as the metadata keep it."""
    ask_original = compute_with(model)
    exported = ExportedModel.load(folder, threads=0)
    evidence = {"browser": measure_probe(exported.logits, metadata)} if metadata.kind == "web" else {}
    if metadata.precision != "int8":
        reference, measured = photos.ask(range(len(photos.labels)), ask_original, exported.logits)
        return evidence | {"parity": require_parity(reference, measured, limit=LIMITS[metadata.precision])}
    others = range(1, len(photos.labels), 2)  # the rest calibrated it: no photo does both
    reference, quantized = photos.ask(others, ask_original, exported.logits)
    loss = require_small_loss(reference, quantized, photos.labels[others], limit=limit)
    return evidence | {"int8": {**loss, "calibration_photos": len(photos.labels) - len(others)}}


def _measure_agreement(ours: Floats, theirs: Floats) -> dict[str, Any]:
    """Return how far (N, K) answers of two models differ, and for what share of the photos the answer is the same."""
    gaps = np.abs(ours - theirs)
    largest = float(np.where(np.isfinite(gaps), gaps, np.inf).max())
    same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    return {"photos": len(ours), "largest_difference": largest, "same_answer": same}


def require_parity(reference: Floats, exported: Floats, *, limit: float) -> dict[str, Any]:
    """How far (N, K) logits of the run and of the export differ; at most `limit`, a share of the largest logit."""
    found = _measure_agreement(reference, exported)
    relative = found["largest_difference"] / max(float(np.abs(reference).max()), 1e-12)
    if not relative <= limit:
        raise ExportError(
            f"the exported model disagrees with the run on {len(reference)} photos: logits differ by up to "
            f"{found['largest_difference']:.3g} ({relative:.2%} of the largest, allowed {limit:.2%}), "
            f"the answer is the same on {found['same_answer']:.1%}. Nothing was written; another form may fit the model"
        )
    return {**found, "relative_difference": relative, "limit": limit}


def require_small_loss(reference: Floats, quantized: Floats, labels: Ints, *, limit: float) -> dict[str, Any]:
    """What int8 costs in accuracy, at most the share `limit`, by (N, K) logits of photos that did not calibrate it."""
    was_right, is_right = reference.argmax(axis=1) == labels, quantized.argmax(axis=1) == labels
    before, after = float(was_right.mean()), float(is_right.mean())
    if before - after > limit + 1e-12:
        raise ExportError(
            f"int8 loses {100 * (before - after):.2f} points of accuracy ({before:.2%} to {after:.2%} on "
            f"{len(labels)} photos), allowed are {100 * limit:.2f}. Nothing was written; export without int8, or allow "
            "more with --max-accuracy-loss"
        )
    return {
        "photos": len(labels),
        "reference": before,
        "quantized": after,
        "loss": before - after,
        "worse": int((was_right & ~is_right).sum()),
        "better": int((~was_right & is_right).sum()),
        "limit": limit,
    }


def write_page(folder: Path) -> None:
    """Write index.html and static/ into an export; what is compiled is packed, as plain servers pack nothing."""
    static, shared, own = folder / "static", _PACKAGE / "serve/static", _PACKAGE / "export/page"
    (static / "runtime").mkdir(parents=True)
    for file in (*(shared / name for name in _SHARED), *own.glob("*.js")):
        shutil.copyfile(file, static / file.name)
    for file in (own / "runtime").iterdir():
        name = file.name.removesuffix(".xz")
        content = file.read_bytes() if name == file.name else lzma.decompress(file.read_bytes())
        if name.endswith(".wasm"):
            # Not named .gz: some servers would say that they packed it themselves.
            name, content = f"{Path(name).stem}.bin", gzip.compress(content, mtime=0)
        (static / "runtime" / name).write_bytes(content)
    page = (shared / "index.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(page.replace("static/attention.js", "static/local.js"), encoding="utf-8")


def measure_probe(compute: Compute, metadata: ModelMetadata) -> dict[str, Any]:
    """The logits of a picture of fixed numbers, which each browser must repeat before it answers."""
    numbers = np.arange(200 * 300 * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    picture = eval_reference(numbers.astype(np.uint8).reshape(200, 300, 3), metadata.preprocessing)
    return {"logits": compute(picture[None].numpy())[0].tolist(), "limit": _PROBE_LIMITS[metadata.precision]}


def model_card(run: Run, metadata: ModelMetadata) -> str:
    """What a model is, what it was shown, how well it does, and where it should not be used, in Markdown.

    Source:
        Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993; the front matter is the Hub's.
    """
    recipe = without_folders((run.path / RECIPE).read_text(encoding="utf-8")).rstrip()
    counts: dict[str, dict[str, int]] = run.data_info.get("counts", {})
    num_val = sum(splits.get("val", 0) for splits in counts.values())
    scores: dict[str, Any] = run.summary.get("val", {})
    intervals = {"top1": scores.get("top1_interval")}
    if num_val and "top5" in scores:
        intervals["top5"] = wilson_interval(round(scores["top5"] * num_val), num_val)
    shown = {key: name for key, name in METRIC_NAMES.items() if key != "top5" or len(metadata.classes) > 5}
    page = {
        "model": metadata,
        "library": "timm" if metadata.kind == "timm" else "fieldmark",
        "spec": metadata.preprocessing,
        "levels": metadata.back_off.levels[1:] if metadata.back_off else (),
        "metrics": [(name, scores[key], intervals.get(key)) for key, name in shown.items() if key in scores],
        "num_val": num_val,
        "select": run.summary.get("select"),
        "note": run.summary.get("note"),  # of a soup
        "calibration": load_calibration(run),
        "evidence": evidence_text(metadata.evidence),
        "counts": counts,
        "totals": sum(map(Counter[str], counts.values()), Counter[str]()),
        "smallest": min(counts, key=lambda name: sum(counts[name].values()), default=""),
        "fingerprint": run.data_info.get("fingerprint", "unknown"),
        "pretraining": describe_pretraining(metadata.pretraining, default=metadata.pretraining),
        "is_non_commercial": NON_COMMERCIAL.search(metadata.license) is not None,
        "recipe": recipe,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
    }
    return render_template("fieldmark.export", "model_card.md", page)


def evidence_text(evidence: dict[str, Any]) -> str:
    """What was measured when the model was exported, in one to three sentences."""
    known = dict.fromkeys(("int8", "parity", "predict")) | evidence
    return render_template("fieldmark.export", "evidence.md", {"evidence": known}).rstrip("\n")


def without_folders(recipe: str) -> str:
    """A recipe for strangers: of files and folders of this machine it has the name only.

    >>> without_folders('path = "/home/ada/photos/birds"')
    'path = "birds"'
    """

    def name(found: re.Match[str]) -> str:
        return f'{found[1]}"{PureWindowsPath(PurePosixPath(found[2]).name).name}"'

    return re.sub(r'^(\w+ = )"((?:[/~]|[A-Za-z]:|\.\.)[^"\n]*)"', name, recipe, flags=re.MULTILINE)
