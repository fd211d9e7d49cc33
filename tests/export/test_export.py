"""Laws of export: what is written is the model, knows its names and its preprocessing, or is not written at all."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from fieldmark.augment.reference import EvalSpec
from fieldmark.errors import ExportError, ResourceError
from fieldmark.export.export import (
    Photos,
    evidence_text,
    export_model,
    model_card,
    push_export,
    require_parity,
    require_small_loss,
)
from fieldmark.inference.calibration import calibrate
from fieldmark.inference.exported import ExportedModel, ModelMetadata
from fieldmark.inference.predictor import Predictor
from fieldmark.inference.taxonomy import Fallback, LevelScore
from fieldmark.models.classifier import create_classifier

CLASSES = ("10", "2", "owl | <b>")
SPEC = EvalSpec("weights", 64, 0.875, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))


def make_model(head="linear", pool="average"):
    torch.manual_seed(0)
    model = create_classifier(
        "test_resnet",
        num_classes=3,
        head=head,
        head_hidden=8,
        head_dropout=0.3,
        feature_dropout=0.1,
        drop_path=0.0,
        stride_in_1x1=False,
        pool=pool,
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # logits that differ by more than rounding
            nn.init.normal_(module.weight, 0, 1)
    return model


def make_metadata(kind):
    files = {
        "onnx": "model.onnx",
        "openvino": "model.xml",
        "torch": "model.pt2",
        "timm": "model.safetensors",
        "web": "model.onnx",
    }
    return ModelMetadata(
        kind=kind,
        precision="float32",
        file=files[kind],
        architecture="test_resnet.r160_in1k",
        classes=CLASSES,
        preprocessing=SPEC,
        background=(255, 255, 255),
        temperature=2.0,
        threshold=0.4,
        parameters=123,
        license="cc-by-nc-4.0",
        pretraining="in1k",
        run="run-1",
    )


def make_photos(model, count=24):
    images = np.random.default_rng(0).normal(0, 1, (count, 3, 64, 64)).astype(np.float32)
    with torch.inference_mode():
        labels = model(torch.from_numpy(images)).argmax(dim=1).numpy()
    return Photos(labels=labels, load=lambda places: images[list(places)]), images


def write_card(metadata, *, data, summary, calibration, recipe):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text(recipe)
        if calibration:
            (Path(folder) / "calibration.json").write_text(json.dumps(asdict(calibration)))
        run = SimpleNamespace(path=Path(folder), classes=metadata.classes, data_info=data, summary=summary)
        return model_card(run, metadata)


def export(kind, out, *, model=None, photos=None, is_int8=False, loss=0.05):
    model = model or make_model()
    return export_model(
        model,
        make_metadata(kind),
        out,
        photos=photos or make_photos(model)[0],
        is_int8=is_int8,
        max_accuracy_loss=loss,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One export of each form, made when it is first asked for: torch's exporters take seconds."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "out"
            made[kind] = folder, export(kind, folder)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "torch", "timm"])
def test_an_export_gives_the_runs_probabilities_at_any_batch_size(kind, exported):
    model = make_model()
    _, images = make_photos(model)
    folder, written = exported(kind)
    loaded = ExportedModel.load(folder, threads=1)
    assert written.evidence["parity"]["photos"] == 24
    assert loaded.metadata == written
    predictor = Predictor.load(folder)
    assert loaded.metadata.preprocessing == SPEC
    for size in (1, 3, 24):
        with torch.inference_mode():
            expected = torch.softmax(model(torch.from_numpy(images[:size])) / 2.0, dim=1).numpy()
        assert np.allclose(predictor.probabilities(images[:size]), expected, atol=5e-3)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "torch"])
def test_covariance_pooling_is_in_the_export(kind, tmp_path):
    model = make_model(pool="covariance")
    photos, images = make_photos(model)
    export(kind, tmp_path / "out", model=model, photos=photos)
    with torch.inference_mode():
        expected = torch.softmax(model(torch.from_numpy(images)) / 2.0, dim=1).numpy()
    assert np.allclose(Predictor.load(tmp_path / "out").probabilities(images), expected, atol=5e-3)


def test_names_and_preprocessing_are_inside_the_onnx_file(exported):
    import onnxruntime

    folder, _ = exported("onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    inside = json.loads(session.get_modelmeta().custom_metadata_map["fieldmark"])
    assert inside["classes"] == list(CLASSES)
    assert inside["temperature"] == 2.0
    assert inside["preprocessing"]["mean"] == [0.4, 0.5, 0.6]


def test_names_are_inside_the_torch_file(exported):
    inside = {"fieldmark.json": ""}
    torch.export.load(exported("torch")[0] / "model.pt2", extra_files=inside)
    assert json.loads(inside["fieldmark.json"])["classes"] == list(CLASSES)


@pytest.mark.slow
def test_names_are_inside_the_openvino_file(exported):
    import openvino

    model = openvino.Core().read_model(exported("openvino")[0] / "model.xml")
    assert json.loads(model.get_rt_info(["fieldmark"]).astype(str))["classes"] == list(CLASSES)


def test_timm_loads_its_form_with_label_names_and_the_same_logits_and_transform(exported):
    import timm

    model = make_model()
    _, images = make_photos(model, 4)
    folder, _ = exported("timm")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        inputs = torch.from_numpy(images)
        assert torch.allclose(loaded(inputs), model(inputs), atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    data = timm.data.resolve_model_data_config(loaded)
    assert (list(data["input_size"]), list(data["mean"]), data["crop_pct"]) == ([3, 64, 64], [0.4, 0.5, 0.6], 0.875)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_is_evaluated_on_photos_that_did_not_calibrate_it(kind, exported, tmp_path):
    written = export(kind, tmp_path / "out", is_int8=True, loss=0.5)
    evidence = written.evidence["int8"]
    assert (evidence["photos"], evidence["calibration_photos"]) == (12, 12)
    assert evidence["reference"] == 1.0
    assert written.precision == "int8"
    smaller = {"onnx": "model.onnx", "openvino": "model.bin"}[kind]
    folder, plain = exported(kind)
    assert plain.precision != "int8"
    assert (tmp_path / "out" / smaller).stat().st_size < (folder / smaller).stat().st_size


def test_a_model_that_disagrees_is_refused_with_numbers_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ExportedModel, "logits", lambda self, images: np.zeros((len(images), 3), np.float32))
    with pytest.raises(
        ExportError, match=r"disagrees with the run on 24 photos: logits differ by up to .*allowed 0.10%"
    ):
        export("torch", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_never_agree():
    reference = np.ones((2, 3))
    with pytest.raises(ExportError, match="disagrees"):
        require_parity(reference, np.full((2, 3), np.nan), limit=0.1)


def test_int8_that_loses_too_much_is_refused_with_both_accuracies():
    reference, quantized, labels = np.eye(4), np.eye(4)[[0, 1, 2, 2]], np.arange(4)
    kept = require_small_loss(reference, quantized, labels, limit=0.25)
    assert (kept["loss"], kept["worse"], kept["better"]) == (0.25, 1, 0)
    with pytest.raises(ExportError, match=r"loses 25.00 points of accuracy \(100.00% to 75.00% on 4 photos\)"):
        require_small_loss(reference, quantized, labels, limit=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "torch", "is_int8": True}, "int8 is made for onnx, openvino, web, not for torch"),
        ({"kind": "timm", "head": "mlp"}, "timm form holds a linear head only.*export --to onnx or torch"),
        ({"kind": "timm", "pool": "covariance"}, "cannot say that strides were moved"),
        ({"kind": "onnx", "is_int8": True, "count": 3}, "at least 4 labeled photos"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(settings, message, tmp_path):
    settings = dict(settings)
    model = make_model(settings.pop("head", "linear"), settings.pop("pool", "average"))
    photos = make_photos(model, settings.pop("count", 24))[0]
    with pytest.raises(ExportError, match=message):
        export(settings.pop("kind"), tmp_path / "out", model=model, photos=photos, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["onnx", pytest.param("openvino", marks=pytest.mark.slow), "torch", "timm"])
@pytest.mark.parametrize("room", [0, 20_000, 200_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(kind, room, tmp_path):
    resource = pytest.importorskip("resource", reason="not on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # what is written beyond it fails as on a full disk
    try:
        with pytest.raises(ResourceError, match=r"out could not be written: .*Free some space"):
            export(kind, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_written_into(tmp_path):
    with pytest.raises(ExportError, match="exists already"):
        export("torch", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not an exported model: it has no fieldmark.json"),
        ("{", "is not JSON"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ("[]", "has format 'list'"),
        ('{"format": 1, "kind": "onnx"}', "lacks architecture"),
    ],
)
def test_a_folder_that_is_no_export_says_so(content, message, tmp_path):
    if content is not None:
        (tmp_path / "fieldmark.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        ExportedModel.load(tmp_path, threads=1)


def test_an_incomplete_or_broken_export_says_so(tmp_path):
    (tmp_path / "fieldmark.json").write_text(make_metadata("torch").to_json())
    with pytest.raises(ExportError, match=r"has no model.pt2: the export is not complete"):
        ExportedModel.load(tmp_path, threads=1)
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(ExportError, match="cannot be loaded"):
        ExportedModel.load(tmp_path, threads=1)


def test_the_card_says_license_limits_and_evidence_and_hostile_names_stay_text():
    data = {"counts": {"10": {"train": 5, "val": 1}, "2": {"train": 3}}, "fingerprint": "abc"}
    summary = {"status": "finished", "val": {"top1": 0.9, "top1_interval": [0.85, 0.94]}}
    card = write_card(make_metadata("onnx"), data=data, summary=summary, calibration=None, recipe="a = '```'")
    assert "| top-1 accuracy | 0.9000 (95 % interval 0.8500 to 0.9400) |" in card
    assert "pre-trained on: ImageNet-1k" in card
    assert "forbids commercial use" in card
    assert "8 train, 1 val" in card
    assert "<b>" not in card
    assert "````toml" in card
    assert '"unknown" below a probability of 0.400' in card


@pytest.mark.parametrize("transform", ["weights", "squash"])
@pytest.mark.parametrize("shape", [(90, 131), (131, 90), (64, 64)])
def test_the_lines_on_the_card_answer_without_fieldmark_as_it_does(
    transform, shape, exported, tmp_path, monkeypatch, capsys
):
    folder, written = exported("onnx")
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    written = replace(written, preprocessing=replace(SPEC, transform=transform))
    Path("fieldmark.json").write_text(written.to_json())
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(noise).save("photo.jpg", "PNG")
    card = write_card(written, data={}, summary={}, calibration=None, recipe="")
    exec(re.findall("```python\n(.*?)```", card, flags=re.DOTALL)[-1], {})
    answer = Predictor.load(Path())("photo.jpg")
    name, share, is_unknown = capsys.readouterr().out.rsplit(maxsplit=2)
    assert (name, is_unknown) == (answer.label, str(answer.is_unknown))
    assert float(share) == pytest.approx(answer.probability, abs=1e-5)


def test_the_card_has_calibrated_figures_and_nothing_of_the_machine():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(0, 1, (200, 3)) + 2 * np.eye(3)[labels]
    found = calibrate(logits, labels, wanted="coverage", wanted_value=0.8, confidence_level=0.0, folds=2, seed=0)
    recipe = '[data]\npath = "/home/ada/photos/birds"\ncorrections = "../mine.csv"\nbroken = "refuse"\n'
    summary = {"val": {"top1": 0.9, "log_loss": 0.5}}
    card = write_card(make_metadata("onnx"), data={}, summary=summary, calibration=found, recipe=recipe)
    assert f"| log loss, calibrated | {found.log_loss_after:.4f} |" in card
    assert "| photos that are answered | 80.0% |" in card
    assert 'path = "birds"\ncorrections = "mine.csv"\nbroken = "refuse"' in card
    assert "ada" not in card


def test_the_front_matter_of_the_card_is_what_the_hub_reads():
    """The hub's own parser finds license, library and results; "top-5" of three classes says nothing."""
    summary = {"val": {"top1": 0.9, "top1_interval": [0.85, 0.94], "top5": 1.0, "log_loss": 0.5, "prior_top1": 0.8}}
    metadata = replace(make_metadata("onnx"), run='a: "b"')
    counts = {"a": {"train": 5, "val": 7}}
    data = ModelCard(write_card(metadata, data={"counts": counts}, summary=summary, calibration=None, recipe="")).data
    assert (data.license, data.library_name, data.metrics) == ("cc-by-nc-4.0", "fieldmark", ["accuracy"])
    assert data.model_name == 'a: "b"'
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {("accuracy", "top-1 accuracy"): 0.9, ("log_loss", "log loss (nats)"): 0.5}
    assert {one.dataset_name for one in data.eval_results} == {f"7 validation photos of {len(CLASSES)} classes"}
    empty = write_card(metadata, data={}, summary={}, calibration=None, recipe="")
    assert ModelCard(empty).data.eval_results is None


