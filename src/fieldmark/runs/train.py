"""Train, resume, evaluate: what happens to a run folder."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from fieldmark.augment.mixing import one_hot
from fieldmark.config import Config
from fieldmark.errors import InterruptedRunError, RunError, TrainingError
from fieldmark.progress import Progress, Quiet
from fieldmark.runs import build, folder
from fieldmark.runs.folder import Run
from fieldmark.runs.session import Session, begin, open_session
from fieldmark.runs.tracking import Trackers, flatten
from fieldmark.training import metrics
from fieldmark.training.loop import EpochReport, NonFiniteError, TrainBatch, UpdateOptions, train_epochs
from fieldmark.training.probe import compute_features, train_head

if TYPE_CHECKING:
    from fieldmark.config import Config
    from fieldmark.runs.folder import Run
    from fieldmark.training.loop import EpochReport


@dataclass
class StopRequest:
    """Set once a signal came. A second signal is not held back."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; what handled them before does so again afterwards."""
    request = StopRequest()
    # Only the main thread may set handlers: a training in another thread is stopped by its own caller.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()


def train(config: Config, out: str | Path, *, progress: Progress | None = None) -> Iterator[EpochReport]:
    """Fine-tune a model and write a run folder.

    Args:
        config: The settings; `data.path` says which photos.
        out: The run folder; must not exist, or be empty.
        progress: Where to tell how far the work is.

    Yields:
        A report after each epoch; epoch 0 is the probe, where the settings ask for one. Leave the `for` to stop.

    Raises:
        FieldmarkError: Settings, data, weights or machine don't allow it. What was saved stays.
        InterruptedRunError: Ctrl-C or SIGTERM came; everything is saved.
    """
    session = open_session(config, Path(out), start="new", progress=progress or Quiet())
    yield from _from_start(session)


def resume(out: str | Path, *, progress: Progress | None = None) -> Iterator[EpochReport]:
    """Continue an interrupted run, with its own settings, to the result it would have had.

    Raises:
        RunError: There is no run to continue, or it is finished.
        DataError: The photos changed since.
    """
    run = Run(out)
    if run.summary["status"] == "finished":
        raise RunError(f"{out} is finished: there is nothing to resume")
    if not (run.path / folder.STATE).is_file():
        yield from _from_start(open_session(run.config, run.path, start="again", progress=progress or Quiet()))
        return
    session = open_session(run.config, run.path, start="resumed", progress=progress or Quiet())
    begin(session)
    session.restore()
    with stop_requests() as stop:
        yield from _learn(session, stop)


def _from_start(session: Session) -> Iterator[EpochReport]:
    with stop_requests() as stop:
        if session.config.probe.epochs:
            yield _probe(session)
        begin(session)
        session.save()
        yield from _learn(session, stop)


def _probe(session: Session) -> EpochReport:
    """Fit the head on frozen features, and judge it: epoch 0."""
    started = time.perf_counter()
    config, settings = session.config, session.config.probe
    model = session.built.model
    session.fabric.to_device(model)
    numbers = session.train_numbers
    session.progress.message(f"probe: features of {len(numbers)} photos")
    features, order = compute_features(
        session.fabric, model, session.eval_batches(numbers), channels_last=session.channels_last
    )
    labels = torch.from_numpy(session.labels)[order]
    targets = one_hot(labels, len(session.dataset.index.classes), config.train.label_smoothing)
    head = model.head.cpu()
    generator = torch.Generator().manual_seed(config.train.seed)
    losses = list(
        train_head(
            head,
            features,
            targets,
            epochs=settings.epochs,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            batch_size=settings.batch_size,
            generator=generator,
        )
    )
    session.fabric.to_device(model)
    figures = session.evaluate(model.eval())
    with torch.inference_mode():
        hits = (head.cpu()(features).argmax(1) == labels).double().mean().item()
    session.fabric.to_device(model)
    seconds = time.perf_counter() - started
    report = EpochReport(0, 0, True, settings.lr, losses[-1], hits, None, 1.0, len(numbers), seconds, figures)
    _keep(session, report, model)
    return report


