"""Train and resume: what happens to a run folder, and what is reported of it."""

import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning_fabric import Fabric
from torch import nn

from fieldmark import errors
from fieldmark.config import Config
from fieldmark.data.folders import quote
from fieldmark.files import fill_template
from fieldmark.progress import Logged, Progress, Quiet
from fieldmark.runs import folder
from fieldmark.runs.folder import Run, format_accuracy
from fieldmark.runs.session import Session, Start, open_session, require_photos_of
from fieldmark.runs.writer import Trackers
from fieldmark.training import metrics
from fieldmark.training.loop import EpochReport, TrainBatch, TrainState, train_epochs, train_head

STOP_FILE = "FIELDMARK_STOP_FILE"  # environment variable: where the file of a launcher is


@dataclass
class StopRequest:
    """Set once a signal came, or a launcher's file names one. A second signal is not held back."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        if not self.signal_name and (file := Path(os.environ.get(STOP_FILE, ""))).is_file():
            self.signal_name = file.read_text(encoding="utf-8")
        return bool(self.signal_name)


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; what handled them before does so again afterwards."""
    request = StopRequest()
    with ExitStack() as handlers:

        def on_signal(number: int, frame: FrameType | None) -> None:
            request.signal_name = signal.Signals(number).name
            handlers.close()

        handlers.enter_context(_handle_signals(on_signal, signal.SIGINT, signal.SIGTERM))
        yield request


@contextmanager
def _stop_at_once(path: Path) -> Generator[None]:
    """Turn SIGTERM into an error: before the first update there is nothing to save."""

    def on_signal(number: int, frame: FrameType | None) -> NoReturn:
        again = errors.command("train", "--resume", path)
        way_on = f"Begin again with: {again}" if (path / folder.RECIPE).is_file() else "Nothing was written"
        raise errors.InterruptedRunError(f"stopped by {signal.Signals(number).name} before the first update. {way_on}")

    with _handle_signals(on_signal, signal.SIGTERM):
        yield


@contextmanager
def _handle_signals(handler: Any, *numbers: signal.Signals) -> Generator[None]:
    # Only the main thread may set handlers: a training in another thread is stopped by its own caller.
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if is_main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def train(config: Config, out: str | Path, *, progress: Progress | None = None) -> Iterator[EpochReport]:
    """Fine-tune a model and write a run folder.

    Args:
        config: The settings; `data.path` says which photos.
        out: The run folder; must not exist, or be empty.
        progress: Where to report how far the work is.

    Yields:
        A report after each epoch; epoch 0 is the probe, where the settings ask for one. Nothing happens before the
        first is asked for: loop over them, and leave the `for` to stop. `fieldmark.fit` trains at once.

    Raises:
        FieldmarkError: Settings, data, weights or machine don't allow it. What was saved stays.
        InterruptedRunError: Ctrl-C or SIGTERM came; everything is saved.

    Examples:
        >>> config = fieldmark.load_config("recipe.toml", ["data.path=photos", "epochs=2"])
        >>> [report.epoch for report in fieldmark.train(config, "runs/new")]
        [1, 2]
    """
    yield from _run(config, Path(out), "new", progress)


def resume(
    out: str | Path, *, data: str | Path | None = None, progress: Progress | None = None
) -> Iterator[EpochReport]:
    """Continue an interrupted run, with its own settings, to the result it would have had.

    Args:
        out: The run folder.
        data: Where its photos are now, if they moved.
        progress: Where to report how far the work is.

    Raises:
        RunError: There is no run to continue, or it is finished.
        DataError: The photos changed since.

    Examples:
        >>> config = fieldmark.load_config("recipe.toml", ["data.path=photos", "epochs=2"])
        >>> for report in fieldmark.train(config, "runs/half"):
        ...     break  # after the first epoch
        >>> [report.epoch for report in fieldmark.resume("runs/half")]
        [2]
    """
    run = Run(out)
    if run.summary["status"] == "finished":
        raise errors.RunError(f"{out} is finished: there is nothing to resume")
    config, moved = run.config, data
    if (run.path / folder.STATE).is_file():
        yield from _run(config, run.path, "resumed", progress, moved)
        return
    require_photos_of(run.path, moved or config.data.path)
    if moved is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(moved)})})
    yield from _run(config, run.path, "again", progress)


def _run(
    config: Config, path: Path, start: Start, progress: Progress | None, data: str | Path | None = None
) -> Iterator[EpochReport]:
    with ExitStack() as stack:
        with _stop_at_once(path):
            opened = open_session(config, path, start=start, progress=progress or Quiet(), data=data)
            session = stack.enter_context(opened)
            report = _fit_probe(session) if config.probe.epochs and start != "resumed" else None
        if report is not None:
            yield report
        state = session.start_training()
        if start == "resumed":
            session.writer.restore(state)
        else:
            session.writer.save(state)
        with stop_requests() as stop:
            yield from _train_on(session, state, stop)


