"""Train, resume, evaluate: what happens to a run folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldmark.config import Config
from fieldmark.data.folders import existing
from fieldmark.engine import metrics
from fieldmark.engine.finite import NonFiniteError
from fieldmark.engine.loop import EpochReport, TrainBatch, train_epochs
from fieldmark.engine.probe import compute_features, train_head
from fieldmark.errors import InterruptedRunError, RunError, TrainingError
from fieldmark.experiment import build, folder
from fieldmark.experiment.dataset import Progress, Quiet
from fieldmark.experiment.folder import PhotoPredictions, Run
from fieldmark.experiment.interrupt import StopRequest, stop_requests
from fieldmark.experiment.opening import begin, open_session
from fieldmark.experiment.session import Session
from fieldmark.experiment.tracking import Trackers, flatten
from fieldmark.vision.mixing import one_hot

__all__ = ["Evaluation", "Progress", "Quiet", "Run", "evaluate", "resume", "train"]


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


@dataclass(frozen=True)
class Evaluation:
    """How well a run does on one split.

    Attributes:
        split: Name of the split.
        classes: K class names.
        figures: top1, top5, macro_recall, prior_top1, log_loss, calibration_error.
        top1_interval: 95 % Wilson interval of top1.
        predictions: Paths, labels and probabilities behind them.
    """

    split: str
    classes: tuple[str, ...]
    figures: dict[str, float]
    top1_interval: tuple[float, float]
    predictions: PhotoPredictions


def evaluate(
    run: Run | str | Path,
    *,
    split: str = "val",
    data: str | Path | None = None,
    flips: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict a labelled split of a run's photos anew, and store the predictions in the run folder.

    Args:
        run: The run.
        split: `train`, `val` or `test`.
        data: Where the photos are now; None is where they were.
        flips: Average the logits of each photo and its mirror image. Such predictions are not stored: those of the
            run are of the photos as they are.
        progress: Where to tell how far the work is.

    Raises:
        RunError: The run has no such labelled photos, or the folder that they were in is gone.
        DataError: `data` does not exist.
        PhotoError: A photo broke or vanished.
    """
    from fieldmark.experiment.judging import predict_photos

    run = run if isinstance(run, Run) else Run(run)
    index = run.split if data is None else replace(run.split, root=existing(Path(data)))
    if not index.root.exists():
        raise RunError(f"the photos of {run.path} were in {index.root}, which is gone: say where they are with --data")
    labels = index.label_numbers()
    numbers = np.asarray(
        [place for place, photo in enumerate(index.photos) if photo.split == split and labels[place] >= 0], np.int64
    )
    if not len(numbers):
        there = sorted({photo.split for photo in index.photos})
        raise RunError(f"{run.path} has no labelled photos in {split!r}; it has {', '.join(there)}")
    probabilities = predict_photos(run, index, numbers, flips=flips, progress=progress or Quiet())
    paths = tuple(index.photos[number].path for number in numbers)
    if not flips:
        folder.write_predictions(
            run.path / "predictions" / f"{split}.parquet",
            paths=paths,
            labels=labels[numbers],
            probabilities=probabilities,
            classes=run.classes,
        )
    return judged(run, PhotoPredictions(paths, labels[numbers], probabilities), split=split)


def judged(run: Run, predictions: PhotoPredictions, *, split: str) -> Evaluation:
    """The figures of stored predictions."""
    figures = metrics.summarize(predictions.probabilities, predictions.labels, run.prior)
    total = len(predictions.labels)
    interval = metrics.wilson_interval(round(figures["top1"] * total), total)
    return Evaluation(split, run.classes, figures, interval, predictions)


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
        class_weights=None if class_weights is None else session.fabric.to_device(class_weights),
        clip_norm=config.optim.clip_norm,
        fit_memory=config.train.fit_memory,
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
            session.state.watch.drain()
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
        figures, total = metrics.summarize(predictions.probabilities, predictions.labels, run.prior), len(predictions.labels)
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
    return TrainingError(
        f"{error}. The photos of that update: {shown}. Learning rate {lr:g}. The last good weights are kept in "
        f"{session.path}. Lower optim.lr, set optim.clip_norm=1, or train with train.precision=32-true"
    )
