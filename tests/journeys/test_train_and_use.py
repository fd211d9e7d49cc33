"""From a folder to a prediction file, by the real command line."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark.inference.predictor import Predictor
from fieldmark.runs.folder import Run


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_predicting_the_validation_photos_reproduces_the_logged_accuracy_exactly(trained, photos):
    run = Run(trained)
    val = run.split.of("val")
    before = torch.get_num_threads()
    torch.set_num_threads(run.config.train.threads)  # sums of other parts round otherwise
    try:
        answers = list(Predictor.load(run).predict(val.files()))
    finally:
        torch.set_num_threads(before)
    right = np.mean([answer.label == photo.label for answer, photo in zip(answers, val.photos, strict=True)])
    assert right == run.metrics[-1]["val"]["top1"] == run.summary["val"]["top1"]
    stored = run.predictions("val")
    assert stored.paths == tuple(photo.path for photo in val.photos)
    np.testing.assert_array_equal([answer.probabilities for answer in answers], stored.probabilities)


def test_the_run_folder_alone_predicts(fieldmark, trained, photos, tmp_path):
    """Moved elsewhere, with the original photos gone."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    data = json.loads((moved / "data.json").read_text())
    (moved / "data.json").write_text(json.dumps(data | {"root": "/gone"}))
    new = tmp_path / "new photos"
    shutil.copytree(photos / "2", new)
    here = fieldmark("predict", moved, new, "--out", tmp_path / "here.csv", "--form", "long")
    there = fieldmark("predict", trained, new, "--out", tmp_path / "there.csv", "--form", "long")
    assert (here.code, there.code) == (0, 0)
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()
    assert fieldmark("evaluate", moved).code == 0


def test_a_broken_photo_keeps_its_row_and_shifts_no_other(fieldmark, trained, photos, tmp_path):
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    shutil.copytree(photos / "2", clean)
    shutil.copytree(photos / "2", dirty)
    (dirty / "5.png").write_bytes((photos / "2" / "5.png").read_bytes()[:200])
    assert fieldmark("predict", trained, clean, "--out", tmp_path / "clean.csv", "--form", "leaderboard").code == 0
    result = fieldmark("predict", trained, dirty, "--out", tmp_path / "dirty.zip")
    assert result.code == 2
    assert "1 of 12 photos could not be read" in result.err
    assert "'5.png'" in result.err
    with zipfile.ZipFile(tmp_path / "dirty.zip") as archive:
        rows = list(csv.reader(archive.read("prediction.csv").decode().splitlines()))
    expected = read_csv(tmp_path / "clean.csv")
    assert [row[0] for row in rows] == ["image_name", *map(str, range(12))]
    assert rows == [[name, "" if name == "5" else label] for name, label in expected]


def test_a_prediction_file_is_for_people_unless_a_leaderboard_is_meant(fieldmark, trained, photos, tmp_path):
    assert fieldmark("predict", trained, photos / "2", "--out", tmp_path / "p.csv").code == 0
    header, *rows = read_csv(tmp_path / "p.csv")
    assert header[:5] == ["path", "label", "probability", "label_2", "probability_2"]
    assert [row[0] for row in rows] == [f"{n}.png" for n in range(12)]
    predictor = Predictor.load(trained)
    assert [row[1] for row in rows] == [found.label for found in predictor.predict(photos / "2")]
    table = predictor.predict_proba(photos / "2")
    assert [f"{probability:.4f}" for probability in table.max(axis=1)] == [row[2] for row in rows]


