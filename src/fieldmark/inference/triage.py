"""Which photos deserve a second look, from the predictions that a run stored.

Letters: N photos with a prediction, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fieldmark.data.audit import near_pairs
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import PhotoIndex
from fieldmark.data.inspection import Inspection, name_folder
from fieldmark.data.shards import PhotoFile
from fieldmark.errors import DataError, needs_extra
from fieldmark.files import user_folder
from fieldmark.inference.calibration import apply_temperature, load_calibration, log_probabilities
from fieldmark.models.classifier import Classifier
from fieldmark.progress import Progress, Quiet
from fieldmark.runs.environment import usable_cores
from fieldmark.runs.folder import PhotoPredictions, Run
from fieldmark.training import metrics

MAP_SIDE = 28


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
        issues = find_label_issues(
            np.searchsorted(present, found.labels),
            rows / rows.sum(axis=1, keepdims=True),
            return_indices_ranked_by="self_confidence",
            n_jobs=1,
        )
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
    """Numbers of the photos that can be read, and their perceptual hashes.

    What was seen of them is remembered as of the data set below `root`, if there is one.
    """
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
