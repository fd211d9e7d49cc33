"""The reference of the settings is what their docstrings say."""

from __future__ import annotations

import runpy
from pathlib import Path

from fieldmark.config import Config, load_config, recipe_names
from fieldmark.overrides import list_settings
from fieldmark.runs.folder import flatten

ROOT = Path(__file__).parents[2]


def test_the_reference_of_settings_is_current_and_has_every_setting():
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "scripts/settings"))["page"](), "run: scripts/settings"
    for key in list_settings(Config):
        assert key == "description" or f"| `{key}` |" in page


def test_a_setting_that_is_said_to_be_the_competitions_alone_is_changed_by_no_other_recipe():
    defaults = flatten(Config())
    changed = {name: {k for k, v in flatten(load_config(name)).items() if v != defaults[k]} for name in recipe_names()}
    others = set().union(*(keys for name, keys in changed.items() if name != "competition"))
    marked = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        if section != "description"
        for key, inner in field.annotation.model_fields.items()
        if "only `competition`" in (inner.description or "")
    }
    assert len(marked) >= 12
    assert not marked & others
    # What people and time budgets choose, though no other recipe changes it.
    choices = {
        *("augment.executor", "cache.mode", "model.head", "model.name", "schedule.name", "train.precision", "optim.lr"),
        *("augment.vertical_flip", "augment.crop_scale", "augment.crop_ratio"),
        *("eval.size", "eval.transform", "eval.interpolation"),
    }
    assert changed["competition"] - others - {"description"} - choices <= marked
