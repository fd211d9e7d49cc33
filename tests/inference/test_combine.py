"""Runs combined: an ensemble answers with the mean of its members, a soup is one run that is no worse."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import fieldmark
from fieldmark.config import load_config
from fieldmark.errors import ConfigError, ExportError, PredictionError, RunError
from fieldmark.inference.calibration import calibrate_run
from fieldmark.inference.combine import combine, format_combined
from fieldmark.inference.evaluation import evaluate, evaluate_run
from fieldmark.inference.predict import _training_prior
from fieldmark.inference.predictor import Predictor
from fieldmark.runs.folder import Run
from fieldmark.runs.train import train
from fieldmark.study.compare import compare_runs

SETTINGS = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "eval.batch_size=8"),
    *("train.epochs=2", "schedule.warmup_epochs=0", "optim.lr=1e-2", "optim.backbone_lr_scale=1"),
    *("cache.mode=off", "loader.workers=0", "train.threads=1", "train.device=cpu", "train.precision=32-true"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_photos):
    root = tmp_path_factory.mktemp("combine")
    write_photos(root / "photos", ("a", "b", "c"), step=40, noise=60, width=60)
    return root


@pytest.fixture(scope="module")
def make(root):
    def make(name: str, *overrides: str) -> Run:
        list(train(load_config(None, [*SETTINGS, f'data.path="{root / "photos"}"', *overrides]), root / name))
        return Run(root / name)

    return make


@pytest.fixture(scope="module")
def first(make) -> Run:
    return make("first")


@pytest.fixture(scope="module")
def second(make) -> Run:
    """Another seed, and another look at the photos."""
    run = make("second", "train.seed=1", "eval.transform=squash", "eval.size=48")
    found = calibrate_run(run, wanted="none", wanted_value=1.0, confidence_level=0.0, folds=2, seed=0)
    # Few photos may well refuse a temperature: here one is needed.
    (run.path / "calibration.json").write_text(json.dumps(asdict(found) | {"temperature": 1.7}))
    return run


@pytest.fixture(scope="module")
def sibling(first, root) -> Run:
    """The first run, a step aside."""
    copy = root / "sibling"
    shutil.copytree(first.path, copy)
    rng = np.random.default_rng(0)
    weights = load_file(copy / "best.safetensors")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and "running" not in name:
            tensor += 0.05 * tensor.std(unbiased=False) * float(rng.normal())
    save_file(weights, copy / "best.safetensors")
    evaluate(Run(copy))
    return Run(copy)


@pytest.fixture(scope="module")
def ensemble(first, second, root) -> Run:
    return combine([first, second], root / "ensemble")


@pytest.fixture
def files(first):
    return first.split.files()


def permuted(run: Run, path, order) -> Run:
    """The same run as if its classes had been numbered in another order."""
    shutil.copytree(run.path, path)
    (path / "classes.json").write_text(json.dumps([run.classes[number] for number in order]))
    weights = load_file(path / "best.safetensors")
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name][list(order)].contiguous()
    save_file(weights, path / "best.safetensors")
    return Run(path)


def without(folder) -> list:
    return sorted(path.name for path in folder.iterdir())


def test_an_ensemble_answers_with_the_mean_of_its_members_calibrated_probabilities(ensemble, first, second, files):
    members = [list(Predictor.load(run).predict(files)) for run in (first, second)]
    answers = list(Predictor.load(ensemble).predict(files))
    assert Predictor.load(second).temperature != 1
    for answer, one, other in zip(answers, *members, strict=True):
        np.testing.assert_allclose(answer.probabilities, (one.probabilities + other.probabilities) / 2, atol=1e-6)
        assert answer.probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert len({answer.probabilities.tobytes() for answer in answers}) > 20


def test_flips_are_averaged_within_each_member(ensemble, first, second, files):
    members = [Predictor.load(run, flips=True)(files[0]).probabilities for run in (first, second)]
    answer = Predictor.load(ensemble, flips=True)(files[0]).probabilities
    np.testing.assert_allclose(answer, np.mean(members, axis=0), atol=1e-6)


def test_members_whose_classes_are_numbered_otherwise_are_aligned_by_name(first, second, files, tmp_path):
    turned = permuted(second, tmp_path / "turned", (2, 0, 1))
    straight = combine([first, second], tmp_path / "straight")
    mixed = combine([first, turned], tmp_path / "mixed")
    assert turned.classes == ("c", "a", "b")
    assert mixed.classes == straight.classes == ("a", "b", "c")
    np.testing.assert_array_equal(mixed.predictions().probabilities, straight.predictions().probabilities)
    np.testing.assert_array_equal(mixed.predictions().labels, straight.predictions().labels)
    predictors = Predictor.load(mixed), Predictor.load(straight)
    one, other = (predictor(files[0]).probabilities for predictor in predictors)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_predicting_the_validation_photos_gives_the_ensembles_own_figures_exactly(ensemble, tmp_path):
    val = ensemble.split.of("val")
    answers = list(Predictor.load(ensemble).predict(val.files()))
    right = np.mean([answer.label == photo.label for answer, photo in zip(answers, val.photos, strict=True)])
    assert right == ensemble.summary["val"]["top1"]
    low, high = ensemble.summary["val"]["top1_interval"]
    assert low <= right <= high
    stored = ensemble.predictions("val")
    copy = tmp_path / "copy"
    shutil.copytree(ensemble.path, copy)
    anew = evaluate(copy)
    np.testing.assert_array_equal(anew.predictions.probabilities, stored.probabilities)
    assert anew.metrics == {name: ensemble.summary["val"][name] for name in anew.metrics}
    assert evaluate(copy, split="train").metrics["top1"] >= 0


def test_every_kind_of_source_gets_the_ensembles_answer_from_any_thread(ensemble, files):
    predictor = Predictor.load(ensemble)
    with Image.open(files[3]) as image:
        sources = [files[3], str(files[3]), files[3].read_bytes(), image, np.asarray(image)]
        answers = [predictor(source).probabilities for source in sources]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])
    from_folder = list(predictor.predict(files[0].parents[1]))
    assert len(from_folder) == 30
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(predictor, files[:8]))
    for answer, file in zip(threaded, files, strict=False):
        np.testing.assert_array_equal(answer.probabilities, predictor(file).probabilities)


def test_a_photo_that_cannot_be_read_keeps_its_place_in_an_ensemble(ensemble, files, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a photo")
    answers = list(Predictor.load(ensemble).predict([files[0], broken, files[1]]))
    assert [answer.label != "" for answer in answers] == [True, False, True]
    assert np.isnan(answers[1].probabilities).all()


@pytest.mark.parametrize("method", ["ensemble", "soup"])
def test_what_was_combined_predicts_when_moved_with_its_members_and_photos_gone(method, first, sibling, root, tmp_path):
    photos, copies = tmp_path / "photos", [tmp_path / "one", tmp_path / "two"]
    shutil.copytree(root / "photos", photos)
    for run, copy in zip((first, sibling), copies, strict=True):
        shutil.copytree(run.path, copy)
        (copy / "data.json").write_text(json.dumps(run.data_info | {"root": str(photos)}))
    made = combine(copies, tmp_path / "made", method=method)
    expected = Predictor.load(made)(root / "photos" / "a" / "0.png").probabilities
    for path in (photos, *copies):
        shutil.rmtree(path)
    (tmp_path / "made").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    np.testing.assert_array_equal(Predictor.load(moved)(root / "photos" / "a" / "0.png").probabilities, expected)
    quiet = fieldmark.progress.Quiet()
    found = evaluate_run(moved, split="val", data=None, flips=False, progress=quiet)
    assert len(found.predictions.labels) == len(Run(moved).split.of("val"))


def test_members_of_which_some_are_calibrated_are_warned_of(ensemble, first, tmp_path):
    assert "warning: first not calibrated, but the others are" in format_combined(ensemble)
    copy = tmp_path / "third"
    shutil.copytree(first.path, copy)
    assert "warning" not in format_combined(combine([first.path, copy], tmp_path / "both"))


def test_an_ensemble_can_be_calibrated_and_then_says_unknown(ensemble, files, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ensemble.path, copy)
    found = calibrate_run(Run(copy), wanted="coverage", wanted_value=0.5, confidence_level=0.0, folds=2, seed=0)
    predictor = Predictor.load(copy)
    assert (predictor.temperature, predictor.threshold) == (found.temperature, found.threshold)
    plain = Predictor.load(ensemble)(files[0]).probabilities.astype(np.float64) ** (1 / found.temperature)
    np.testing.assert_allclose(predictor(files[0]).probabilities, plain / plain.sum(), rtol=1e-4)


def test_an_ensemble_is_served_without_attention_and_sees_what_its_widest_member_sees(ensemble, files):
    from fieldmark.serve.service import ServedModel

    served = ServedModel(ensemble.path)
    prepared = served.prepare(files[0].read_bytes(), max_pixels=10_000)
    assert prepared.box == (0.0, 0.0, 1.0, 1.0)  # the second member's squash
    assert not served.has_attention
    answer = served.probabilities(np.stack([prepared.picture]))[0]
    np.testing.assert_array_equal(answer, Predictor.load(ensemble)(files[0]).probabilities)


def test_the_budget_is_for_all_parameters_together_and_is_checked_before_anything_is_written(first, second, tmp_path):
    count = first.model_info["parameters"]
    before = without(tmp_path)
    enough, short = 2 * count / 1e6, (2 * count - 1) / 1e6
    with pytest.raises(ConfigError, match=r"2 models, 0\.75 M in all \(first 0\.37 M, second 0\.37 M\)"):
        combine([first, second], tmp_path / "new" / "ensemble", max_parameters_millions=short)
    assert without(tmp_path) == before
    made = combine([first, second], tmp_path / "ensemble", max_parameters_millions=enough)
    assert made.summary["parameters"] == made.model_info["parameters"] == 2 * count
    assert f"{2 * count / 1e6:.2f} M parameters in all (the budget is {enough:g} M)" in format_combined(made)
    # A soup is one model.
    assert combine([first, first_copy(first, tmp_path)], tmp_path / "soup", method="soup",
                   max_parameters_millions=count / 1e6).model_info["parameters"] == count  # fmt: skip


def test_the_smallest_budget_of_the_members_recipes_holds_where_none_is_given(first, second, tmp_path):
    copy = first_copy(first, tmp_path)
    recipe = copy / "recipe.toml"
    config = load_config(recipe, ["model.max_parameters_millions=0.5"])
    recipe.write_text(fieldmark.config.dump_config(config))
    with pytest.raises(ConfigError, match=r"the budget is 0\.5 M; got 2 models"):
        combine([copy, second], tmp_path / "ensemble")
    assert combine([copy, second], tmp_path / "ensemble", max_parameters_millions=100).summary["val"]


def first_copy(run: Run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    return copy


def test_a_soup_of_identical_members_is_the_member(first, files, tmp_path):
    made = combine([first, first_copy(first, tmp_path)], tmp_path / "soup", method="soup")
    np.testing.assert_array_equal(made.predictions().probabilities, first.predictions().probabilities)
    assert made.summary["val"] == first.summary["val"]
    assert [row["kept"] for row in made.summary["members"].values()] == [True, True]
    member = Predictor.load(first)(files[0]).probabilities
    np.testing.assert_array_equal(Predictor.load(made)(files[0]).probabilities, member)


def test_a_soup_is_never_worse_on_the_validation_photos_than_its_best_member(first, sibling, make, tmp_path):
    stranger = make("stranger", "train.seed=2", "model.head_dropout=0.1")  # other random weights
    runs = [first, sibling, stranger]
    made = combine(runs, tmp_path / "soup", method="soup")
    alone = {run.name: evaluate(run).metrics["top1"] for run in runs}
    assert {name: row["top1"] for name, row in made.summary["members"].items()} == alone
    assert made.summary["val"]["top1"] >= max(alone.values())
    kept = [run for run in runs if made.summary["members"][run.name]["kept"]]
    soup = load_file(made.path / "best.safetensors")
    mean = np.mean([load_file(run.path / "best.safetensors")["head.weight"].numpy() for run in kept], axis=0)
    np.testing.assert_allclose(soup["head.weight"].numpy(), mean, atol=1e-7)


@pytest.mark.slow
def test_a_soup_is_an_ordinary_run_that_exports(first, sibling, tmp_path):
    made = combine([first, sibling], tmp_path / "soup", method="soup")
    options = {"is_int8": False, "max_accuracy_loss": 0.01, "max_photos": 4}
    fieldmark.export_run(made, tmp_path / "export", to="torch", **options)
    assert "the accuracy is optimistic" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(RunError, match=r"is finished: there is nothing to resume"):
        list(fieldmark.resume(made.path))


def test_an_ensemble_is_exported_network_by_network(ensemble, second, tmp_path):
    options = {"to": "torch", "is_int8": False, "max_accuracy_loss": 0.01, "max_photos": 4}
    with pytest.raises(
        ExportError, match=r"is an ensemble, and an export is one network.*members/\d --to torch`.*top-1"
    ):
        fieldmark.export_run(ensemble, tmp_path / "export", **options)
    with pytest.raises(RunError, match=r"is an ensemble, and this takes one model: use a run in .*members"):
        ensemble.load_model()
    member = ensemble.members[[row["name"] for row in ensemble.ensemble_info["members"]].index(second.name)]
    written = fieldmark.export_run(member, tmp_path / "export", **options)
    assert (written.temperature, written.metrics) == (1.7, second.summary)


def test_a_prior_is_refused_where_any_member_was_trained_with_balanced_classes(ensemble, tmp_path):
    copy = tmp_path / "both"
    shutil.copytree(ensemble.path, copy)
    calibrate_run(Run(copy), wanted="none", wanted_value=1.0, confidence_level=0.0, folds=2, seed=0)
    assert len(_training_prior(copy)) == 3
    recipe = copy / "members" / "1" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('class_weights = "none"', 'class_weights = "balanced"'))
    with pytest.raises(PredictionError, match=r"members.1 was trained with train.class_weights=balanced"):
        _training_prior(copy)


def test_what_was_combined_is_compared_as_a_setting_of_its_own(first, sibling, tmp_path):
    made = combine([first, sibling], tmp_path / "soup", method="soup")
    names = [variant.name for variant in compare_runs([first.path, made.path]).variants]
    assert names == ["combined=none", "combined=soup of 2"]


def test_other_validation_photos_or_labels_are_refused_with_an_example(first, make, tmp_path):
    with pytest.raises(
        RunError, match=r"different validation photos \(\d+ and \d+, \d+ in common; '.*' as .* is in one alo"
    ):
        combine([first, make("other-split", "data.split_seed=5")], tmp_path / "out")
    copy = first_copy(first, tmp_path)
    val = first.split.of("val").photos[0]
    text = (copy / "split.csv").read_text()
    (copy / "split.csv").write_text(text.replace(f"{val.path},{val.label},", f"{val.path},c,"))
    (copy / "data.json").write_text(json.dumps(first.data_info | {"fingerprint": "other"}))
    with pytest.raises(RunError, match=rf"'{val.path}' as '[ac]' is in one alone"):
        combine([first, copy], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_photo_of_the_same_name_is_refused(first, root, tmp_path):
    copy, photos = first_copy(first, tmp_path), tmp_path / "photos"
    shutil.copytree(root / "photos", photos)
    val = first.split.of("val").photos[0].path
    Image.new("RGB", (9, 9)).save(photos / val)
    (copy / "data.json").write_text(json.dumps(first.data_info | {"root": str(photos), "fingerprint": "other"}))
    with pytest.raises(RunError, match=rf"'{val}' is another file for .*copy than for .*first"):
        combine([first, copy], tmp_path / "out")


def test_what_does_not_fit_together_is_refused_by_name(first, second, ensemble, make, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"cannot be one soup: they differ in eval.transform \(weights and squash\), eval"
    ):
        combine([first, second], out, method="soup")
    other = make("mlp", "model.head=mlp", "model.head_hidden=8")
    with pytest.raises(RunError, match=r"differ in head \(linear and mlp\).*--method ensemble"):
        combine([first, other], out, method="soup")
    with pytest.raises(RunError, match=r"at least two runs; got .*first"):
        combine([first, first], out)
    with pytest.raises(RunError, match=r"is an ensemble already: give the runs that it was made of"):
        combine([first, ensemble], out)
    copy = first_copy(first, tmp_path)
    (copy / "classes.json").write_text('["a", "b", "d"]')
    with pytest.raises(RunError, match=r"know different classes \(3 and 3; 'c' is in one alone\)"):
        combine([first, copy], out)
    with pytest.raises(RunError, match=r"exists already; choose another --out"):
        combine([first, second], ensemble.path)
    with pytest.raises(RunError, match=r"no method 'stew': choose one of ensemble, soup"):
        combine([first, second], out, method="stew")
    assert not out.exists()


def test_a_soup_without_its_photos_says_so_and_leaves_nothing(first, sibling, tmp_path):
    copy = first_copy(first, tmp_path)
    (copy / "data.json").write_text(json.dumps(first.data_info | {"root": str(tmp_path / "gone")}))
    before = without(tmp_path)
    with pytest.raises(RunError, match=r"of the \d+ validation photos are not under .*gone any more.*an ensemble"):
        combine([copy, sibling], tmp_path / "soup", method="soup")
    assert without(tmp_path) == before


def test_a_damaged_ensemble_is_told(ensemble, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ensemble.path, copy)
    (copy / "ensemble.json").write_text('{"members": [{"folder": "0"}]}')
    with pytest.raises(RunError, match=r"ensemble.json lacks members.0.temperature: it is damaged"):
        Predictor.load(copy)


def test_the_verb_tells_members_budget_and_interval(first, second, tmp_path, monkeypatch, capsys):
    from fieldmark.cli.app import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fieldmark", "combine", str(first.path), str(second.path), *words])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    code, out, _ = run("--out", str(tmp_path / "both"), "--max-parameters-millions", "100")
    assert code == 0
    assert "ensemble of 2" in out
    assert "0.75 M parameters in all (the budget is 100 M)" in out
    assert "  second  top-1 " in out
    assert ", 95 % interval " in out
    code, out, _ = run("--out", str(tmp_path / "json"), "--json")
    assert json.loads(out)["members"].keys() == {"first", "second"}
    code, _, err = run("--out", str(tmp_path / "small"), "--max-parameters-millions", "0.5")
    assert (code, "error: model.max_parameters_millions: the budget is 0.5 M; got 2 models" in err) == (2, True)
