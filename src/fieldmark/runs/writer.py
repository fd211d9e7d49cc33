"""The run folder while it is written: claimed by one training at a time, and whole after every step.

Also the copies of its metrics.jsonl that are made on request, for TensorBoard, Weights & Biases and MLflow.
Shape letters: N photos, M photos of validation, K classes.
"""

import io
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fieldmark.data.index import find_split_table, save_split_table
from fieldmark.data.storage import resolve
from fieldmark.data.tables import write_csv
from fieldmark.errors import MissingExtraError, ResourceError, RunError, command, first_line
from fieldmark.files import exclusive_lock, remove_dead_parts, write_whole
from fieldmark.runs import folder
from fieldmark.runs.dataset import Dataset
from fieldmark.runs.environment import describe_environment
from fieldmark.training import metrics
from fieldmark.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from fieldmark.training.loop import EpochReport, EpochTally, TrainState

LOCK = ".lock"
_COUNTS = ("epoch", "step", "step_in_epoch", "micro_batch_size")
_BEGINNING = {LOCK, folder.LOG, folder.SPLIT, folder.CLASSES, folder.MODEL, folder.DATA, folder.ENVIRONMENT,
              folder.BROKEN, "split.parquet"}  # fmt: skip


@dataclass
class History:
    """Holds what a run has written so far."""

    best_value: float | None = None  # of the best validation: never forgotten, not even by a resume
    best_epoch: int = -1
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # one per epoch, as in metrics.jsonl
    val_by_epoch: list[NDArray[np.integer[Any]]] = field(default_factory=list[NDArray[np.integer[Any]]])  # (M,) classes
    seconds_before: float = 0.0  # training time of earlier processes of this run
    started: float = field(default_factory=time.perf_counter)

    def count_seconds(self) -> float:
        """Give the training time of the run so far."""
        return self.seconds_before + time.perf_counter() - self.started


@contextmanager
def claim_folder(path: Path, *, is_new: bool) -> Generator[None]:
    """Hold a run folder for one training; a new one that was refused before it had a recipe is removed again."""
    busy = f"{path} is being trained by another process: wait until that ends, or stop it"
    with ExitStack() as stack:
        try:
            if is_new:
                refuse_used_folder(path)
                path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive_lock(path / LOCK, busy=busy))
            if is_new:
                refuse_used_folder(path)  # another training may have come first
        except OSError as error:
            raise ResourceError(f"{path} cannot be used as a run folder: {error.strerror}") from None
        remove_dead_parts(path)
        try:
            yield
        except BaseException:
            if is_new and not (path / folder.RECIPE).exists():
                _remove_beginning(path)
            raise


def refuse_used_folder(path: Path) -> None:
    """Raise RunError unless a new run may be written to a folder."""
    if not path.exists() or (path.is_dir() and _is_beginning({entry.name for entry in path.iterdir()})):
        return
    hint = "Choose another --out"
    if folder.run_status(path) == "finished":
        hint = f"It holds a finished run: use it ({command('evaluate', path)}), or choose another --out"
    elif (path / folder.RECIPE).is_file():
        hint = f"Continue it with `{command('train', '--resume', path)}`, or choose another --out"
    raise RunError(f"{path} exists and is not empty. {hint}")


def _is_beginning(names: set[str]) -> bool:
    """Whether a folder holds nothing, or what a training that was killed or refused had written before its recipe."""
    return not names or (LOCK in names and {name for name in names if not name.endswith(".part")} <= _BEGINNING)


def _remove_beginning(path: Path) -> None:
    """Remove a folder that a refused training made, unless it holds anything else."""
    with suppress(OSError):
        entries = list(path.iterdir())
        if _is_beginning({entry.name for entry in entries}):
            for entry in entries:
                entry.unlink()
            path.rmdir()


def write_beginning(
    path: Path, dataset: Dataset, recipe: str, model: Mapping[str, Any] | None, prior: Sequence[float]
) -> None:
    """Write what does not change; the recipe last, so that a folder that has one can begin again."""
    index = dataset.index
    save_split_table(index, find_split_table(path / folder.SPLIT, len(index)))
    folder.write_json(path / folder.CLASSES, list(index.classes))
    if model is not None:  # a budget has none yet
        folder.write_json(path / folder.MODEL, model)
    data = {
        "root": resolve(index.root),
        "fingerprint": index.fingerprint(),
        "counts": index.counts(),
        "prior": list(prior),
        "ignored": dict(index.ignored),
        "num_broken": len(dataset.broken),
    }
    folder.write_json(path / folder.DATA, data)
    folder.write_json(path / folder.ENVIRONMENT, describe_environment())
    if dataset.broken:
        write_csv(path / folder.BROKEN, ("path", "reason"), dataset.broken)
    write_whole(path / folder.RECIPE, recipe)


