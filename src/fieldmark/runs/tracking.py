"""Reports of epochs, for those who look elsewhere than in the run folder: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is always written, by `writer`; these are copies on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.runs.folder import flatten as flatten_by

Log = Callable[[Mapping[str, float], int], object]  # takes the values of an epoch, and its number


def require_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the trackers asked for: at the start, not after a probe that took minutes."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


def flatten(row: Mapping[str, Any]) -> dict[str, float]:
    """Nested numbers as one level with "/" between names; what is no number is left out."""
    leaves = flatten_by(row, separator="/").items()
    return {name: float(leaf) for name, leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool)}


class Trackers:
    """The trackers asked for, as one.

    One that cannot start is an error. One that fails later, since its server went away, is reported once (by `warn`)
    and left out from then on: hours of training do not end for a copy.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._open: dict[str, tuple[Log, Callable[[], object]]] = {}
        for name in names:
            try:
                self._open[name] = _START[name](folder, dict(settings))
            except Exception as error:  # each package has errors of its own
                self.close()
                raise ResourceError(
                    f"{name} does not start: {_in_a_line(error)}. Check its settings (WANDB_MODE=offline, "
                    f"MLFLOW_TRACKING_URI), or leave it out of train.trackers"
                ) from error

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Hand the values of an epoch to each."""
        for name, (log, _) in list(self._open.items()):
            try:
                log(values, epoch)
            except Exception as error:
                del self._open[name]
                self._warn(
                    f"warning: {name} failed in epoch {epoch}: {_in_a_line(error)}. The training goes on without it; "
                    "metrics.jsonl has every epoch"
                )

    def close(self) -> None:
        """Let each flush and close."""
        for name, (_, close) in self._open.items():
            try:
                close()
            except Exception as error:
                self._warn(f"warning: {name} did not close: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _start_tensorboard(folder: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Write event files to RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log, writer.close


def _start_wandb(folder: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Begin a run of wandb, named after the run folder; WANDB_MODE=offline keeps it on this machine."""
    import wandb  # pyright: ignore[reportMissingImports]

    run: Any = wandb.init(project="fieldmark", name=folder.name, dir=str(folder), config=settings)
    return lambda values, epoch: run.log(dict(values), step=epoch), run.finish


def _start_mlflow(folder: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Begin a run of MLflow, named after the run folder, wherever MLFLOW_TRACKING_URI points."""
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment("fieldmark")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(settings, "recipe.json")
    return lambda values, epoch: mlflow.log_metrics(dict(values), step=epoch), mlflow.end_run


_START = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "mlflow": _start_mlflow}
