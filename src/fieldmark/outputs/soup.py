"""A greedy soup: the mean of the weights of those runs that together judge the validation photos best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.errors import RunError
from fieldmark.experiment import folder
from fieldmark.outputs.combined_folder import copy_description, member_names, top1, write_model_info, write_summary

if TYPE_CHECKING:
    from fieldmark.experiment.dataset import Progress
    from fieldmark.experiment.folder import Run

NOTE = (
    "These photos chose which members were kept, which flatters the accuracy: photos that nothing has seen would tell."
)


def write_soup(runs: Sequence[Run], part: Path, summary: dict[str, Any], progress: Progress) -> None:
    """Fill a run folder with the soup of `runs`, which were checked to fit together.

    Raises:
        RunError: Validation photos are gone.
        PhotoError: One cannot be read.
    """
    from fieldmark.engine.average import greedy_soup
    from fieldmark.engine.checkpoint import load_saved_weights, save_weights
    from fieldmark.experiment.run import evaluate

    started = time.perf_counter()
    names = member_names(runs)
    judge = _SoupJudge(runs[0], names, progress)
    kept, weights = greedy_soup([load_saved_weights(run.path / folder.WEIGHTS) for run in runs], judge)
    progress.message(f"kept {', '.join(names[place] for place in kept)}")
    best = runs[kept[0]]
    copy_description(best, part)
    write_model_info([runs[place] for place in kept], part, best.model_info)
    save_weights(part / folder.WEIGHTS, weights)
    described = {
        name: {"top1": score, "kept": place in kept}
        for place, (name, score) in enumerate(zip(names, judge.scores, strict=False))
    }
    # By the folder itself, so that what it stores is what it will answer.
    evaluate(folder.Run(part), split="val", progress=progress)
    seconds = time.perf_counter() - started
    write_summary(part, summary | {"seconds": seconds, "members": described, "note": NOTE})


class _SoupJudge:
    """Validation accuracy of weights, on one footing: this machine, and the photos as they are now.

    Attributes:
        scores: What was measured, in order: first each member alone, then the soups that were tried.
    """

    def __init__(self, run: Run, names: Sequence[str], progress: Progress) -> None:
        index = run.split
        labels = index.label_numbers()
        places = [place for place, photo in enumerate(index.photos) if photo.split == "val" and labels[place] >= 0]
        gone = [index.photos[place].path for place in places if not (index.root / index.photos[place].path).is_file()]
        if gone:
            raise RunError(
                f"{len(gone)} of the {len(places)} validation photos are not under {index.root} any more (the first is "
                f"{gone[0]!r}), and a soup is made by judging it on them: put them back, or make an ensemble"
            )
        self.scores: list[float] = []
        self._run, self._index, self._names, self._progress = run, index, names, progress
        self._numbers = np.asarray(places, np.int64)
        self._labels = labels[self._numbers]
        self._model = run.load_model()

    def __call__(self, weights: Any) -> float:
        from fieldmark.experiment.judging import predict_with

        self._model.load_state_dict(weights)
        found = predict_with(self._model, self._run, self._index, self._numbers, flips=False, progress=self._progress)
        score = top1(found, self._labels)
        what = self._names[len(self.scores)] if len(self.scores) < len(self._names) else "soup with one more"
        self._progress.message(f"{what}: top-1 {score:.4f}")
        self.scores.append(score)
        return score