def write_validation(path: Path, dataset: Dataset, numbers: NDArray[np.int64], answers: NDArray[np.float32]) -> None:
    """Store the (M, K) probabilities that a run gives these validation photos."""
    path, index = path / "predictions" / "val.parquet", dataset.index
    paths, labels = index.photos.paths[numbers], dataset.labels[numbers]
    folder.write_predictions(path, paths=paths, labels=labels, probabilities=answers, classes=index.classes)


class RunWriter:
    """Writes the files of a run; on all processes but the first it keeps the history and writes nothing.

    `select` "best" keeps the weights of the epoch that is best by `metric`, "last" those of the last.
    """

    def __init__(self, path: Path, fabric: Fabric, dataset: Dataset, *, select: str, metric: str) -> None:
        self.path, self.history, self._fabric, self._dataset = path, History(), fabric, dataset
        self._select, self._metric = select, metric

    def record_epoch(self, row: dict[str, Any], report: EpochReport, model: nn.Module) -> dict[str, Any]:
        """Store an epoch: its weights and predictions if they are to be kept, and its row; give it with `is_best`."""
        history, predictions = self.history, report.predictions
        value = report.metrics.get(self._metric)
        is_best = value is not None and metrics.is_better(self._metric, value, history.best_value)
        if is_best:
            history.best_value, history.best_epoch = value, report.epoch
        row = {**row, "is_best": is_best or self._select == "last"}
        history.rows.append(row)
        if not self._fabric.is_global_zero:
            return row
        with _continuable(self.path):
            if row["is_best"]:
                folder.forget_answers(self.path)
                save_weights(self.path / folder.WEIGHTS, model.state_dict())
                if predictions is not None:
                    write_validation(self.path, self._dataset, predictions.numbers, predictions.probabilities())
            with (self.path / folder.METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if predictions is not None:
                history.val_by_epoch.append(predictions.logits.argmax(axis=1).astype(np.int32))
                # Of every epoch, so that the optimistic bias of "best" can be estimated.
                content = io.BytesIO()
                np.savez_compressed(content, predicted=np.stack(history.val_by_epoch))
                write_whole(self.path / folder.EPOCHS, content.getvalue())
        return row

    def save(self, state: TrainState) -> None:
        """Write `last.pt`: the run can be continued from here."""
        fabric = self._fabric
        random_states: Any = fabric.all_gather(_random_state(fabric.device))
        tallies: Any = fabric.all_gather(state.tally.sums)
        if not fabric.is_global_zero:
            return
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "precision": fabric.strategy.precision.state_dict(),
            "average": None if state.average is None else state.average.module.state_dict(),
            "tally": tallies.reshape(fabric.world_size, -1),
            "counts": {name: getattr(state, name) for name in _COUNTS},
            "random": random_states.reshape(fabric.world_size, -1).cpu(),
            "best": {"value": self.history.best_value, "epoch": self.history.best_epoch},
            "seconds": self.history.count_seconds(),
            "history": json.dumps(self.history.rows),
        }
        with _continuable(self.path):
            save_checkpoint(self.path / folder.STATE, content)

    def restore(self, state: TrainState) -> None:
        """Continue from `last.pt`, and drop what was written after it."""
        fabric, rank, path = self._fabric, self._fabric.global_rank, self.path / folder.STATE
        saved = load_checkpoint(path)
        try:
            state.model.load_state_dict(saved["model"])
            state.optimizer.load_state_dict(saved["optimizer"])
            fabric.strategy.precision.load_state_dict(saved["precision"])
            if state.average is not None:
                state.average.module.load_state_dict(saved["average"])
            tallies = saved["tally"].to(fabric.device).reshape(-1, len(state.tally.sums))
            # Where there are more or fewer processes now, the first has what all have counted.
            own = tallies[rank] if len(tallies) == fabric.world_size else tallies.sum(0) * fabric.is_global_zero
            state.tally = EpochTally(own)
            for name in _COUNTS:
                setattr(state, name, saved["counts"][name])
            if rank < len(saved["random"]):
                _set_random_state(saved["random"][rank], fabric.device)
            best, rows, seconds = saved["best"], json.loads(saved["history"]), float(saved["seconds"])
            self.history = History(best["value"], best["epoch"], rows, seconds_before=seconds)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            again = command("train", "--resume", self.path)
            raise RunError(
                f"{path} does not belong to this run: {first_line(error)}. "
                f"Delete it, and `{again}` trains the run again from its beginning, to the same result"
            ) from error
        state.set_rates()
        if fabric.is_global_zero:
            write_whole(self.path / folder.METRICS, "".join(json.dumps(row) + "\n" for row in rows))
            if (self.path / folder.EPOCHS).is_file():
                self.history.val_by_epoch = list(folder.read_epochs(self.path / folder.EPOCHS)[: len(rows)])

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if self._fabric.is_global_zero:
            with _continuable(self.path):
                folder.write_json(self.path / folder.SUMMARY, content)