def test_an_export_is_uploaded_to_a_private_repository_or_the_way_on_is_said(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda name, **_: asked.append((name, _)) or f"hub/{name}")
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: asked.append(options))
    assert push_export(tmp_path, "ada/birds") == "hub/ada/birds"
    assert asked == [
        ("ada/birds", {"private": True, "exist_ok": True}),
        {"repo_id": "ada/birds", "folder_path": tmp_path},
    ]

    def refuse(*_, **__):
        raise OSError("401: no token.\nmore")

    monkeypatch.setattr("huggingface_hub.create_repo", refuse)
    with pytest.raises(ExportError, match=r"could not be uploaded to ada/birds: 401: no token. Log in with"):
        push_export(tmp_path, "ada/birds")


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ({"int8": {"loss": 0.02}}, "80.00% after, a loss of 2.00 points (a loss of 1.00 was allowed)"),
        ({"int8": {"loss": -0.02}}, "80.00% after, a gain of 2.00 points"),
        ({"int8": {"loss": 0.0}}, "80.00% after, no loss"),
        ({"parity": {"largest_difference": 0.0, "photos": 9}}, "On 9 validation photos the logits are the same to the"),
    ],
)
def test_the_evidence_reads_as_what_was_found(evidence, words):
    usual = {"calibration_photos": 50, "photos": 50, "reference": 0.8, "quantized": 0.8, "limit": 0.01}
    rows = {kind: {**usual, "worse": 1, "better": 1, **row} for kind, row in evidence.items()}
    assert words in evidence_text(rows)


def _read(text, folder):
    (folder / "fieldmark.json").write_text(text)
    return ModelMetadata.load(folder)


def test_an_export_carries_the_groups_and_one_from_before_there_were_any_is_read(tmp_path):
    rows = tuple((name, "bird") for name in CLASSES)
    scores = (LevelScore("class", 0.5, 1.0), LevelScore("kind", 0.5, None))
    groups = Fallback(("class", "kind"), rows, (0.4, 0.9), scores)
    metadata = replace(make_metadata("onnx"), back_off=groups)
    assert _read(metadata.to_json(), tmp_path).back_off == groups
    card = write_card(metadata, data={}, summary={}, calibration=None, recipe="")
    assert "then the finest of kind that is sure" in card
    old = json.loads(make_metadata("onnx").to_json())
    del old["back_off"]
    assert _read(json.dumps(old), tmp_path).back_off is None
