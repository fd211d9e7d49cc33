"""The public names, sorted by module: the one list of them, which `__init__.py` reads too."""

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
from fieldmark.runs.folder import Run as Run
from fieldmark.runs.train import resume as resume
from fieldmark.runs.train import train as train
from fieldmark.study.compare import compare_runs as compare_runs
from fieldmark.study.grid import choice as choice
from fieldmark.study.grid import log_uniform as log_uniform
from fieldmark.study.grid import uniform as uniform
from fieldmark.study.report import write_report as write_report
from fieldmark.study.sweep import run_sweep as run_sweep
from fieldmark.study.sweep import sweep as sweep

__version__: str
__all__: list[str]
