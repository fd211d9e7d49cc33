"""Reports of epochs, for those who look elsewhere than in the run folder: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is always written, by `run`; these are copies on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fieldmark.errors import MissingExtraError, ResourceError


class Tracker(Protocol):
    """Takes one flat row of numbers per epoch."""

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Keep the values of an epoch."""

    def close(self) -> None:
        """Flush and let go."""


def require_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the trackers asked for: at the start, not after a probe that took minutes.

    Raises:
        MissingExtraError: One is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


class Trackers:
    """The trackers asked for, as one.

    One that cannot start is an error. One that fails later, since its server went away, is told of once and left out
    from then on: hours of training do not end for a copy.

    Args:
        names: Of `tensorboard`, `wandb`, `mlflow`.
        folder: The run folder.
        settings: The resolved recipe, kept with the run where the tracker can.
        warn: Takes a line for the user.

    Raises:
        MissingExtraError: A tracker's package is not installed.
        ResourceError: A tracker does not start.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
        for name in names:
            try:
                self._open[name] = kinds[name](folder, settings)
            except MissingExtraError:
                self.close()
                raise
            except Exception as error:  # each package has errors of its own
                self.close()
                raise ResourceError(
                    f"{name} does not start: {_in_a_line(error)}. See to its settings (WANDB_MODE=offline, "
                    f"MLFLOW_TRACKING_URI), or leave it out of train.trackers"
                ) from error

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Hand the values of an epoch to each."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, epoch=epoch)
            except Exception as error:
                del self._open[name]
                self._warn(
                    f"warning: {name} failed in epoch {epoch}: {_in_a_line(error)}. The training goes on without it; "
                    "metrics.jsonl has every epoch"
                )

    def close(self) -> None:
        """Let each flush and let go."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                self._warn(f"warning: {name} did not close: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as one level with "/" between names; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Keep the values of an epoch."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Flush and let go."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, named after the run folder; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("wandb", "wandb") from None
        self._run = wandb.init(project="fieldmark", name=folder.name, dir=str(folder), config=dict(settings))

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Keep the values of an epoch."""
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        """Flush and let go."""
        self._run.finish()


class MLflow:
    """A run of MLflow, named after the run folder, wherever MLFLOW_TRACKING_URI points."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingExtraError("mlflow", "mlflow") from None
        self._mlflow = mlflow
        mlflow.set_experiment("fieldmark")
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(dict(settings), "recipe.json")

    def log(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Keep the values of an epoch."""
        self._mlflow.log_metrics(dict(values), step=epoch)

    def close(self) -> None:
        """Flush and let go."""
        self._mlflow.end_run()
