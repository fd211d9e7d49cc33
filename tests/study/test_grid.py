from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.config import load_config, recipe_names
from fieldmark.errors import ConfigError
from fieldmark.study.grid import SHIPPED, base_settings, grid_cells, load_grid, parse_grid, safe_name, vary_recipe


def _cells(content, overrides=()):
    grid = parse_grid(content, "grid")
    return grid_cells(grid, base_settings(grid, overrides))


def test_a_grid_is_all_combinations_and_seeds():
    cells = _cells({"seeds": [0, 1], "grid": {"mix.share": [0, 0.4], "train": {"epochs": [2, 3]}}})
    assert len(cells) == 8
    assert cells[1].name == "mix.share=0,train.epochs=2,seed=1"
    assert (cells[-1].config.mix.share, cells[-1].config.train.epochs, cells[-1].config.train.seed) == (0.4, 3, 1)


def test_cells_may_be_listed_under_their_own_names():
    cells = _cells({"cells": [{"name": "plain", "mix.share": 0.0}, {"mix": {"share": 0.2}, "optim.lr": 0.01}]})
    assert [cell.name for cell in cells] == ["plain", "mix.share=0.2,optim.lr=0.01"]
    assert cells[1].config.optim.lr == 0.01


def test_overrides_win_over_the_grid_and_the_grid_over_the_recipe():
    cell = _cells(
        {"recipe": "competition", "set": {"train.epochs": 5, "optim": {"lr": 0.5}}, "grid": {"mix.share": [0.1]}},
        ["train.epochs=7"],
    )[0]
    assert (cell.config.train.epochs, cell.config.optim.lr, cell.config.mix.share) == (7, 0.5, 0.1)
    assert cell.config.eval.transform == load_config("competition").eval.transform == "squash"


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = _cells({"grid": {"mix.share": [0.1]}}, ["data.path=photos"])[0]
    assert cell.config.data.path == str(tmp_path / "photos")


@given(st.text(max_size=300))
def test_folder_names_are_safe_on_every_system(text):
    name = safe_name(text)
    assert 0 < len(name) <= 120
    assert not set(name) & set('/\\:*?"<>| \n\t\0')
    assert name.strip(".") == name


@given(st.text(), st.text())
def test_different_texts_get_different_names(first, second):
    assert first == second or safe_name(first) != safe_name(second) or safe_name(first) in (first, second)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"grid: give either \[grid\] or \[\[cells\]\]"),
        ({"grid": {"mix.share": 0.2}}, r"grid\.mix\.share must be a list of values; got 0\.2"),
        ({"grid": {"mix.share": []}}, "must be a list of values"),
        ({"grid": {"mix.share": [0.1]}, "seeds": [1, 1]}, "seeds must be different numbers"),
        ({"gird": {}}, "gird: Extra inputs are not permitted"),
    ],
)
def test_a_grid_that_is_wrong_is_named(content, message):
    with pytest.raises(ConfigError, match=message):
        parse_grid(content, "grid.toml")


def test_a_setting_that_is_not_there_is_named_with_its_cell():
    with pytest.raises(ConfigError, match=r"cell mix\.shar=0\.1: mix\.shar: no such setting; did you mean mix\.share"):
        _cells({"grid": {"mix.shar": [0.1]}})
    with pytest.raises(ConfigError, match="--set takes key=value"):
        _cells({"grid": {"mix.share": [0.1]}}, ["train.epochs"])


def test_a_seed_is_no_axis_and_that_of_the_settings_counts_where_none_is_given():
    for content in ({"grid": {"train.seed": [0, 1]}}, {"cells": [{"seed": 1}]}):
        with pytest.raises(ConfigError, match=r"seeds are counted by --seeds N"):
            _cells(content)
    (cell,) = _cells({"grid": {"mix.share": [0.1]}}, ["train.seed=7"])
    assert (cell.name, cell.config.train.seed) == ("mix.share=0.1", 7)
    cells = _cells({"grid": {"mix.share": [0.1]}, "seeds": [0, 1]}, ["train.seed=7"])
    assert [cell.config.train.seed for cell in cells] == [0, 1]


