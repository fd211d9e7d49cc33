"""The Predictor: every kind of source is answered alike, as `evaluate` answered, in bounded memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.errors import DataError, PhotoError, RunError
from fieldmark.inference.evaluation import evaluate_run
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.progress import Quiet
from fieldmark.runs.folder import Run
from fieldmark.runs.train import train

SETTINGS = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "eval.batch_size=8"),
    *("train.epochs=1", "schedule.warmup_epochs=0", "optim.lr=1e-2", "optim.backbone_lr_scale=1"),
    *("cache.mode=off", "loader.workers=0", "train.threads=1", "train.device=cpu"),
    "train.precision=32-true",  # the laws below are about pictures, not about the rounding of bf16
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_photos) -> Run:
    root = tmp_path_factory.mktemp("predictor")
    write_photos(root / "photos", ("a", "b", "c"), count=8, width=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        list(train(load_config(None, [*SETTINGS, f'data.path="{root / "photos"}"']), root / "run"))
    return Run(root / "run")


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor.load(run)


@pytest.fixture
def files(run):
    return run.split.files()


def test_every_kind_of_source_gets_the_same_answer(predictor, files):
    file = files[3]
    with Image.open(file) as image:
        sources = [file, str(file), file.read_bytes(), image, np.asarray(image)]
        answers = [predictor(source) for source in sources]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.probabilities, answers[0].probabilities)
    assert [answer.path for answer in answers] == [str(file), str(file), "", "", ""]


def test_a_folder_an_iterator_and_single_questions_agree(predictor, run, files):
    from_folder = list(predictor.predict(run.split.root))
    from_iterator = list(predictor.predict(iter(files)))
    assert [answer.path for answer in from_folder] == [photo.path for photo in run.split.photos]
    for one, other, file in zip(from_folder, from_iterator, files, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
        np.testing.assert_allclose(one.probabilities, predictor(file).probabilities, atol=1e-6)


def test_an_upright_photo_and_its_turned_copy_with_exif_agree(predictor, tmp_path, files):
    with Image.open(files[0]) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright = predictor(files[0]).probabilities
    np.testing.assert_array_equal(predictor(tmp_path / "turned.png").probabilities, upright)
    with Image.open(tmp_path / "turned.png") as turned:
        np.testing.assert_array_equal(predictor(turned).probabilities, upright)
        assert turned.size == (40, 60)  # the caller's image is as it was


def test_top_is_sorted_and_ends_with_the_classes(predictor, files):
    answer = predictor(files[0])
    top = answer.top(10)
    assert [name for name, _ in top[:1]] == [answer.label]
    assert [probability for _, probability in top] == sorted((p for _, p in top), reverse=True)
    assert sum(probability for _, probability in top) == pytest.approx(1)
    assert {name for name, _ in top} == {"a", "b", "c"}
    assert answer.top(2) == top[:2]


def test_equals_are_ranked_in_class_order():
    tied = Prediction("x", ("a", "b", "c"), np.array([0.2, 0.4, 0.4], np.float32), "")
    assert tied.label == "b"
    assert [name for name, _ in tied.top(3)] == ["b", "c", "a"]


def test_a_photo_that_cannot_be_read_keeps_its_place(predictor, files, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a photo")
    answers = list(predictor.predict([files[0], broken, files[1]]))
    assert [answer.problem for answer in answers] == ["", "is not an image", ""]
    assert (answers[1].label, answers[1].top(3), answers[1].is_unknown) == ("", [], True)
    assert np.isnan(answers[1].probabilities).all()
    # The others are what they would have been: at the places of the same batch, so to the bit.
    alone = list(predictor.predict([files[0], files[2], files[1]]))
    np.testing.assert_array_equal(answers[2].probabilities, alone[2].probabilities)
    with pytest.raises(PhotoError, match=r"broken.jpg: is not an image"):
        predictor(broken)


def test_an_iterator_is_read_no_further_than_a_batch_ahead(predictor, files):
    read = []

    def endless():
        while True:
            read.append(1)
            yield files[0]

    answers = predictor.predict(endless())
    for _ in range(9):
        next(answers)
    assert len(read) == 16  # two batches of eight


def test_flips_average_a_photo_and_its_mirror_image(run):
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    mirrored = np.ascontiguousarray(images[..., ::-1])
    plain, flipping = Predictor.load(run), Predictor.load(run, flips=True)
    np.testing.assert_allclose(flipping.probabilities(images), flipping.probabilities(mirrored), rtol=1e-5)
    pair = np.log(plain.probabilities(images)) + np.log(plain.probabilities(mirrored))
    expected = np.exp(pair / 2) / np.exp(pair / 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(flipping.probabilities(images), expected, rtol=1e-4)


def test_an_evaluation_with_flips_says_what_they_change_and_stores_none_of_it(run):
    stored = (run.path / "predictions" / "val.parquet").read_bytes()
    scores = evaluate_run(run.path, split="val", data=None, flips=True, progress=Quiet())
    plain = evaluate_run(run.path, split="val", data=None, flips=False, progress=Quiet())
    validation = [place for place, photo in enumerate(run.split.photos) if photo.split == "val"]
    answers = list(Predictor.load(run, flips=True).predict([run.split.files()[place] for place in validation]))
    truth = [run.classes[run.split.label_numbers()[place]] for place in validation]
    assert scores.metrics["top1"] == np.mean([found.label == true for found, true in zip(answers, truth, strict=True)])
    assert scores.flips.interval.estimate == pytest.approx(scores.metrics["top1"] - plain.metrics["top1"])
    assert f"{100 * scores.flips.interval.estimate:+.1f}" in repr(scores)
    assert scores.as_dict()["flips"]["num_photos"] == len(validation)
    assert (run.path / "predictions" / "val.parquet").read_bytes() == stored
    assert plain.flips is None
    assert "flips" not in plain.as_dict()


def test_threads_get_the_answers_of_one(predictor, files):
    expected = [predictor(file).probabilities for file in files[:8]]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(predictor, files[:8]))
    for answer, probabilities in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.probabilities, probabilities)


def test_a_calibrated_run_answers_with_its_temperature_and_threshold(run, files, tmp_path):
    from fieldmark.inference.calibration import calibrate_run

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    found = calibrate_run(Run(copy), wanted="none", wanted_value=1.0, confidence_level=0.0, folds=2, seed=0)
    # Few photos may well refuse a temperature: here one is needed.
    found = replace(found, temperature=1.7)
    (copy / "calibration.json").write_text(json.dumps(asdict(found)))
    plain, calibrated = Predictor.load(run)(files[0]).probabilities, Predictor.load(copy)(files[0]).probabilities
    sharpened = plain.astype(np.float64) ** (1 / found.temperature)
    np.testing.assert_allclose(calibrated, sharpened / sharpened.sum(), rtol=1e-4)


def test_what_is_no_photo_is_told(predictor):
    with pytest.raises(DataError, match=r"a photo is a path, bytes, a Pillow image or .* got int"):
        predictor(7)
    with pytest.raises(DataError, match=r"uint8"):
        predictor(np.zeros((4, 4), np.float32))


def test_a_run_without_weights_says_how_to_get_them(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "best.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no weights yet .*`fieldmark train --resume"):
        Predictor.load(copy)


def test_arrays_and_data_frames_hold_the_predictions(predictor, files, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a photo")
    sources = [*files[:9], broken]
    answers = list(predictor.predict(sources))
    table, frame = predictor.predict_proba(sources), predictor.to_pandas(sources)
    np.testing.assert_array_equal(table, [answer.probabilities for answer in answers])
    assert list(frame.columns) == ["path", "pred_label", "probability", "is_unknown", "problem", "p:a", "p:b", "p:c"]
    np.testing.assert_array_equal(frame[["p:a", "p:b", "p:c"]], table)
    assert list(frame["pred_label"][:9]) == [answer.label for answer in answers[:9]]
    assert frame["problem"][9] == "is not an image"
    assert predictor.predict_proba([]).shape == (0, 3)


def test_a_model_whose_output_is_not_finite_has_no_answer_and_says_why(run, files, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    weights = load_file(copy / "best.safetensors")
    weights["head.bias"][0] = float("nan")
    save_file(weights, copy / "best.safetensors")
    (answer,) = Predictor.load(copy).predict(files[:1])
    assert (answer.label, answer.is_unknown, answer.answer.name) == ("", True, "")
    assert "output is not finite, its weights may be damaged" in answer.problem
    with pytest.raises(RunError, match="are not finite, so the weights"):
        evaluate_run(copy, split="val", data=run.split.root, flips=False, progress=Quiet())


def test_predicting_imports_nothing_that_only_training_needs(run, files):
    """Fabric, compiled augmentation and statistics took three of the five seconds of a prediction."""
    code = (
        "import sys; from fieldmark.inference.predictor import Predictor\n"
        "print(Predictor.load(sys.argv[1])(sys.argv[2]).label)\n"
        "print({'lightning_fabric', 'numba', 'scipy.stats', 'scipy.optimize', 'sklearn'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path), str(files[0])], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["set()"], done.stdout + done.stderr


def test_answers_say_what_they_are_in_a_terminal_and_in_a_notebook(predictor, run, tmp_path):
    """One line each; a notebook gets the photo, if it is on this machine, and a bar for each class, as text."""
    first = next(predictor.predict(run.data_info["root"]))
    assert repr(first).startswith("Prediction('a/0.png': ")
    assert "%, " in repr(first)
    assert "array" not in repr(first)
    page = first._repr_html_()
    assert 'src="data:image/jpeg;base64,' in page
    assert all(f">{name}<" in page for name in "abc")
    assert f"{100 * first.probability:.1f} %" in page
    (tmp_path / "<b>.png").write_bytes(b"no photo")
    (broken,) = predictor.predict([tmp_path / "<b>.png"])
    assert broken.problem in repr(broken)
    assert "&lt;b&gt;.png" in broken._repr_html_()
    assert "<img" not in broken._repr_html_()
    assert repr(replace(first, threshold=1.0)).endswith("(too unsure to count))")
    assert ">Unknown<" in replace(first, threshold=1.0)._repr_html_()
