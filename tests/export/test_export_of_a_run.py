"""Laws of exporting a run: what is proven is what answers; where the run answers otherwise, the card says how far."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tests.inference.test_predictor import run  # noqa: F401, a fixture

import fieldmark
from fieldmark.inference.predictor import Predictor
from fieldmark.runs.folder import Run
from fieldmark.training.evaluate import Device

OPTIONS = {"to": "timm", "is_int8": False, "max_accuracy_loss": 0.01, "max_photos": 6}


def test_an_export_of_a_run_that_answers_in_32_bit_answers_the_same(run, tmp_path):  # noqa: F811
    written = fieldmark.export_run(run, tmp_path / "export", **OPTIONS)
    assert set(written.evidence) == {"parity"}
    files = run.split.files()[:8]
    ours, theirs = (Predictor.load(model).predict_proba(files) for model in (run, tmp_path / "export"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_card_says_how_far_the_answers_of_a_run_in_bf16_are(run, tmp_path, monkeypatch):  # noqa: F811
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    info = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(info | {"precision": "bf16-mixed"}))
    # As on a processor with bf16; others emulate it.
    monkeypatch.setattr(Device, "choose", classmethod(lambda cls, precision: cls(torch.device("cpu"), precision)))
    written = fieldmark.export_run(Run(copy), tmp_path / "export", **OPTIONS)
    gap = written.evidence["predict"]
    assert gap["precision"] == "bf16-mixed"
    val = [file for file, photo in zip(run.split.files(), run.split.photos, strict=True) if photo.split == "val"][:6]
    ours, theirs = (Predictor.load(model).predict_proba(val) for model in (copy, tmp_path / "export"))
    assert gap["photos"] == len(val)
    assert gap["largest_difference"] == pytest.approx(np.abs(ours - theirs).max(), abs=1e-6)
    assert gap["largest_difference"] > 0
    assert gap["same_answer"] == np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        f"answers in bf16-mixed on the machine that exported it: `fieldmark predict` names {gap['same_answer']:.1%}"
        in card
    )


def test_a_run_answers_in_bf16_only_where_the_processor_computes_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machines = [
        ("x86_64", True, True, "bf16-mixed"),
        ("x86_64", False, False, "32-true"),
        ("AMD64", True, False, "32-true"),  # oneDNN emulates it by plain AVX-512: half as fast as 32 bit
        ("aarch64", True, False, "bf16-mixed"),
    ]
    for machine, is_supported, has_avx512_bf16, wanted in machines:
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=is_supported: answer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=has_avx512_bf16: answer)
        assert Device.choose("bf16-mixed").precision == wanted
        assert Device.choose("16-mixed").precision == "32-true"
        assert Device.choose("32-true").precision == "32-true"
