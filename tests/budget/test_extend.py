"""A run that learns more photos and classes: its backbone stays, and what its own classes lose is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

import fieldmark
from fieldmark.budget.extend import extend
from fieldmark.budget.race import STORED, Features
from fieldmark.budget.run import train_within
from fieldmark.cli.app import app
from fieldmark.config import load_config
from fieldmark.data.folders import Photo
from fieldmark.data.index import PhotoIndex, join_indexes
from fieldmark.errors import DataError, RunError
from fieldmark.runs.dataset import find_photos

COLORS = {"blue": (60, 70, 200), "green": (50, 170, 70), "red": (200, 60, 50), "yellow": (210, 200, 40)}
OLD = ("blue", "green", "red")
TINY = ["model.name=test_resnet", "model.weights=random", "eval.size=32", "augment.size=32", "cache.mode=off",
        "loader.workers=0", "train.threads=1", "train.batch_size=8", "train.device=cpu",
        "data.val_fraction=0.4"]  # fmt: skip


def paint(root: Path, counts: dict[str, int], *, seed: int = 0, label: str = "") -> Path:
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        folder = root / (label or name)
        folder.mkdir(parents=True, exist_ok=True)
        for place in range(count):
            pixels = rng.normal(COLORS[name], 40, (36, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{seed}-{place}.png")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Photos, what joins them, a run that probes within a budget, and one that was trained with two layers."""
    root = tmp_path_factory.mktemp("extend")
    paint(root / "photos", dict.fromkeys(OLD, 10))
    paint(root / "more", {"red": 4, "yellow": 10}, seed=1)
    settings = [f'data.path="{(root / "photos").as_posix()}"', *TINY]
    ticks = iter(0.05 * tick for tick in range(10**6))
    train_within(load_config(None, settings), root / "probed", minutes=0.05, clock=lambda: next(ticks))
    config = load_config(None, [*settings, "model.head=mlp", "model.head_hidden=8", "train.epochs=1"])
    list(fieldmark.train(config, root / "trained"))
    return root


def copy(home: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / name, tmp_path / name))


def lose_photos(run: Path) -> None:
    """Let the photos of a run be gone."""
    info = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(info | {"root": str(run / "gone")}))


def test_an_extended_run_knows_old_and_new_classes_without_the_old_photos(home, tmp_path):
    run = copy(home, "probed", tmp_path)
    lose_photos(run)
    made = extend(run, home / "more", tmp_path / "new")
    assert made.classes == ("blue", "green", "red", "yellow")
    asked = paint(tmp_path / "asked", dict.fromkeys(COLORS, 3), seed=2)
    answers = list(fieldmark.Predictor.load(made).predict(asked))
    assert np.mean([Path(answer.path).parts[0] == answer.label for answer in answers]) > 0.8
    extended = made.summary["extended"]
    assert (extended["photos"], extended["classes"]) == (14, ["yellow"])
    old = extended["old"]
    assert old["estimate"] == pytest.approx(old["after"] - old["before"])
    assert old["low"] <= old["estimate"] <= old["high"]


def test_an_extended_run_is_an_ordinary_one_that_can_be_extended_again(home, tmp_path):
    first = extend(home / "probed", home / "more", tmp_path / "first")
    assert fieldmark.evaluate(first).metrics["top1"] == pytest.approx(first.summary["val"]["top1"], abs=0.05)
    assert first.config.data.path == str(tmp_path / "first" / "photos.csv")
    assert len(load_index_of(first)) == 44
    again = extend(first, paint(tmp_path / "late", {"green": 5}, seed=5), tmp_path / "again")
    assert len(Features.load(again.path / STORED).numbers) == 49
    before = {str(file): photo.split for file, photo in zip(first.split.files(), first.split.photos, strict=True)}
    after = {str(file): photo.split for file, photo in zip(again.split.files(), again.split.photos, strict=True)}
    assert before.items() <= after.items()


def load_index_of(run: fieldmark.Run) -> PhotoIndex:
    """The photos as a full training would find them, which must be those of the run."""
    index = find_photos(run.config.data)
    assert set(index.photos) == set(run.split.photos)
    return index