def test_a_correction_for_other_class_shares_is_asked_for_and_said(fieldmark, trained, photos, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    out = tmp_path / "p.csv"
    refused = fieldmark("predict", run, photos / "2", "--out", out, "--prior", "estimate")
    assert (refused.code, "is not calibrated" in refused.err) == (2, True)
    assert fieldmark("calibrate", run).code == 0
    assert fieldmark("predict", run, photos / "2", "--out", tmp_path / "plain.csv").code == 0
    done = fieldmark("predict", run, photos / "2", "--out", out, "--prior", "estimate", "--json")
    said = json.loads(done.out)["prior"]
    assert list(said) == ["2", "10", "great, tit"]
    assert said["2"]["assumed"] > said["2"]["training"] == Run(run).prior[0]
    assert "12 photos were corrected by --prior for the shares of the classes" in done.err
    assert json.loads((tmp_path / "p.csv.prior.json").read_text())["shares"] == said
    plain, corrected = (read_csv(tmp_path / name)[1:] for name in ("plain.csv", "p.csv"))
    assert [row[0] for row in plain] == [row[0] for row in corrected]
    assert all(float(now[2]) >= float(before[2]) for before, now in zip(plain, corrected, strict=True) if now[1] == "2")
    assert not (tmp_path / "plain.csv.prior.json").exists()
    even = fieldmark("predict", run, photos / "2", "--out", out, "--prior", "uniform", "--json")
    assert [share["assumed"] for share in json.loads(even.out)["prior"].values()] == [1 / 3] * 3
    assert json.loads((tmp_path / "p.csv.prior.json").read_text())["prior"] == "uniform"


def test_every_file_that_looks_like_a_photo_has_a_row_and_the_rest_is_named(fieldmark, trained, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(photos / "2" / "0.png", folder / "a.png")
    (folder / "b.CR2").write_bytes(b"II*\0" + bytes(200))
    (folder / "notes.txt").write_text("x")
    done = fieldmark("predict", trained, folder, "--out", tmp_path / "p.csv")
    assert done.code == 2
    assert [row[0] for row in read_csv(tmp_path / "p.csv")[1:]] == ["a.png", "b.CR2"]
    assert "'b.CR2' is a camera's raw file" in done.err
    assert f"skipped in {folder}: " in done.err


def test_a_list_may_call_its_column_otherwise(fieldmark, trained, photos, tmp_path):
    (tmp_path / "list.csv").write_text("file;site\n" + f"{photos / '2' / '0.png'};a\n")
    refused = fieldmark("predict", trained, tmp_path / "list.csv")
    assert (refused.code, "it has 'file', 'site'" in refused.err, "--path-column" in refused.err) == (2, True, True)
    found = fieldmark("predict", trained, tmp_path / "list.csv", "--path-column", "file", "--json")
    assert json.loads(found.out)[0]["path"] == str(photos / "2" / "0.png")


def test_evaluate_refuses_a_file_as_its_folder_before_it_works(fieldmark, trained, tmp_path):
    (tmp_path / "file.json").write_text("mine")
    refused = fieldmark("evaluate", trained, "--out", tmp_path / "file.json")
    assert (refused.code, "Give another folder as --out" in refused.err) == (2, True)
    assert (tmp_path / "file.json").read_text() == "mine"


def test_labels_are_the_folders_names(trained):
    assert Run(trained).classes == ("2", "10", "great, tit")


def test_rows_are_held_against_a_sample(fieldmark, trained, photos, tmp_path):
    sample = tmp_path / "sample.csv"
    sample.write_text("image_name,pred_label\n" + "".join(f"{n},2\n" for n in reversed(range(12))))
    arguments = ("predict", trained, photos / "2", "--out", tmp_path / "p.csv", "--sample", sample)
    refused = fieldmark(*arguments)
    assert refused.code == 2
    assert "row 1 should be '11' and is '0'" in refused.err
    assert not (tmp_path / "p.csv").exists()
    assert fieldmark(*arguments, "--sample-order").code == 0
    assert [row[0] for row in read_csv(tmp_path / "p.csv")[1:]] == [str(n) for n in reversed(range(12))]


def test_evaluate_tells_the_same_to_people_and_machines(fieldmark, trained):
    people, machines = fieldmark("evaluate", trained), fieldmark("evaluate", trained, "--json")
    scores = json.loads(machines.out)
    assert scores["metrics"]["top1"] == Run(trained).summary["val"]["top1"]
    assert f"top-1 accuracy                      {scores['metrics']['top1']:.4f}" in people.out
    names = {path.name for path in (trained / "evaluation" / "val").iterdir()}
    assert names == {"evaluation.json", "classes.csv", "confusion.csv", "confusion.png"}


def test_evaluating_photos_anew_gives_what_training_stored(fieldmark, trained, photos):
    stored = json.loads(fieldmark("evaluate", trained, "--json").out)
    anew = json.loads(fieldmark("evaluate", trained, "--data", photos, "--json").out)
    assert anew == stored


def test_one_photo_is_answered_on_stdout(fieldmark, trained, photos):
    result = fieldmark("predict", trained, photos / "2" / "0.png")
    assert (result.code, len(result.out.splitlines())) == (0, 3)
    answers = json.loads(fieldmark("predict", trained, photos / "2" / "0.png", "--json").out)
    assert answers[0]["path"] == "0.png"
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_results_go_to_stdout_and_progress_to_stderr(fieldmark, photos, tiny, tmp_path):
    result = fieldmark(
        "train", photos, "--recipe", "laptop", "--out", tmp_path / "run", "--json", *tiny("train.epochs=1")
    )
    assert json.loads(result.out)["status"] == "finished"
    assert "epoch   1  loss" in result.err
    assert "probe" in result.err


def test_a_finished_run_is_not_resumed_and_a_full_folder_not_overwritten(fieldmark, trained, photos, tiny):
    resumed = fieldmark("train", "--resume", trained)
    assert (resumed.code, resumed.err) == (2, f"error: {trained} is finished: there is nothing to resume\n")
    again = fieldmark("train", photos, "--recipe", "laptop", "--out", trained, *tiny())
    assert again.code == 2
    assert "exists and is not empty" in again.err


def test_preview_draws_and_warns(fieldmark, photos, tiny, tmp_path):
    result = fieldmark("preview", "competition", photos, "--out", tmp_path / "p.png", *tiny("probe.epochs=0"))
    assert result.code == 0
    assert "never zooms out" in result.out
    assert (tmp_path / "p.png").stat().st_size > 50_000


@pytest.mark.parametrize("cutmix_share", [0, 0.5, 1])
def test_a_preview_has_no_gap_where_a_method_is_not_used(fieldmark, photos, tiny, tmp_path, cutmix_share):
    settings = tiny("probe.epochs=0", "mix.share=0.3", f"mix.cutmix_share={cutmix_share}")
    result = fieldmark("preview", "laptop", photos, "--out", tmp_path / "p.png", *settings)
    assert result.code == 0
    rows = (np.asarray(Image.open(tmp_path / "p.png").convert("L")) < 250).any(axis=1)
    inked = np.flatnonzero(rows)
    assert np.diff(inked).max() < 0.06 * len(rows)


def test_split_is_written_and_trained_from(fieldmark, photos, tiny, tmp_path):
    table = tmp_path / "split.csv"
    assert fieldmark("split", photos, "--out", table, *tiny()).out.splitlines()[0] == "2: 10 train, 2 val"
    header, *rows = read_csv(table)
    assert header == ["path", "label", "split", "group"]
    assert len(rows) == 36
