"""Fieldmark: train the best photo classifier your time can buy, know which choices earned it, and use it.

The public names are those in `__all__`. Each is imported when it is first asked for, so `import fieldmark` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldmark.config import Config, load_config
    from fieldmark.errors import FieldmarkError
    from fieldmark.experiment.compare import compare_runs
    from fieldmark.experiment.run import Evaluation, Run, evaluate, resume, train
    from fieldmark.experiment.sweep import run_sweep, sweep
    from fieldmark.outputs.export import export_run
    from fieldmark.outputs.predictor import Prediction, Predictor
    from fieldmark.outputs.report import write_report

_HOMES = {
    "Config": "config",
    "Evaluation": "experiment.run",
    "FieldmarkError": "errors",
    "Prediction": "outputs.predictor",
    "Predictor": "outputs.predictor",
    "Run": "experiment.run",
    "compare_runs": "experiment.compare",
    "evaluate": "experiment.run",
    "export_run": "outputs.export",
    "load_config": "config",
    "resume": "experiment.run",
    "run_sweep": "experiment.sweep",
    "sweep": "experiment.sweep",
    "train": "experiment.run",
    "write_report": "outputs.report",
}

__all__ = [
    "Config",
    "Evaluation",
    "FieldmarkError",
    "Prediction",
    "Predictor",
    "Run",
    "compare_runs",
    "evaluate",
    "export_run",
    "load_config",
    "resume",
    "run_sweep",
    "sweep",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fieldmark' has no attribute {name!r}")
    return getattr(import_module(f"fieldmark.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