def test_a_run_without_features_keeps_them_the_first_time(home, tmp_path):
    run = copy(home, "trained", tmp_path)
    assert not (run / STORED).exists()
    first = extend(run, home / "more", tmp_path / "first", force=True)
    assert first.config.model.head == "linear"
    lose_photos(run)
    second = extend(run, home / "more", tmp_path / "second", force=True)
    np.testing.assert_allclose(first.predictions().probabilities, second.predictions().probabilities, atol=0.02)
    (run / STORED).unlink()
    with pytest.raises(RunError, match=r"keeps no features of 30 of its photos, and .*gone.* is gone"):
        extend(run, home / "more", tmp_path / "third", force=True)


def test_a_loss_of_the_old_classes_is_refused_unless_it_is_forced(home, tmp_path):
    run = copy(home, "probed", tmp_path)
    # Photos of the old classes under other names, so many that the old names are hardly given any more.
    more = paint(tmp_path / "more", {"red": 40}, seed=3, label="crimson")
    paint(more, {"green": 40}, seed=4, label="moss")
    asked = ["extend", str(run), str(more), "--out", str(tmp_path / "new")]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, RunError)
    assert "the old classes would be recognized less often, so nothing was written" in str(refused.exception)
    assert not (tmp_path / "new").exists()
    forced = CliRunner().invoke(app, [*asked, "--force"])
    assert forced.exit_code == 0
    assert "a full training would probably be better: there are 80 new photos beside 30 old ones" in forced.stdout
    assert "new: 'crimson', 'moss'" in forced.stdout


def test_class_weights_of_the_run_hold_for_the_new_head(home, tmp_path):
    plain, balanced = copy(home, "probed", tmp_path / "a"), copy(home, "probed", tmp_path / "b")
    recipe = (balanced / "recipe.toml").read_text()
    assert recipe.count('class_weights = "none"') == 1
    (balanced / "recipe.toml").write_text(recipe.replace('class_weights = "none"', 'class_weights = "balanced"'))
    before, after = (extend(run, home / "more", run.parent / "new", force=True) for run in (plain, balanced))
    assert before.prior.max() > 1.3 * before.prior.min()
    biases = [load_file(run.path / "best.safetensors")["head.bias"] for run in (before, after)]
    moved = (biases[0] - biases[1]) / np.log(before.prior)
    np.testing.assert_allclose(moved, moved[0], rtol=1e-3)  # the temperature, the same for all classes
    assert (before.config.train.class_weights, after.config.train.class_weights) == ("none", "balanced")
    np.testing.assert_allclose(*(run.predictions().probabilities.sum(1) for run in (before, after)), atol=1e-3)


def test_an_ensemble_stays_one(home, tmp_path):
    both = fieldmark.combine([home / "probed", home / "trained"], tmp_path / "both")
    made = extend(both, home / "more", tmp_path / "new", force=True)
    assert made.is_ensemble
    assert len(made.ensemble_info["members"]) == 2
    assert all((made.path / "members" / row["folder"] / STORED).is_file() for row in made.ensemble_info["members"])
    assert fieldmark.Predictor.load(made)(home / "more" / "yellow" / "1-0.png").classes == made.classes


def test_what_cannot_be_extended_is_said_in_a_sentence(home, tmp_path):
    with pytest.raises(DataError, match=r"all 30 photos of .* are in .*probed already: give new ones"):
        extend(home / "probed", home / "photos", tmp_path / "new")
    with pytest.raises(RunError, match="exists already"):
        extend(home / "probed", home / "more", home / "more")
    run = copy(home, "probed", tmp_path)
    (run / "summary.json").write_text('{"status": "interrupted"}')
    with pytest.raises(RunError, match="not finished"):
        extend(run, home / "more", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_joined_photos_keep_their_split_and_a_group_stays_together(tmp_path):
    old = PhotoIndex(
        tmp_path / "a", (Photo("x/1.jpg", "x", "val", "nest"), Photo("x/2.jpg", "x", "train", "")), ("x",), {}
    )
    new = PhotoIndex(
        tmp_path / "b",
        (
            Photo("../a/x/2.jpg", "x", "val", ""),
            Photo("x/3.jpg", "x", "train", "nest"),
            Photo("y/4.jpg", "y", "train", ""),
        ),
        ("x", "y"),
        {},
    )
    joined = join_indexes(old, new)
    assert [(photo.path, photo.split) for photo in joined.photos] == [
        ("a/x/1.jpg", "val"), ("a/x/2.jpg", "train"), ("b/x/3.jpg", "val"), ("b/y/4.jpg", "train"),
    ]  # fmt: skip
    assert (joined.root, joined.classes) == (tmp_path, ("x", "y"))