def _fit_probe(session: Session) -> EpochReport:
    """Fit the head on frozen features, and score it: epoch 0."""
    started = time.perf_counter()
    config, fabric, model, numbers = session.config, session.fabric, session.built.model, session.plan.train_numbers
    fabric.to_device(model)
    session.progress.message(f"probe: features of {len(numbers)} photos")
    found = session.predict(model.eval().features, numbers)
    features, labels = torch.from_numpy(found.logits), torch.from_numpy(session.dataset.labels[found.numbers])
    targets = session.make_targets(labels)
    head = model.head.cpu()
    generator = torch.Generator().manual_seed(config.train.seed)
    weights = session.make_update_options().class_weights
    weights = None if weights is None else weights.cpu()
    losses = list(train_head(head, features, targets, weights, generator=generator, **config.probe.model_dump()))
    with torch.inference_mode():
        hits = (head(features).argmax(1) == labels).double().mean().item()
    fabric.to_device(model)
    validation = session.validate(model.eval(), step=0)
    report = EpochReport(
        epoch=0,
        step=0,
        is_complete=True,
        lr=config.probe.lr,
        train_loss=losses[-1],
        train_top1_clean=hits,
        train_top1_mixed=None,
        clean_fraction=1.0,
        images=len(numbers),
        seconds=time.perf_counter() - started,
        metrics=validation.metrics,
        predictions=validation.predictions,
    )
    _record_epoch(session, report, model)
    return report


def _train_on(session: Session, state: TrainState, stop: StopRequest) -> Iterator[EpochReport]:
    """Train to the last epoch; between two epochs record, save and report."""
    config, plan, writer = session.config, session.plan, session.writer
    names = config.train.trackers if session.fabric.is_global_zero else ()
    trackers = Trackers(names, writer.path, config.model_dump(), warn=session.progress.message)
    session.progress.start(plan.epochs * plan.steps_per_epoch, state.epoch * plan.steps_per_epoch + state.step_in_epoch)
    reports = train_epochs(
        session.fabric,
        state,
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        batches=lambda epoch, first: _iterate_with_stop(session, state, stop, epoch, first),
        evaluate=lambda model: session.validate(model, step=state.step),
        options=session.make_update_options(),
    )
    try:
        for report in reports:
            if not report.is_complete:
                writer.save(state)
                _raise_interrupted(session, state, stop)
            row = _record_epoch(session, report, state.kept_model)
            trackers.log(row, epoch=report.epoch)
            is_over = state.epoch == plan.epochs or _is_patience_over(session, report.epoch)
            writer.save(state)
            yield report
            if is_over:
                break
            if _all_ranks_want(session, stop, 0):
                _raise_interrupted(session, state, stop)
    except errors.NonFiniteError as error:
        raise _with_photo_names(session, state, error) from error
    except RuntimeError as error:
        raise explain_lost_process(session.fabric, error) from error
    finally:
        trackers.close()
    _write_summary(session, state)


def _iterate_with_stop(
    session: Session, state: TrainState, stop: StopRequest, epoch: int, first: int
) -> Iterable[TrainBatch]:
    """Yield batches, report progress, save now and then, and end early when asked to."""
    minutes = session.config.train.save_minutes
    saved = time.monotonic()
    for number, batch in enumerate(session.train_batches(epoch, first)):
        # Between two updates: the state is whole here.
        if number and _all_ranks_want(session, stop, number):
            return
        if number and _all_ranks_want(session, 0 < minutes * 60 < time.monotonic() - saved, number):
            state.check_finite()
            session.writer.save(state)
            saved = time.monotonic()
        yield batch
        session.progress.advance(1)


def _all_ranks_want(session: Session, wish: StopRequest | bool, number: int) -> bool:
    """Whether any process has this wish: they ask each other each tenth time, as a signal may reach but one."""
    if session.fabric.world_size == 1:
        return bool(wish)
    if number % 10:
        return False
    own = torch.tensor(float(bool(wish)), device=session.fabric.device)
    wishes: Any = session.fabric.all_reduce(own, reduce_op="sum")
    return bool(wishes > 0)


def _record_epoch(session: Session, report: EpochReport, model: nn.Module) -> dict[str, Any]:
    """Store an epoch's result; give its row of metrics.jsonl."""
    names = ("epoch", "step", "lr", "train_loss", "train_top1_clean", "train_top1_mixed", "clean_fraction", "seconds")
    row: dict[str, Any] = {
        **{name: getattr(report, name) for name in names},
        "images_per_second": report.images / report.seconds if report.seconds else None,
        "val": report.metrics,
        "is_probe": report.step == 0,
    }
    row = session.writer.record_epoch(row, report, model)
    if isinstance(session.progress, Logged):
        values = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
        session.progress.write(f"epoch {report.epoch}: train loss {report.train_loss:.4f}; val {values or 'none'}")
    return row


