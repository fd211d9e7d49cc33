"""Which photos to label next: the model is unsure of them, they stand for many others, and no two look the same.

Shape letters: N photos, K classes, F features.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.audit import near_pairs
from fieldmark.data.folders import Photo
from fieldmark.data.index import PhotoIndex
from fieldmark.data.tables import write_csv
from fieldmark.errors import DataError, command
from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.predict import report_predictions
from fieldmark.inference.predictor import Predictor, predict_features
from fieldmark.inference.sources import PhotoSource, open_source
from fieldmark.inference.triage import hash_photos
from fieldmark.progress import Progress, Quiet
from fieldmark.runs.check import NEAR_DISTANCE_BITS
from fieldmark.runs.folder import Run

CANDIDATES = 5
"""Of so many times as many photos as are asked for, those that the model is least sure of, some are chosen."""


def suggest(
    run: Run | str | Path,
    pool: str | Path,
    out: str | Path,
    *,
    count: int = 100,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """Choose photos of a pool to label next, the most useful first, and write a list of them.

    The rule is `cover` among the least sure. Photos that are no files of this machine (in shards, behind URLs) are
    saved in a folder beside the list.

    Args:
        run: A run, its folder, or an ensemble.
        pool: Photos without labels, as `fieldmark predict` takes them. Those that the run has labels of may be there.
        out: The list, a CSV file.
        count: How many; fewer where the pool has no more that differ.
        progress: Told how far it is, and what is left out.

    Returns:
        The rows of the list: `path`, relative to it where the photo lies below its folder, else absolute; `label` and
        `probability` of what the model would answer; `why`.

    Raises:
        DataError: No photo can be read, or none is new, or `out` is no CSV file.
        RunError: It is no run. An export gives no features.

    Examples:
        >>> rows = fieldmark.suggest("runs/mine", "new-photos", "suggestions.csv", count=5)
        >>> len(rows), list(rows[0])
        (5, ['path', 'label', 'probability', 'why'])
    """
    run, out, log = run if isinstance(run, Run) else Run(run), Path(out).absolute(), progress or Quiet()
    if out.suffix.lower() != ".csv":
        raise DataError(f"the list is written as CSV, and {out} does not end in .csv: give another --out")
    source = open_source(str(pool))
    predictor = Predictor.load(run)
    if load_calibration(run) is None and not run.is_ensemble:
        log.message(f"better first, as {run.path} is not calibrated: {command('calibrate', run.path)}")
    predictions = list(report_predictions(predictor.predict_source(source), source.count, log))
    for one in (failed := [one for one in predictions if one.problem])[:3]:
        log.message(f"left out, one of {len(failed)} that cannot be read: {one.path!r} {one.problem}")
    answers = {one.path: one for one in predictions if not one.problem}
    if not answers:
        raise DataError(f"{pool}: none of {len(failed)} photos can be read. Give others")
    names = list(answers)
    doubtful = [names[number] for number in rank_by_doubt(np.stack([one.probabilities for one in answers.values()]))]
    rows: list[dict[str, str]] = []
    with TemporaryDirectory() as scratch:
        files = _find_different(run, source, doubtful, CANDIDATES * count, Path(scratch), log)
        chosen, stands_for = cover(_compute_features(run, list(files.values())), count)
        for number, others in zip(chosen, stands_for, strict=True):
            name, file = list(files.items())[number]
            if file.is_relative_to(scratch):
                saved = out.with_name(f"{out.stem}-photos")
                saved.mkdir(parents=True, exist_ok=True)
                file = Path(shutil.copy(file, saved))
            file, one = file.absolute(), answers[name]
            path = file.relative_to(out.parent).as_posix() if file.is_relative_to(out.parent) else str(file)
            likely = " or ".join(f"{name} {share:.0%}" for name, share in one.top(2))
            why = f"{likely}; stands for {others} photos" if others > 1 else likely
            rows.append({"path": path, "label": one.label, "probability": f"{one.probability:.4f}", "why": why})
    write_csv(out, list(rows[0]), [list(row.values()) for row in rows])
    return rows


def rank_by_doubt(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """(N,) numbers of photos; those first whose two likeliest classes, of (N, K) probabilities, differ least."""
    top = np.sort(probabilities, axis=1)[:, -2:]
    return np.argsort(top[:, -1] - top[:, 0], kind="stable")


def cover(features: NDArray[np.float32], count: int) -> tuple[list[int], list[int]]:
    """Choose the photos that stand best for all, the one that adds most first; and say for how many each stands.

    A photo is covered as well as the chosen one that is most like it, by the cosine of their features. Each next photo
    is the one that adds most to the sum over all photos.

    Args:
        features: (N, F); N is a few hundred, as all are compared with all.
        count: How many to choose; all N where there are fewer.

    Source:
        Wei, Iyer and Bilmes, "Submodularity in Data Subset Selection and Active Learning", ICML 2015 (facility location
        among the least sure). It was chosen among others by measurement: docs/labels.md.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    similar = unit @ unit.T
    covered, chosen = np.full(len(unit), -1, np.float32), list[int]()
    for _ in range(min(count, len(unit))):
        gains = np.maximum(similar - covered, 0).sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, similar[chosen[-1]])
    return chosen, np.bincount(similar[:, chosen].argmax(axis=1), minlength=len(chosen)).tolist()


def _compute_features(run: Run, files: Sequence[Path]) -> NDArray[np.float32]:
    """(N, F) what the head of a run is given of each photo; of an ensemble that of all members, side by side."""
    index = PhotoIndex(Path(), tuple(Photo(str(file.absolute()), None, "", "") for file in files), (), {})
    networks = ((member, member.load_model()) for member in run.members)
    numbers, quiet = np.arange(len(files)), Quiet()
    columns = [predict_features(one, index, numbers, network=network, progress=quiet) for one, network in networks]
    return np.concatenate(columns, axis=1)


def _find_different(
    run: Run, source: PhotoSource, names: Sequence[str], most: int, folder: Path, log: Progress
) -> dict[str, Path]:
    """Files of the first `most` photos, by name, that look like none before them and none that the run has learned."""
    _, hashes = hash_photos(run.split.files(), root=run.split.root, progress=log)
    found: dict[str, Path] = {}
    for start in range(0, len(names), most):
        files = list(source.fetch_files(names[start : start + most], folder).items())
        numbers, own = hash_photos([file for _, file in files], root=source.root, progress=Quiet())
        for number, one in zip(numbers, own[:, None], strict=True):
            if len(found) < most and not len(near_pairs(one, hashes, max_distance=NEAR_DISTANCE_BITS)[0]):
                hashes = np.append(hashes, one)
                found[files[number][0]] = files[number][1]
        if len(found) == most:
            return found
    if not found:
        raise DataError(f"all {len(names)} photos of {source.name} look the same as one that {run.path} has learned")
    log.message(f"of {len(names)} photos {len(found)} differ from each other and from those that have a label")
    return found