@contextmanager
def _continuable(path: Path) -> Generator[None]:
    """Add to the error of a run folder that cannot be written how the run continues once it can."""
    try:
        yield
    except ResourceError as error:
        raise ResourceError(f"{error}, then continue with: {command('train', '--resume', path)}") from error
    except OSError as error:
        reason = f"{error.filename or path} could not be written: {error.strerror}"
        raise ResourceError(f"{reason}. Fix that, then continue with: {command('train', '--resume', path)}") from error


def _random_state(device: torch.device) -> Tensor:
    """Give the state of the generators that dropout and drop-path draw from, as bytes on the device."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states).to(device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and len(state) > size:  # else the run began without a GPU
        torch.cuda.set_rng_state(state[size:].clone(), device)


Log = Callable[[Mapping[str, float], int], object]  # takes the values of an epoch, and its number


def require_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the trackers asked for: at the start, not after a probe that took minutes."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


class Trackers:
    """The trackers asked for, as one.

    One that cannot start is an error. One that fails later, since its server went away, is reported once (by `warn`)
    and left out from then on: hours of training do not end for a copy.
    """

    def __init__(
        self, names: Sequence[str], path: Path, settings: Mapping[str, Any], *, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._open: dict[str, tuple[Log, Callable[[], object]]] = {}
        for name in names:
            try:
                self._open[name] = _START[name](path, dict(settings))
            except Exception as error:  # each package has errors of its own
                self.close()
                raise ResourceError(
                    f"{name} does not start: {_in_a_line(error)}. Check its settings (WANDB_MODE=offline, "
                    f"MLFLOW_TRACKING_URI), or leave it out of train.trackers"
                ) from error

    def log(self, row: Mapping[str, Any], *, epoch: int) -> None:
        """Hand the numbers of an epoch's row to each, nested ones with "/" between their names."""
        leaves = folder.flatten(row, separator="/").items()
        values = {name: float(leaf) for name, leaf in leaves if type(leaf) in (int, float)}  # not bool
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


def _start_tensorboard(path: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Write event files to RUN/tensorboard."""
    from lightning_fabric.loggers import TensorBoardLogger

    logger = TensorBoardLogger(path, name="tensorboard", version="")
    return lambda values, epoch: (logger.log_metrics(values, epoch), logger.save()), lambda: logger.finalize("success")


def _start_wandb(path: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Begin a run of wandb, named after the run folder; WANDB_MODE=offline keeps it on this machine."""
    import wandb  # pyright: ignore[reportMissingImports]

    run: Any = wandb.init(project="fieldmark", name=path.name, dir=str(path), config=settings)
    return lambda values, epoch: run.log(dict(values), step=epoch), run.finish


def _start_mlflow(path: Path, settings: dict[str, Any]) -> tuple[Log, Callable[[], object]]:
    """Begin a run of MLflow, named after the run folder, wherever MLFLOW_TRACKING_URI points."""
    import mlflow  # pyright: ignore[reportMissingImports]

    mlflow.set_experiment("fieldmark")
    mlflow.start_run(run_name=path.name)
    mlflow.log_dict(settings, "recipe.json")
    return lambda values, epoch: mlflow.log_metrics(dict(values), step=epoch), mlflow.end_run


_START = {"tensorboard": _start_tensorboard, "wandb": _start_wandb, "mlflow": _start_mlflow}
