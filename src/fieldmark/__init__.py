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
    from fieldmark.experiment.grid import choice, log_uniform, uniform
    from fieldmark.experiment.run import Evaluation, Run, evaluate, resume, train
    from fieldmark.experiment.sweep import run_sweep, sweep
    from fieldmark.outputs.calibration import calibrate_run
    from fieldmark.outputs.combine import combine
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
    "calibrate_run": "outputs.calibration",
    "choice": "experiment.grid",
    "combine": "outputs.combine",
    "compare_runs": "experiment.compare",
    "evaluate": "experiment.run",
    "export_run": "outputs.export",
    "load_config": "config",
    "log_uniform": "experiment.grid",
    "resume": "experiment.run",
    "run_sweep": "experiment.sweep",
    "sweep": "experiment.sweep",
    "train": "experiment.run",
    "uniform": "experiment.grid",
    "write_report": "outputs.report",
}

__all__ = [
    "Config",
    "Evaluation",
    "FieldmarkError",
    "Prediction",
    "Predictor",
    "Run",
    "calibrate_run",
    "choice",
    "combine",
    "compare_runs",
    "evaluate",
    "export_run",
    "load_config",
    "log_uniform",
    "resume",
    "run_sweep",
    "sweep",
    "train",
    "uniform",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fieldmark' has no attribute {name!r}")
    return getattr(import_module(f"fieldmark.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