def test_the_same_cell_twice_is_refused():
    with pytest.raises(ConfigError, match=r"two cells named 'mix\.share=0\.1'"):
        _cells({"grid": {"mix.share": [0.1, 0.1]}})
    with pytest.raises(ConfigError, match="two cells named"):
        _cells({"cells": [{"name": "a"}, {"name": "A"}]})


def test_a_grid_that_is_no_file_is_answered_with_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"no grid 'nothing'.*resnet50-mixing"):
        load_grid("nothing")
    (tmp_path / "torn.toml").write_text("grid = [")
    with pytest.raises(ConfigError, match=r"torn\.toml is not TOML"):
        load_grid(tmp_path / "torn.toml")


def test_a_recipe_beside_the_grid_is_found(tmp_path):
    (tmp_path / "own.toml").write_text("[train]\nepochs = 77\n")
    (tmp_path / "grid.toml").write_text('recipe = "own.toml"\n[grid]\n"mix.share" = [0.1]\n')
    grid = load_grid(tmp_path / "grid.toml")
    assert grid_cells(grid, base_settings(grid, ()))[0].config.train.epochs == 77


OURS = sorted(map(str, (Path(__file__).parents[2] / "experiments/grids").glob("*.toml")))


def test_there_are_grids_that_our_recipes_were_chosen_by():
    assert OURS


@pytest.mark.parametrize("name", [*recipe_names(SHIPPED), *OURS])
def test_every_grid_is_valid_with_several_seeds(name):
    grid = load_grid(name)
    cells = grid_cells(grid, base_settings(grid, ()))
    assert len(cells) == len({cell.name for cell in cells}) >= 2 * len(grid.seeds)
    assert len(grid.seeds) >= (1 if "-quick" in name or name in OURS else 3)
    assert grid.description


def test_the_competitions_experiments_are_shipped():
    names = {"resnet50-mixing", "resnext50-mixing", "backbones"}
    assert names | {f"{name}-quick" for name in names} <= set(recipe_names(SHIPPED))
    shares = [sorted({cell.config.mix.share for cell in _shipped(name)}) for name in sorted(names)]
    assert shares == [[0.8], [0, 0.4, 0.8], [0.4, 0.6, 0.8, 1]]


def _shipped(name):
    grid = load_grid(name)
    return grid_cells(grid, base_settings(grid, ()))


def test_a_recipe_is_varied_without_a_file():
    grid = vary_recipe("laptop", ["optim.lr=1e-4,1e-3", 'train.trackers=[],["tensorboard"]'], seeds=3)
    cells = grid_cells(grid, base_settings(grid, ()))
    assert len(cells) == 12
    assert {cell.config.optim.lr for cell in cells} == {1e-4, 1e-3}
    assert {cell.config.train.trackers for cell in cells} == {(), ("tensorboard",)}
    assert {cell.config.train.seed for cell in cells} == {0, 1, 2}
    assert cells[0].config.model == load_config("laptop").model
    words = vary_recipe("laptop", ["augment.policy=none,trivial"], seeds=1)
    assert words.grid == {"augment.policy": ["none", "trivial"]}


def test_seeds_alone_repeat_a_recipe():
    grid = vary_recipe("laptop", [], seeds=2)
    assert [cell.name for cell in grid_cells(grid, base_settings(grid, ()))] == ["base,seed=0", "base,seed=1"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["optim.lr"], r"--vary takes key=value,value, such as optim\.lr=1e-4,1e-3; got 'optim\.lr'"),
        (["optim.lr="], "--vary takes key=value,value"),
        (["optim.lr=1", "optim.lr=2"], r"--vary optim\.lr is given twice"),
    ],
)
def test_a_variation_that_cannot_be_read_is_named(vary, message):
    with pytest.raises(ConfigError, match=message):
        vary_recipe("laptop", vary, seeds=1)
