"""The lint: each rule speaks where it should, and is silent where nothing is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.models.weights import data_config
from fieldmark.runs.check import fallback_rate, lint_recipe

WEIGHTS = data_config("resnet101.a1h_in1k", "pretrained")  # trained at 224, tested at 288, bicubic
CALM = ["train.select=last", "mix.share=0"]


def lint(*settings, sizes=((400, 400),), classes=("a", "b"), steps=100, num_val=1000, recipe=None):
    config = load_config(recipe, [*CALM, *settings])
    num_train = steps * config.train.batch_size
    return lint_recipe(config, WEIGHTS, np.array(sizes, np.int64), classes, num_train=num_train, num_val=num_val)


def test_nothing_is_said_where_nothing_is_wrong():
    assert lint() == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["augment.crop_scale=[0.6, 1.2]"], "never zooms out"),
        (["augment.executor=reference", "augment.degrees=20"], "resamples twice"),
        (["augment.executor=reference", "augment.shear=5", "augment.affine_interpolation=nearest"], "jagged"),
        (["augment.executor=reference", "augment.degrees=20", "augment.fill=[0, 0, 0]"], "black corners"),
        (["mix.share=1", "mix.off_epochs=3"], "leaves 0% of the batches"),
        (
            ["mix.share=0.2", "mix.off_epochs=3", "train.label_smoothing=0.1"],
            "until `fieldmark calibrate` corrects them",
        ),
        (["mix.share=0.2"], "mixing goes on to the last epoch"),
        (["augment.size=448", "eval.size=448"], "while the weights were trained at 224"),
        (["eval.size=192"], "evaluation at 192 pixels is smaller than training at 224"),
        (["eval.interpolation=bilinear"], "the weights expect bicubic"),
        (["schedule.name=warm_restarts", "schedule.restart_epochs=20"], "never restarts"),
        (["train.ema_decay=0.9999"], "remembers 10000 updates"),
        (["probe.epochs=30"], "moves away from the features that the probed head fits"),
        (["train.epochs=5", "mix.share=0.2"], "5 epochs are too few for mixing"),
    ],
)
def test_each_mistake_is_told(settings, words):
    assert any(words in finding for finding in lint(*settings)), lint(*settings)


def test_signs_are_not_to_be_mirrored():
    assert any("augment.horizontal_flip=0" in finding for finding in lint(classes=("0", "1", "2")))
    assert lint("augment.horizontal_flip=0", classes=("0", "1", "2")) == lint(classes=("0", "one")) == []


def test_an_average_is_advised_that_fits_the_run():
    (short,) = [
        finding for finding in lint("train.ema_decay=0.999", "train.epochs=1", steps=3) if "remembers" in finding
    ]
    (long,) = [
        finding for finding in lint("train.ema_decay=0.999", "train.epochs=1", steps=100) if "remembers" in finding
    ]
    assert short.endswith("Set train.ema_decay=0")
    assert long.endswith("Set train.ema_decay=0.9 or 0")


def test_crop_fallback_is_measured_on_the_photos():
    scale = "augment.crop_scale=[0.6, 1.2]"
    wide = [finding for finding in lint(scale, sizes=[(1600, 900)] * 4) if "fixed center crop" in finding]
    assert len(wide) == 1
    config = load_config(None, [scale, "augment.crop_ratio=[0.75, 1.33]"])
    rates = [fallback_rate(config, WEIGHTS, np.array([size])) for size in ((900, 900), (1200, 900), (1600, 900))]
    assert rates == pytest.approx([0.003, 0.04, 0.62], abs=0.02)
    assert fallback_rate(load_config(None, [scale, "augment.crop=zoom"]), WEIGHTS, np.array([(1600, 900)])) == 0


@pytest.mark.parametrize(
    ("classes", "flips", "told"),
    [
        (("left_hand", "right_hand"), ["augment.horizontal_flip=0.5"], True),
        (("hand left", "Hand-Right"), ["augment.horizontal_flip=0.5"], True),
        (("left_hand", "right_foot"), ["augment.horizontal_flip=0.5"], False),
        (("left_hand", "right_hand"), ["augment.horizontal_flip=0"], False),
        (("bright", "copyright"), ["augment.horizontal_flip=0.5"], False),
        (("arrow up", "arrow down"), ["augment.vertical_flip=0.5"], True),
        (("arrow up", "arrow down"), ["augment.vertical_flip=0"], False),
    ],
)
def test_flips_of_classes_that_differ_by_direction(classes, flips, told):
    assert any("differ by direction" in finding for finding in lint(*flips, classes=classes)) == told


def test_squashing_is_told_for_wide_photos_alone():
    squash = ["eval.transform=squash", "eval.interpolation=bicubic", "eval.size=224"]
    assert any("squashes" in finding for finding in lint(*squash, sizes=[(640, 480)]))
    assert not any("squashes" in finding for finding in lint(*squash, sizes=[(480, 480)]))


def test_small_photos_and_few_validation_photos_are_told():
    assert any("will be enlarged" in finding for finding in lint(sizes=[(100, 100)]))
    assert any("chosen on 300 photos" in finding for finding in lint("train.select=best", num_val=300))


def test_the_competition_recipe_is_told_its_pitfalls():
    findings = " ".join(lint("train.select=best", recipe="competition", sizes=[(1600, 900)], num_val=300))
    for words in ("never zooms out", "resamples twice", "black corners", "squashes", "bicubic", "chosen on 300"):
        assert words in findings


def test_check_says_that_weights_cannot_be_had_before_training_fails_of_it(tmp_path, monkeypatch):
    from fieldmark.config import load_config
    from fieldmark.errors import WeightsError
    from fieldmark.progress import Quiet
    from fieldmark.runs import check

    def unreachable(*_, **__):
        raise WeightsError("the hub cannot be reached")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "pretrained_file", unreachable)
    monkeypatch.setattr(check, "measure", unreachable)  # nothing is timed in vain
    for name, level in (("dark", 40), ("light", 210)):
        for number in range(6):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 40 + number, 3), level + number, np.uint8)).save(file)
    config = load_config("strong", [f"data.path={tmp_path / 'photos'}"])
    found = check.check_data(config, progress=Quiet())
    assert found.must_fix[-1] == "the hub cannot be reached"
    assert "not ready to train" in check.format_checkup(found)
    alone = check.check_data(config, progress=Quiet(), with_recipe=False)
    assert not any("hub" in text for text in alone.must_fix)
    assert alone.recipe_warnings == ()

    # Weights that an installed package holds are at hand.
    packaged = load_config("strong", ["model.name=tf_efficientnet_lite0", "model.weights=pretrained"])
    assert check._why_no_weights(packaged) == ""
