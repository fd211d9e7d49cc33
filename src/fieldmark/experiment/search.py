"""Settings drawn instead of listed: random or Bayesian search through Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldmark.errors import ConfigError, MissingExtraError
from fieldmark.experiment.grid import Range, Search

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Trial:
    """One combination that was tried: dotted key to value, and what it came to (None: failed or not done)."""

    changes: Mapping[str, Any]
    value: float | None


def propose(search: Search, past: Sequence[Trial], *, higher_is_better: bool) -> dict[str, Any]:
    """The next combination, from those before.

    Nothing is kept between calls: a study is made anew from `past`, seeded by its length, so that a sweep that was
    interrupted goes on as it would have.

    Args:
        search: Distributions and method.
        past: All trials before, in order.
        higher_is_better: Whether values are to rise.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = search.seed * 100_003 + len(past)
    samplers = {"random": optuna.samplers.RandomSampler, "bayesian": optuna.samplers.TPESampler}
    study = optuna.create_study(
        direction="maximize" if higher_is_better else "minimize", sampler=samplers[search.method](seed=seed)
    )
    space = {key: _distribution(key, values) for key, values in search.space.items()}
    for trial in past:
        if trial.value is not None:
            inner = {key: _to_optuna(search.space[key], value) for key, value in trial.changes.items()}
            study.add_trial(optuna.trial.create_trial(params=inner, distributions=space, value=trial.value))
    params = study.ask(space).params
    return {key: _from_optuna(search.space[key], value) for key, value in params.items()}


def _distribution(key: str, values: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if values.choices:
        return CategoricalDistribution(list(range(len(values.choices))))
    if values.low is None or values.high is None:
        raise ConfigError(f"search.space.{key}: give either choices = [...], or low and high")
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _to_optuna(values: Range, value: Any) -> Any:
    # Choices go by their number: Optuna knows no lists as categories.
    return [_plain(item) for item in values.choices].index(_plain(value)) if values.choices else value


def _from_optuna(values: Range, value: Any) -> Any:
    return values.choices[value] if values.choices else value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
