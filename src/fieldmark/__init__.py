"""Fieldmark: train the best photo classifier your time can buy, know which choices earned it, and use it.

The public names are those in `__all__`. Each is imported when it is first asked for, so `import fieldmark` is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as": what checkers of types may pass on
    from fieldmark.budget.extend import extend as extend
    from fieldmark.config import Config as Config
    from fieldmark.config import load_config as load_config
    from fieldmark.errors import FieldmarkError as FieldmarkError
    from fieldmark.estimator import Classifier as Classifier
    from fieldmark.estimator import fit as fit
    from fieldmark.export.export import export_run as export_run
    from fieldmark.inference.calibration import calibrate_run as calibrate_run
    from fieldmark.inference.combine import combine as combine
    from fieldmark.inference.evaluation import Evaluation as Evaluation
    from fieldmark.inference.evaluation import evaluate as evaluate
    from fieldmark.inference.predictor import Prediction as Prediction
    from fieldmark.inference.predictor import Predictor as Predictor
    from fieldmark.inference.triage import suggest as suggest
    from fieldmark.runs.folder import Run as Run
    from fieldmark.runs.train import resume as resume
    from fieldmark.runs.train import train as train
    from fieldmark.study.compare import compare_runs as compare_runs
    from fieldmark.study.report import write_report as write_report
    from fieldmark.study.sweep import run_sweep as run_sweep

# Read once, when torch is loaded. By default threads of a network spin where they meet, which on a core that another
# program uses too costs four fifths of the speed. A short spin loses little on a quiet machine (docs/performance.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_NAMES = {
    "budget.extend": ("extend",),
    "config": ("Config", "load_config"),
    "errors": ("FieldmarkError",),
    "estimator": ("Classifier", "fit"),
    "export.export": ("export_run",),
    "inference.calibration": ("calibrate_run",),
    "inference.combine": ("combine",),
    "inference.evaluation": ("Evaluation", "evaluate"),
    "inference.predictor": ("Prediction", "Predictor"),
    "inference.triage": ("suggest",),
    "runs.folder": ("Run",),
    "runs.train": ("resume", "train"),
    "study.compare": ("compare_runs",),
    "study.report": ("write_report",),
    "study.sweep": ("run_sweep",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fieldmark")
    if name not in _HOMES:
        raise AttributeError(f"module 'fieldmark' has no attribute {name!r}")
    return getattr(import_module(f"fieldmark.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