def _is_patience_over(session: Session, epoch: int) -> bool:
    train = session.config.train
    has_waited = train.patience_epochs and epoch - max(session.writer.history.best_epoch, 0) >= train.patience_epochs
    if not has_waited or not len(session.plan.val_numbers):  # without photos to validate on nothing gets better
        return False
    session.progress.message(f"stopped early: no better {train.metric} for {train.patience_epochs} epochs")
    return True


def _write_summary(session: Session, state: TrainState) -> None:
    if not session.fabric.is_global_zero:
        return
    history, train = session.writer.history, session.config.train
    summary: dict[str, Any] = {
        "status": "finished",
        "epochs": state.epoch,
        "seconds": history.count_seconds(),
        "select": train.select,
        "metric": train.metric,
        "best_epoch": history.best_epoch if history.best_epoch >= 0 else None,
    }
    run = Run(session.writer.path)
    if (run.path / "predictions" / "val.parquet").is_file():
        stored = run.predictions("val")
        scores, total = metrics.summarize(stored.probabilities, stored.labels, run.prior), len(stored.labels)
        interval = metrics.wilson_interval(round(scores["top1"] * total), total)
        summary["val"] = {**scores, "top1_interval": list(interval)}
    finding = metrics.compare_with_probe(history.rows, metric=train.metric, select=train.select)
    session.writer.write_summary(summary | ({"probe": finding} if finding else {}))


def _raise_interrupted(session: Session, state: TrainState, stop: StopRequest) -> NoReturn:
    path = session.writer.path
    session.writer.write_summary({"status": "interrupted", "epochs": state.epoch, "step": state.step})
    session.fabric.barrier()  # launchers kill the others when one ends, and the first may still be writing
    raise errors.InterruptedRunError(
        f"stopped by {stop.signal_name or 'another process'} after update {state.step}, everything is saved. "
        f"Continue with: {errors.command('train', '--resume', path)}"
    )


def _with_photo_names(session: Session, state: TrainState, error: errors.NonFiniteError) -> errors.TrainingError:
    """The same error, with the names of the photos."""
    names = [session.dataset.index.photos[number].path for number in error.numbers]
    photos = f" The photos of that update: {quote(names, 40)}." if names else ""
    return errors.TrainingError(
        f"{error}.{photos} Learning rate {state.lr:g}. The last good weights are kept in {session.writer.path}. "
        "Lower optim.lr, set optim.clip_norm=1, or train with train.precision=32-true"
    )


def explain_lost_process(fabric: Fabric, error: RuntimeError) -> Exception:
    """Return what a broken connection means: another process of this training failed, and its message says why."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "DistBackendError")
    is_lost = fabric.world_size > 1 and any(word in f"{type(error).__name__} {error}" for word in words)
    return errors.ReportedElsewhereError(None) if is_lost else error


def format_epoch(report: EpochReport) -> str:
    """Format an epoch in one line; accuracy on clean training batches is kept apart from that on mixed ones."""
    figures = {
        "loss": report.train_loss,
        "train": report.train_top1_clean,
        "train, mixed": report.train_top1_mixed,
        "val top-1": report.metrics.get("top1"),
        "val loss": report.metrics.get("log_loss"),
    }
    name = "probe   " if report.step == 0 else f"epoch {report.epoch:3d}"
    parts = [f"{what} {value:.4f}" for what, value in figures.items() if value is not None]
    return "  ".join([name, *parts, f"lr {report.lr:.1e}", f"{report.seconds:.0f} s"])


def format_result(run: Run) -> str:
    """Say what a finished run reached, and what to do with it."""
    summary = run.summary
    accuracy = format_accuracy(summary["val"]) if "val" in summary else ""
    values = {"path": run.path, "summary": summary, "accuracy": accuracy, "next_steps": next_steps(run)}
    return fill_template("training.md", values)


def next_steps(run: Run) -> list[str]:
    """List what to do with a finished run, as commands."""
    predict = errors.command("predict", run.path, "PHOTOS", "--out", "prediction.csv")
    return ["next:", f"  {errors.command('evaluate', run.path)}", f"  {predict}"]


def new_run_folder(config: Config, recipe: str) -> Path:
    """`runs/<data>-<recipe>`, or the same with a number behind it where that is taken."""
    return free_folder(Path("runs") / f"{Path(config.data.path).resolve().stem}-{Path(recipe).stem}")


def free_folder(folder: Path) -> Path:
    """`folder`, or the same with the first number behind it that is not taken."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(free for free in chain([folder], numbered) if not free.exists())
