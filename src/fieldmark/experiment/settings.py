"""Which runs are one setting, and in what the settings differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fieldmark.config import Config
from fieldmark.errors import RunError
from fieldmark.experiment.results import RunResults

CHANCE = frozenset({"train.seed", "data.fold"})
"""Runs that differ in these alone are runs of one setting."""

NO_EFFECT = frozenset(
    {
        "description",
        "loader.workers",
        "cache.folder",
        "cache.disk_gigabytes",
        "train.threads",
        "train.save_minutes",
        "train.trackers",
    }
)
"""Words, and what changes how fast a run is but not what it learns."""

# Where the photos lie is no setting either: whether they are the same photos is checked by name.
NOT_A_SETTING = CHANCE | NO_EFFECT | {"data.path"}


MOST_WORDS = 6
"""Settings that differ in more keys than this are named by their folders: nobody reads a recipe as a name."""


@dataclass(frozen=True, eq=False)
class SettingRuns:
    """One setting: its runs, and where it differs from the others.

    Attributes:
        name: The changes in words, such as `mix.prob=0.4 optim.lr=0.001`; the folder's name where there are none,
            or too many to read.
        changes: Dotted key to value, of the keys in which not all settings agree.
        runs: In the order given.
    """

    name: str
    changes: Mapping[str, Any]
    runs: tuple[RunResults, ...]


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value, of every setting."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(table: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in table.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def group_runs(results: Sequence[RunResults]) -> list[SettingRuns]:
    """Put runs together that differ in nothing but chance, in order of first appearance.

    Raises:
        RunError: There are no runs.
    """
    if not results:
        raise RunError("no runs to compare: give run folders, or a folder of them")
    groups: dict[str, list[RunResults]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in results:
        # What was combined has the recipe of one of its members, but is no further run of it.
        own = {"combined": run.summary.get("combined", "none")}
        own |= {key: value for key, value in flatten(run.config).items() if key not in NOT_A_SETTING}
        identity = repr(sorted(own.items()))
        groups.setdefault(identity, []).append(run)
        settings[identity] = own
    differing = differing_keys(list(settings.values()))
    named = [_setting_runs(settings[identity], differing, runs) for identity, runs in groups.items()]
    return named if len(differing) <= MOST_WORDS else _named_by_folder(named)


def named_against(groups: Sequence[SettingRuns], run: Path) -> list[SettingRuns]:
    """The setting of one run first, under that run's name; the others named by what they change of it.

    Raises:
        RunError: The run is not among them.
    """
    wanted = run.resolve()
    found = [group for group in groups if any(one.path.resolve() == wanted for one in group.runs)]
    if not found:
        raise RunError(f"{run} is not among the runs that are compared: name one of them, or add it")
    base = found[0]
    named = [base if len(base.changes) > MOST_WORDS else replace(base, name=wanted.name)]
    for group in groups:
        if group is not base:
            changes = {key: value for key, value in group.changes.items() if value != base.changes[key]}
            named.append(replace(group, name=_words(changes)) if len(changes) <= MOST_WORDS else group)
    return named


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all settings, in recipe order."""
    first = settings[0]
    return [key for key in first if any(other[key] != first[key] for other in settings[1:])]


def _setting_runs(own: Mapping[str, Any], differing: Sequence[str], runs: Sequence[RunResults]) -> SettingRuns:
    changes = {key: own[key] for key in differing}
    return SettingRuns(_words(changes) or runs[0].name, changes, tuple(runs))


def _named_by_folder(groups: Sequence[SettingRuns]) -> list[SettingRuns]:
    """The folder of a single run, or the one that holds a setting's runs; the changes where that tells none apart."""
    paths = [[run.path.resolve() for run in group.runs] for group in groups]
    folders = [own[0] if len(own) == 1 else own[0].parent for own in paths]
    if len({folder.name for folder in folders}) < len(groups):
        return list(groups)
    return [replace(group, name=folder.name) for group, folder in zip(groups, folders, strict=True)]


def _words(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={format_value(value)}" for key, value in changes.items())


def format_value(value: Any) -> str:
    """A setting's value in a few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return "none" if value is None else str(value)