def _learn(session: Session, stop: StopRequest) -> Iterator[EpochReport]:
    config, state, path = session.config, session.state, session.path
    epochs, steps = config.train.epochs, session.steps_per_epoch
    names = config.train.trackers if session.fabric.is_global_zero else ()
    trackers = Trackers(names, path, config.model_dump(), warn=session.progress.message)
    session.enter_phase()
    session.progress.start(epochs * steps, state.epoch * steps + state.step_in_epoch)
    class_weights = build.build_class_weights(config, session.prior)
    reports = train_epochs(
        session.fabric,
        state,
        epochs=epochs,
        steps_per_epoch=steps,
        batches=lambda epoch, first: _watched(session, stop, epoch, first),
        evaluate=session.evaluate,
        options=UpdateOptions(
            class_weights=None if class_weights is None else session.fabric.to_device(class_weights),
            clip_norm=config.optim.clip_norm,
            fit_memory=config.train.fit_memory,
        ),
    )
    try:
        for report in reports:
            if not report.is_complete:
                session.save()
                _interrupted(session, stop)
            row = _keep(session, report, state.average.model if state.average else state.model)
            trackers.log(flatten(row), epoch=report.epoch)
            is_over = state.epoch == epochs or _is_patience_over(session, report.epoch)
            if not is_over:
                session.enter_phase()
            session.save()
            yield report
            if is_over:
                break
            if _agreed(session, stop, 0):
                _interrupted(session, stop)
    except NonFiniteError as error:
        raise _named(session, error) from error
    finally:
        trackers.close()
    _finish(session)


def _watched(session: Session, stop: StopRequest, epoch: int, first: int) -> Iterable[TrainBatch]:
    """Batches that tell how far they are, save now and then, and end early when asked to."""
    minutes = session.config.train.save_minutes
    saved = time.monotonic()
    for number, batch in enumerate(session.train_batches(epoch, first)):
        # Between two updates: the state is whole here.
        if number and _agreed(session, stop, number):
            return
        if number and minutes and session.fabric.world_size == 1 and time.monotonic() - saved > minutes * 60:
            session.state.check_finite()
            session.save()
            saved = time.monotonic()
        yield batch
        session.progress.advance(1)


def _agreed(session: Session, stop: StopRequest, number: int) -> bool:
    """Whether all processes stop here: they ask each tenth time, as a signal may reach but one."""
    if session.fabric.world_size == 1:
        return bool(stop)
    if number % 10:
        return False
    wish = torch.tensor(float(bool(stop)), device=session.fabric.device)
    wishes: Any = session.fabric.all_reduce(wish, reduce_op="sum")
    return bool(wishes > 0)


def _keep(session: Session, report: EpochReport, model: torch.nn.Module) -> dict[str, Any]:
    """Store what an epoch came to; give its row of metrics.jsonl."""
    is_best = session.keep_if_best(report.epoch, report.metrics, model)
    row = {key: value for key, value in asdict(report).items() if key not in ("metrics", "is_complete", "images")}
    row["images_per_second"] = report.images / report.seconds if report.seconds else None
    row |= {"val": report.metrics, "is_best": is_best, "is_probe": report.step == 0}
    session.append_history(row)
    if session.log is not None:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
        session.log.write(f"epoch {report.epoch}: train loss {report.train_loss:.4f}; val {figures or 'none'}")
    return row


def _is_patience_over(session: Session, epoch: int) -> bool:
    patience = session.config.train.patience_epochs
    if not patience or epoch - max(session.best.epoch, 0) < patience:
        return False
    session.progress.message(f"stopped early: no better {session.config.train.metric} for {patience} epochs")
    return True


