"""Which photos deserve a look: those whose label is doubtful, by stored predictions, and those to label next.

Letters: N photos with a prediction, K classes, F features.
"""

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fieldmark.data.audit import near_pairs
from fieldmark.data.columns import Photos
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.folders import Photo
from fieldmark.data.index import PhotoIndex
from fieldmark.data.inspection import Inspection, name_folder
from fieldmark.data.shards import PhotoFile
from fieldmark.data.tables import write_csv
from fieldmark.errors import DataError, command, needs_extra
from fieldmark.files import user_folder
from fieldmark.inference.calibration import apply_temperature, load_calibration, log_probabilities
from fieldmark.inference.predict import report_predictions
from fieldmark.inference.predictor import Predictor, predict_features
from fieldmark.inference.sources import PhotoSource, open_source
from fieldmark.models.classifier import Classifier
from fieldmark.progress import Progress, Quiet
from fieldmark.runs.check import NEAR_DISTANCE_BITS
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.folder import PhotoPredictions, Run
from fieldmark.training import metrics

MAP_SIDE = 28
CANDIDATES = 5  # of so many times the photos asked for, those that the model is least sure of, some are chosen


@dataclass(frozen=True, eq=False)
class HeldOut(PhotoPredictions):
    """Predictions of photos that the model was not trained on: of validation, or out of fold."""

    classes: tuple[str, ...]

    @property
    def guesses(self) -> NDArray[np.int64]:
        """(N,) likeliest class."""
        return self.probabilities.argmax(axis=1)

    @property
    def losses(self) -> NDArray[np.float64]:
        """(N,) negative log-likelihood of the label, in nats."""
        return -log_probabilities(self.probabilities[np.arange(len(self.labels)), self.labels])


def join_held_out(runs: Sequence[Run]) -> HeldOut:
    """Join the validation predictions of a run, or of the folds of one data set, calibrated where the run is."""
    classes = runs[0].classes
    for run in runs:
        if run.classes != classes:
            raise DataError(f"{run.path} knows other classes than {runs[0].path}: review runs of one data set together")
    stored = [run.predictions("val") for run in runs]
    probabilities: list[NDArray[np.float32]] = []
    for run, found in zip(runs, stored, strict=True):
        calibration = load_calibration(run)
        temperature = calibration.temperature if calibration else 1.0
        probabilities.append(apply_temperature(log_probabilities(found.probabilities), temperature).astype(np.float32))
    paths = [path for found in stored for path in found.paths]
    if len(set(paths)) != len(paths):
        raise DataError(
            f"{len(paths) - len(set(paths))} photos are validated by more than one of the runs: give the folds of one "
            "cross-validation, each once"
        )
    labels = np.concatenate([found.labels for found in stored])
    return HeldOut(tuple(paths), labels, np.concatenate(probabilities), classes)


def confused_pairs(found: HeldOut) -> list[tuple[int, int, list[int]]]:
    """Two classes and the photos of either that were called the other, the surest mistake first; most photos first."""
    low, high = np.minimum(found.labels, found.guesses), np.maximum(found.labels, found.guesses)
    surest_first = np.argsort(np.argsort(-found.probabilities.max(axis=1), kind="stable"))
    return [
        (first, second, sorted(rows.tolist(), key=surest_first.__getitem__))
        for first, second, rows in metrics.confused_pairs(low, high)
    ]


def label_suspects(found: HeldOut) -> NDArray[np.int64]:
    """Indices of photos whose label is probably wrong, the surest first.

    Source:
        Northcutt, Jiang and Chuang, "Confident Learning", arXiv:1911.00068, section 3 (prune by noise rate), by the
        cleanlab library, ranked by self-confidence.
    """
    # cleanlab takes class numbers without gaps: a class that no photo here has is skipped.
    present = np.unique(found.labels)
    if len(present) < 2:
        return np.zeros(0, np.int64)
    with needs_extra("cleanlab", "review"):
        from cleanlab.filter import find_label_issues
    rows = found.probabilities[:, present].astype(np.float64) + 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with few photos, which the page shows anyway
        numbers, shares = np.searchsorted(present, found.labels), rows / rows.sum(axis=1, keepdims=True)
        issues = find_label_issues(numbers, shares, return_indices_ranked_by="self_confidence", n_jobs=1)
    return np.asarray(issues, np.int64)


def near_duplicates(index: PhotoIndex, *, max_distance: int) -> list[tuple[int, int, int]]:
    """Pairs of photos that look the same: (number, number, bits that differ), the likest first.

    `max_distance` is the largest Hamming distance of their 64-bit perceptual hashes. Photos that cannot be read are
    skipped.
    """
    numbers, hashes = hash_photos(index.files(), root=index.root, progress=Quiet())
    pairs = zip(*near_pairs(hashes, hashes, max_distance=max_distance), strict=True)
    return [(numbers[a], numbers[b], int(distance)) for a, b, distance in pairs if a < b]


def hash_photos(
    files: Sequence[PhotoFile], *, root: str | Path | None, progress: Progress
) -> tuple[list[int], NDArray[np.uint64]]:
    """Numbers of the photos that can be read, and their hashes, remembered as of the data set below `root` if any."""
    decoding = DecodeSpec((255, 255, 255), 178_956_970)
    memory = user_folder("inspections") / name_folder(root) if root else None
    with Inspection(files, decoding=decoding, with_hash=True, cache_folder=memory) as inspection:
        facts = inspection.finish(threads=usable_cores(), progress=progress)
    numbers = [number for number, fact in enumerate(facts) if fact.perceptual_hash]
    return numbers, np.array([int(facts[number].perceptual_hash, 16) for number in numbers], np.uint64)


class AttentionMaps:
    """Grad-CAM of a classifier in eval mode whose backbone gives a map of features.

    Source:
        Selvaraju et al., "Grad-CAM", arXiv:1610.02391, section 3.
    """

    def __init__(self, model: Classifier, *, size: int) -> None:
        self._model = model
        with torch.inference_mode():
            shape = model.feature_map(torch.zeros(1, 3, size, size)).shape
        # What transformers hand on is a list of patches, or a map with the channels last.
        self.is_available = len(shape) == 4 and shape[1] == model.backbone.num_features and min(shape[2:]) > 1

    def __call__(self, images: NDArray[np.float32], classes: Sequence[int]) -> NDArray[np.float32]:
        """(B, 28, 28) maps in [0, 1] for one class of each normalized image (B, 3, S, S); only where available."""
        with torch.no_grad():
            features = self._model.feature_map(torch.from_numpy(images))
        with torch.enable_grad():
            logits = self._model.classify_map(features.requires_grad_())
            wanted = logits[range(len(classes)), list(classes)].sum()
            (gradients,) = torch.autograd.grad(wanted, features)
        maps = (gradients.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).detach().relu()
        maps = nn.functional.interpolate(maps, (MAP_SIDE, MAP_SIDE), mode="bilinear")
        least, most = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        return ((maps - least) / (most - least).clamp_min(1e-7))[:, 0].nan_to_num().numpy()


def suggest(
    run: Run | str | Path, pool: str | Path, out: str | Path, *, count: int = 100, progress: Progress | None = None
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
    is the one that adds most to the sum over all photos. Of (N, F) features N is a few hundred, as all are compared
    with all; where there are fewer than `count`, all are chosen.

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
    index = PhotoIndex(Path(), Photos.of(Photo(str(file.absolute()), None, "", "") for file in files), (), {})
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
