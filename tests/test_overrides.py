"""Settings as people type them, and as other tools and the competition report call them."""

from __future__ import annotations

import logging

import pytest

from fieldmark.config import Config, load_config
from fieldmark.errors import ConfigError
from fieldmark.overrides import find_setting, list_settings, note
from fieldmark.study.grid import base_settings, grid_cells, parse_grid


@pytest.fixture(autouse=True)
def fresh_notes():
    note.cache_clear()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("epochs", "train.epochs"),
        ("train.lr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("probe.learning_rate", "probe.lr"),
        ("lr", "optim.lr"),
        ("batch-size", "train.batch_size"),
        ("bs", "train.batch_size"),
        ("model", "model.name"),
        ("arch", "model.name"),
        ("optimizer", "optim.name"),
        ("schedule", "schedule.name"),
        ("weights", "model.weights"),
        ("Train.Epochs", "train.epochs"),
        ("ema_decay", "train.ema_decay"),
        ("crop", "augment.crop"),
        ("description", "description"),
    ],
)
def test_a_setting_is_found_by_what_people_call_it(typed, meant):
    assert find_setting(Config, typed) == meant


def test_every_setting_is_found_by_its_own_name_and_by_its_last_part_where_that_is_unique():
    keys = list_settings(Config)
    lasts = [key.rpartition(".")[2] for key in keys]
    for key, last in zip(keys, lasts, strict=True):
        assert find_setting(Config, key) == key
        if lasts.count(last) == 1 and last not in ("model", "schedule"):
            assert find_setting(Config, last) == key


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("train.epocs", "train.epocs: no such setting; did you mean train.epochs?"),
        ("name", "did you mean model.name or optim.name or schedule.name?"),
        ("mix", "mix is a group of settings; give one of them, such as mix.share"),
        ("labelsmoothing", "did you mean train.label_smoothing"),
        ("xyzzy", "`fieldmark config show` lists them all"),
    ],
)
def test_a_setting_that_is_none_is_answered_with_the_likely_ones(typed, words):
    with pytest.raises(ConfigError) as caught:
        find_setting(Config, typed)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.trackers=tensorboard", ("train", "trackers", ("tensorboard",))),
        ("train.trackers=tensorboard,wandb", ("train", "trackers", ("tensorboard", "wandb"))),
        ("augment.crop_scale=0.5,1", ("augment", "crop_scale", (0.5, 1.0))),
        ("fill=1,2,3", ("augment", "fill", (1, 2, 3))),
        ("data.path=1", ("data", "path", "1")),
        ("model=resnet18", ("model", "name", "resnet18")),
        ("channels_last=true", ("train", "channels_last", "on")),
        ("deterministic=no", ("train", "deterministic", False)),
        ("augment.size=none", ("augment", "size", None)),
        ("freeze=all", ("model", "freeze", "all")),
    ],
)
def test_a_value_is_read_by_what_the_setting_takes(override, read):
    section, name, value = read
    config = load_config(None, [override])
    assert getattr(getattr(config, section), name) == value
    key, _, text = override.partition("=")
    assert load_config(None, {key: text}) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=many", "train.epochs: must be a whole number; got 'many'"),
        ("train.epochs=-1", "train.epochs: must be at least 0; got -1"),
        ("mix.share=2", "mix.share: must be at most 1; got 2"),
        ("train.precision=fp16", "train.precision: must be 'auto', '32-true', 'bf16-mixed' or '16-mixed'; got 'fp16'"),
        ("loader.workers=few", "loader.workers: must be 'auto' or a whole number; got 'few'"),
        ("augment.crop_scale=1", "augment.crop_scale: must be a list of 2 values"),
        ("data.val_fraction=1", "data.val_fraction: must be less than 1; got 1"),
        ("augment.size=0", "augment.size: must be more than 0; got 0"),
        ("epochs", "--set takes key=value, such as train.epochs=20; got 'epochs'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_plain_words(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert words in str(caught.value)
    assert "Input" not in str(caught.value)


def test_a_recipe_file_with_a_wrong_key_names_the_right_one(tmp_path):
    (tmp_path / "own.toml").write_text("[train]\nlr = 0.1\n[mix]\nshare = 3\n[model]\nname = 4\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "own.toml")
    assert "train.lr: no such setting; did you mean optim.lr?" in str(caught.value)
    assert "mix.share: must be at most 1; got 3" in str(caught.value)
    (tmp_path / "own.toml").write_text('model = "resnet50"\n')
    with pytest.raises(ConfigError, match=r"model: is a group of settings; give one of them, such as model\.name"):
        load_config(tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("recipe", "overrides", "share", "cutmix_share"),
    [
        ("competition", ["mix.prob=0.2"], 0.4, 0.5),
        ("strong", ["mix.prob=0.2"], 0.2, 1.0),
        ("strong", ["mix.cutmix_share=0.5", "mix.prob=0.4"], 0.8, 0.5),
        (None, ["prob=0.3"], 0.6, 0.5),
        ("competition", ["mix.prob=0.2", "mix.share=0.3"], 0.3, 0.5),
    ],
)
def test_a_probability_per_method_is_read_as_a_share_of_all_batches(recipe, overrides, share, cutmix_share, caplog):
    with caplog.at_level(logging.WARNING, logger="fieldmark"):
        mix = load_config(recipe, overrides).mix
    assert (mix.share, mix.cutmix_share) == (pytest.approx(share), cutmix_share)
    assert "is read as mix.share = " in caplog.text


def test_a_recipe_may_give_the_probability_of_each_method_and_is_told_once_what_that_means(tmp_path, caplog):
    path = tmp_path / "recipe.toml"
    path.write_text("[mix]\nprob = 0.4\n")
    with caplog.at_level(logging.WARNING, logger="fieldmark"):
        config = load_config(path, {"train.epochs": 3})
        assert load_config(path, {"train.epochs": 3}) == config
        assert load_config(path, {"mix.share": 0.3}).mix.share == 0.3
    assert (config.mix.share, config.mix.cutmix_share) == (0.8, 0.5)
    assert len(caplog.records) == 1
    assert "mix.prob = 0.4 is per method: it is read as mix.share = 0.8" in caplog.text


@pytest.mark.parametrize("given", ["0.6", "often"])
def test_a_probability_that_cannot_be_says_what_to_give(given):
    with pytest.raises(ConfigError, match=rf"per method: of 2 methods at most 0\.5; got '?{given}'?\. Give mix\.share"):
        load_config("competition", [f"mix.prob={given}"])


def test_the_competition_recipe_answers_to_the_name_of_its_report():
    assert load_config("report") == load_config("competition")


@pytest.mark.parametrize("name", ["1", "true", '"quoted"', "a=b"])
def test_a_folder_of_photos_is_taken_literally_whatever_its_name(name):
    assert load_config("laptop", ["epochs=1"], data=name).data.path == name


def test_a_grid_may_vary_the_probability_of_each_method():
    grid = parse_grid({"recipe": "report", "grid": {"mix.prob": [0.0, 0.4]}}, "grid")
    cells = grid_cells(grid, base_settings(grid, []))
    assert [cell.name for cell in cells] == ["mix.prob=0", "mix.prob=0.4"]
    assert [cell.config.mix.share for cell in cells] == [0.0, 0.8]


def test_short_names_work_in_a_sweep_as_on_the_command_line():
    grid = parse_grid({"set": {"epochs": 3}, "grid": {"lr": [0.1, 0.2]}}, "grid")
    cells = grid_cells(grid, base_settings(grid, ["bs=7"]))
    assert [(cell.config.optim.lr, cell.config.train.epochs, cell.config.train.batch_size) for cell in cells] == [
        (0.1, 3, 7),
        (0.2, 3, 7),
    ]