def _finish(session: Session) -> None:
    if not session.fabric.is_global_zero:
        return
    summary: dict[str, Any] = {
        "status": "finished",
        "epochs": session.state.epoch,
        "seconds": session.seconds + time.perf_counter() - session.started,
        "select": session.config.train.select,
        "metric": session.config.train.metric,
        "best_epoch": session.best.epoch if session.best.epoch >= 0 else None,
    }
    if (session.path / "predictions" / "val.parquet").is_file():
        run = Run(session.path)
        predictions = run.predictions("val")
        figures, total = (
            metrics.summarize(predictions.probabilities, predictions.labels, run.prior),
            len(predictions.labels),
        )
        interval = metrics.wilson_interval(round(figures["top1"] * total), total)
        summary["val"] = {**figures, "top1_interval": list(interval)}
    folder.write_json(session.path / folder.SUMMARY, summary)


def _interrupted(session: Session, stop: StopRequest) -> None:
    path, state = session.path, session.state
    if session.fabric.is_global_zero:
        folder.write_json(path / folder.SUMMARY, {"status": "interrupted", "epochs": state.epoch, "step": state.step})
    raise InterruptedRunError(
        f"stopped by {stop.signal_name or 'another process'} after update {state.step}, everything is saved. "
        f"Continue with: fieldmark train --resume {path}"
    )


def _named(session: Session, error: NonFiniteError) -> TrainingError:
    """The same error, with the names of the photos."""
    names = [session.dataset.index.photos[number].path for number in error.numbers]
    shown = ", ".join(repr(name) for name in names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    lr = session.state.lr
    photos = f" The photos of that update: {shown}." if names else ""
    return TrainingError(
        f"{error}.{photos} Learning rate {lr:g}. The last good weights are kept in "
        f"{session.path}. Lower optim.lr, set optim.clip_norm=1, or train with train.precision=32-true"
    )


def format_epoch(report: EpochReport) -> str:
    """One line; the accuracy on clean training batches is kept apart from the one on mixed batches."""
    name = "probe   " if report.step == 0 else f"epoch {report.epoch:3d}"
    parts = [f"{name}  loss {report.train_loss:.4f}"]
    if report.train_top1_clean is not None:
        parts.append(f"train {report.train_top1_clean:.4f}")
    if report.train_top1_mixed is not None:
        parts.append(f"train, mixed {report.train_top1_mixed:.4f}")
    if "top1" in report.metrics:
        parts.append(f"val top-1 {report.metrics['top1']:.4f}  val loss {report.metrics['log_loss']:.4f}")
    return "  ".join([*parts, f"lr {report.lr:.1e}", f"{report.seconds:.0f} s"])


def format_result(run: Run) -> str:
    """What a finished run came to, and what to do with it."""
    summary = run.summary
    lines = [f"run: {run.path}"]
    if "val" in summary:
        lines.append(f"validation: {format_accuracy(summary['val'])}  ({_kept(summary)})")
    lines += [
        "next:",
        f"  fieldmark evaluate {_quoted(run.path)}",
        f"  fieldmark predict {_quoted(run.path)} PHOTOS --out prediction.csv",
    ]
    return "\n".join(lines)


def format_accuracy(figures: dict[str, Any]) -> str:
    """Top-1 accuracy with its interval."""
    low, high = figures["top1_interval"]
    return f"top-1 {figures['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}"


def new_run_folder(config: Config, recipe: str) -> Path:
    """`runs/<data>-<recipe>`, or the same with a number behind it where that is taken."""
    return free_folder(Path("runs") / f"{Path(config.data.path).resolve().stem}-{Path(recipe).stem}")


def free_folder(folder: Path) -> Path:
    """`folder`, or the same with the first number behind it that is not taken."""
    free, number = folder, 1
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _kept(summary: dict[str, Any]) -> str:
    if summary["select"] == "last":
        return "weights of the last epoch"
    if summary["best_epoch"] == 0:
        return f"weights of the probe, the best by {summary['metric']}"
    return f"weights of epoch {summary['best_epoch']}, the best by {summary['metric']}: biased upward by the choice"


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
