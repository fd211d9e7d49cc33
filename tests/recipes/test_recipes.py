"""Every shipped recipe loads, and the competition's says what the report says."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from fieldmark.config import dump_config, load_config, recipe_names
from fieldmark.errors import ConfigError

RECIPES = sorted(Path(str(resources.files("fieldmark"))).rglob("recipes/**/*.toml"))


def test_there_are_recipes_and_each_is_offered_by_name():
    assert {path.stem for path in RECIPES} == set(recipe_names())
    assert {"competition", "strong", "laptop"} <= set(recipe_names())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_alike_by_name_by_path_and_from_its_own_dump(path, tmp_path):
    config = load_config(path.stem)
    assert load_config(path) == config
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config
    assert config.description


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_states_its_results_as_a_table(path):
    rows = [line for line in path.read_text().splitlines() if line.startswith("# |")]
    cells = [[cell.strip() for cell in row.removeprefix("# |").removesuffix("|").split(" | ")] for row in rows]
    assert cells[0][:5] == ["Data", "Backbone", "Size", "Epochs", "Seeds"]
    assert {len(row) for row in cells} == {8}
    assert len(cells) > 2


def test_the_competition_recipe_is_the_competitions_term_by_term():
    config = load_config("competition")
    augment = config.augment
    assert (augment.executor, augment.size, augment.crop) == ("reference", 224, "random_resized")
    assert (augment.crop_scale, augment.crop_ratio) == ((0.6, 1.2), (0.75, 1.33))
    assert (augment.horizontal_flip, augment.vertical_flip) == (0.5, 0.5)
    assert (augment.degrees, augment.translate, augment.shear) == (20, (0.1, 0.1), 5)
    assert (augment.affine_interpolation, augment.fill) == ("nearest", (0, 0, 0))
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.2, 0.2, 0.2, 0.1)
    assert (augment.erase, augment.erase_scale, augment.erase_ratio) == (0.3, (0.02, 0.15), (0.3, 3.3))
    assert (augment.erase_value, augment.policy) == ("random", "none")
    assert (config.mix.share, config.mix.cutmix_share) == (0.8, 0.5)
    assert (config.mix.mixup_alpha, config.mix.cutmix_alpha) == ((0.4, 0.6), (0.8, 1.2))
    assert (config.eval.transform, config.eval.size, config.eval.interpolation) == ("squash", 224, "bilinear")
    assert (config.model.head, config.model.head_hidden, config.model.head_dropout) == ("mlp", 1024, 0.3)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", 1e-4, 1e-2)
    assert (config.optim.backbone_lr_scale, config.optim.decay_norms_and_biases) == (1.0, True)
    assert (config.schedule.name, config.schedule.restart_factor) == ("warm_restarts", 2)
    assert (config.train.batch_size, config.train.metric, config.train.select) == (32, "top1", "best")
    assert (config.train.label_smoothing, config.train.ema_decay, config.probe.epochs) == (0, 0, 0)


def test_none_is_read_as_the_word_or_as_no_value_by_what_the_setting_takes(tmp_path):
    config = load_config("strong", ["augment.policy=none", "train.class_weights=none", "augment.size=none"])
    assert (config.augment.policy, config.train.class_weights, config.augment.size) == ("none", "none", None)
    text = dump_config(config)
    (tmp_path / "all.toml").write_text(text)
    assert load_config(tmp_path / "all.toml") == config
    assert 'restart_epochs = "none"' in text  # every setting stands in the dump, so a later default changes nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mix.share=1.2", "mix.share"),
        ("mix.cutmix_share=-0.1", "mix.cutmix_share"),
        ("mix.mixup_alpha=[0.6, 0.4]", r"0 < low <= high; got \[0.6, 0.4\]"),
        ("mix.cutmix_alpha=[0.0, 0.4]", "mix.cutmix_alpha: must be two numbers"),
    ],
)
def test_mixing_that_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        load_config("strong", [change])
