"""What `fieldmark predict` does: a model, photos, a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import PredictionError
from fieldmark.inference.calibration import apply_prior, estimate_prior, load_calibration
from fieldmark.inference.exported import FILE
from fieldmark.inference.predictor import Prediction, Predictor
from fieldmark.inference.sources import PATH_COLUMN, PhotoSource, cut_list, open_source
from fieldmark.inference.writers import (
    Form,
    PredictedPhotos,
    check_sample,
    choose_form,
    in_sample_order,
    leaderboard_names,
    save_predictions,
    save_prior,
)
from fieldmark.progress import Progress
from fieldmark.runs.folder import Run

PHOTOS_BETWEEN_LINES = 10_000


def predict_photos(
    model: Path,
    photos: str | Path,
    out: Path | None,
    *,
    form: Form | None = None,
    sample: Path | None = None,
    sample_order: bool = False,
    path_column: str = PATH_COLUMN,
    flips: bool = False,
    estimates_prior: bool = False,
    progress: Progress,
    ray: str | None = None,
) -> PredictedPhotos:
    """Ask a model about photos, in their order, and write a file; the options are those of `fieldmark predict`.

    Names and sample are checked before the first photo is read (of tar files as they are read). `photos` is what
    `sources.open_source` takes; without `out` the predictions stay in memory, and with Ray it may be a folder, for the
    parts as they are. `estimates_prior` corrects the answers for class shares that are estimated from these photos, and
    keeps all probabilities in memory. `ray` is the address of a cluster that shares the work, "" for one made here.
    """
    if sample_order and sample is None:
        raise PredictionError("--sample-order follows a sample submission: give it with --sample FILE")
    source = open_source(str(photos), path_column=path_column)
    if source.skipped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in source.skipped.items())
        progress.message(f"skipped in {source.name}: {reasons}")
    is_folder = ray is not None and out is not None and (out.is_dir() or not out.suffix)
    if out is not None and not is_folder:
        form = choose_form(out, form, has_sample=sample is not None)
    prior = _training_prior(model) if estimates_prior else None
    if ray is not None and (out is None or sample_order or prior is not None):
        raise PredictionError(
            "--ray writes parts in the order of the photos: give --out, no --sample-order and no --prior"
        )
    if sample is not None and sample_order:
        source = _reorder(source, sample)
    _check_names(source, sample, has_ids=out is not None and form == "leaderboard")
    if ray is not None and out is not None:
        from fieldmark.inference.bulk import make_parts_on_ray, predict_in_parts

        make = partial(make_parts_on_ray, address=ray)
        return predict_in_parts(model, source, out, form=form, flips=flips, make_parts=make, progress=progress)
    predictor = Predictor.load(model, flips=flips)
    predictions = _report(_predict(predictor, source), source.count, progress)
    shares: tuple[tuple[str, float, float], ...] = ()
    if prior is not None:
        predictions, estimated = correct_prior(list(predictions), prior)
        shares = tuple(zip(predictor.classes, prior.tolist(), estimated.tolist(), strict=True))
    if out is None:
        done = PredictedPhotos(None, prior=shares)
        done.shown = list(done.watch(predictions))
        return done
    has_groups = predictor.fallback is not None
    done = save_predictions(predictions, out, classes=predictor.classes, form=form, has_groups=has_groups)
    if shares:
        save_prior(out, shares)
    return replace(done, prior=shares)


def correct_prior(
    predictions: list[Prediction], prior: NDArray[np.float64]
) -> tuple[list[Prediction], NDArray[np.float64]]:
    """Correct calibrated predictions for the class shares among them; also returns these (K,) shares."""
    rows = np.asarray([one.probabilities for one in predictions if not one.problem], np.float64)
    if not len(rows):
        return predictions, prior
    estimated = estimate_prior(rows, prior)
    corrected = iter(apply_prior(rows, prior, estimated).astype(np.float32))
    return [one if one.problem else replace(one, probabilities=next(corrected)) for one in predictions], estimated


def _training_prior(model: Path) -> NDArray[np.float64]:
    """The (K,) class shares that a calibrated run's probabilities assume."""
    if (model / FILE).is_file():
        raise PredictionError(f"{model} is an export, which does not hold the class shares of training: give the run")
    run = Run(model)
    if load_calibration(run) is None:
        raise PredictionError(
            f"{model} is not calibrated, and class shares can be estimated from calibrated probabilities alone: "
            f"first `fieldmark calibrate {model}`"
        )
    if run.config.train.class_weights != "none":
        raise PredictionError(
            f"{model} was trained with train.class_weights={run.config.train.class_weights}, so its probabilities do "
            "not assume the class shares of training, which --prior estimate starts from"
        )
    return run.prior


def _predict(predictor: Predictor, source: PhotoSource) -> Iterator[Prediction]:
    if source.root is None:
        return predictor.predict_named(source.read(predictor.batch_size))
    names = list(source.names())
    return predictor.predict_files(names, [Path(source.root, name) for name in names])


def _check_names(source: PhotoSource, sample: Path | None, *, has_ids: bool) -> None:
    """Check the names that a file would have; of tar files only against a sample: to learn them is to read them."""
    if sample is not None or (has_ids and source.count is not None):
        names = leaderboard_names(source.names())
        if sample is not None:
            check_sample(names, sample)


def _reorder(source: PhotoSource, sample: Path) -> PhotoSource:
    if source.root is None:
        raise PredictionError(
            f"--sample-order reorders a folder of this machine, which {source.name} is not. Give the photos as a list, "
            "a CSV file with a column `path`, in the wanted order"
        )
    root, paths = source.root, in_sample_order(list(source.names()), sample)
    return replace(source, cut=partial(cut_list, root, paths))


def _report(predictions: Iterable[Prediction], total: int | None, progress: Progress) -> Iterator[Prediction]:
    """The same predictions, with their number reported."""
    if total is not None:
        progress.start(total, 0)
    for count, prediction in enumerate(predictions, start=1):
        yield prediction
        if total is not None:
            progress.advance(1)
        elif count % PHOTOS_BETWEEN_LINES == 0:
            progress.message(f"{count} photos")
