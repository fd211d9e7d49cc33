"""Converged heads on frozen features, cross-validated: what each ingredient of a head earns on several data sets.

    python -m experiments.heads birds100 signs10 elpv.csv --out docs/heads.md --features features

Each data set is a folder of photos or a table. Test photos are left out. What was computed before is kept in the folder
given by --features, so that an interrupted run goes on.

Shape letters: N photos, F features, K classes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.pages import make_parser, write_results
from fieldmark.budget.candidates import Candidate, View, find_backbones
from fieldmark.budget.heads import fit_head, refit_head
from fieldmark.budget.plan import Plan
from fieldmark.budget.race import Course, make_folds, stratified_order
from fieldmark.budget.team import Team
from fieldmark.config import Config, load_config
from fieldmark.data.loader import Batch
from fieldmark.models.classifier import Classifier
from fieldmark.progress import Quiet
from fieldmark.runs.dataset import Dataset, prepare_dataset
from fieldmark.runs.environment import processor_name, usable_cores
from fieldmark.runs.session import setup_fabric
from fieldmark.runs.train import StopRequest
from fieldmark.study.statistics import paired_difference
from fieldmark.training.metrics import log_loss

FOLDS = 3
PLAIN, POOLED, MIRRORED, CENTERED = "mean", "covariance", "mirror", "center"

Floats = NDArray[np.float32]


class Mirrored(Course):
    """Sees each picture's mirror image."""

    def _compute(self, model: Classifier, batch: Batch) -> Batch:
        return super()._compute(model, replace(batch, images=batch.images.flip(-1)))


@dataclass(frozen=True, eq=False)
class Trial:
    """One data set, with the features of its photos that are not of the test set."""

    data: Path
    folder: Path  # for what was computed

    @cached_property
    def config(self) -> Config:
        """Settings of everything but the pooling."""
        return load_config(None, [f'data.path="{self.data.resolve().as_posix()}"'])

    @cached_property
    def dataset(self) -> Dataset:
        """All photos."""
        return prepare_dataset(self.config.data, progress=Quiet())

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(N,) photos that take part."""
        split = np.asarray([photo.split for photo in self.dataset.index.photos])
        return np.flatnonzero((split != "test") & (self.dataset.labels >= 0))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class indices."""
        return self.dataset.labels[self.numbers]

    @cached_property
    def folds(self) -> NDArray[np.int64]:
        """(N,) fold of each photo."""
        groups = [self.dataset.index.photos[number].group for number in self.numbers]
        return make_folds(self.labels, groups, folds=FOLDS, seed=0)

    @cached_property
    def courses(self) -> dict[str, Course]:
        """Where features are computed, by their kind."""
        return {kind: self._open(kind) for kind in (PLAIN, POOLED, MIRRORED)}

    def _open(self, kind: str) -> Course:
        pool = "average" if kind == PLAIN else "covariance"
        config = load_config(None, [f'data.path="{self.data.resolve().as_posix()}"', f'model.pool="{pool}"'])
        team = Team(setup_fabric(config)[0], StopRequest())
        folder = self.folder / f"{self.data.stem}-{MIRRORED if kind == MIRRORED else pool}"
        folder.mkdir(parents=True, exist_ok=True)
        order = self.numbers[stratified_order(self.labels, seed=0)]
        plan = Plan(folder / "plan.jsonl", 1e9)
        make = Mirrored if kind == MIRRORED else Course
        return make(config, folder, plan, Quiet(), team, self.dataset, order, self.numbers[:0])

    def features(self, kind: str, name: str, view: View = "whole") -> Floats:
        """(N, F) features of a backbone at its own size."""
        course = self.courses[kind]
        (backbone,) = [one for one in find_backbones(course.config) if one.name == name]
        candidate = Candidate(backbone, backbone.picture.test_size, view)
        return course.collect_features(candidate, self.numbers).select(self.numbers)

    def answer(self, features: Floats) -> Floats:
        """(N, K) probabilities out of fold."""
        num_classes = len(self.dataset.index.classes)
        return fit_head(features, self.labels, self.folds, num_classes=num_classes).out_of_fold


def list_answers(trial: Trial, names: list[str]) -> dict[str, Floats]:
    """Out-of-fold probabilities by ingredient, on the first of these backbones where it takes but one."""
    first, *others = names
    pooled = trial.features(POOLED, first)
    answers = {
        PLAIN: trial.answer(trial.features(PLAIN, first)),
        POOLED: trial.answer(pooled),
        MIRRORED: trial.answer(np.float32(0.5) * (pooled + trial.features(MIRRORED, first))),
        CENTERED: trial.answer(trial.features(POOLED, first, "center")),
    }
    answers["both views"] = average([answers[POOLED], answers[CENTERED]])
    if others:
        everything = [pooled, *(trial.features(POOLED, name) for name in others)]
        answers["average"] = average([answers[POOLED], *map(trial.answer, everything[1:])])
        answers["one head"] = trial.answer(np.hstack(everything).astype(np.float32))
        answers["from the average"] = learn_unlabeled(trial, pooled, answers["average"])
    answers["from itself"] = learn_unlabeled(trial, pooled, answers[POOLED])
    return answers


def average(answers: list[Floats]) -> Floats:
    """The mean of some probabilities."""
    return np.asarray(np.mean(answers, axis=0), np.float32)


def learn_unlabeled(trial: Trial, features: Floats, teacher: Floats) -> Floats:
    """(N, K) probabilities after learning from unlabeled photos too, each as the class of which the teacher is surest.

    The teacher's answers are out of fold: no photo's own label takes part in its answer. One half of each fold is
    there without labels, and the other half is answered.
    """
    num_classes = len(trial.dataset.index.classes)
    head = fit_head(features, trial.labels, trial.folds, num_classes=num_classes)
    half = make_folds(trial.labels, [""] * len(trial.labels), folds=2, seed=1)
    found = np.empty_like(teacher)
    for fold, side in itertools.product(range(FOLDS), range(2)):
        is_tested = (trial.folds == fold) & (half == side)
        labels = np.where(trial.folds == fold, teacher.argmax(1), trial.labels)
        learned = refit_head(features[~is_tested], labels[~is_tested], head).as_linear()
        with torch.inference_mode():
            found[is_tested] = learned(torch.from_numpy(features[is_tested])).softmax(1).numpy()
    return found


QUESTIONS = (
    ("covariance pooling in place of the mean", PLAIN, POOLED),
    ("mean of the features of a photo and its mirror image", POOLED, MIRRORED),
    ("the middle of the photo in place of all of it", POOLED, CENTERED),
    ("average of heads on all of the photo and on its middle", POOLED, "both views"),
    ("average of heads on three backbones", POOLED, "average"),
    ("one head on the features of three backbones, beside the average of three", "average", "one head"),
    ("a quarter as many unlabeled photos, named by the head itself", POOLED, "from itself"),
    ("a quarter as many unlabeled photos, named by the average of three", POOLED, "from the average"),
)


def compare(trial: Trial, names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each question: accuracy with and without, and the difference with its interval."""
    answers, labels = list_answers(trial, names), trial.labels
    rows: list[dict[str, Any]] = []
    for question, before, after in QUESTIONS:
        if before not in answers or after not in answers:
            continue
        hits = [(answers[name].argmax(1) == labels).astype(np.float64)[None] for name in (before, after)]
        gain = paired_difference(*hits, level=0.95).interval
        rows.append(
            {"question": question, "data": trial.data.stem, "photos": len(labels)}
            | {"before": float(hits[0].mean()), "after": float(hits[1].mean())}
            | {"log_loss_before": log_loss(answers[before], labels), "log_loss_after": log_loss(answers[after], labels)}
            | {"gain": gain.estimate, "low": gain.low, "high": gain.high}
        )
    return rows


def write_page(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the rows as a page, a table for each question."""
    lines = [
        "# What each ingredient of a head earns",
        "",
        f"Converged heads on frozen features of {names[0]} at its test size, or of {len(names)} backbones "
        f"({', '.join(names)}) where the",
        f"question says so, cross-validated in {FOLDS} folds of the photos that are not of the test set. "
        f"{usable_cores()} cores of an {processor_name()}, one seed.",
        "`python -m experiments.heads` writes this page. A gain whose interval holds 0 may be none.",
    ]
    for question, _, _ in QUESTIONS:
        found = [row for row in rows if row["question"] == question]
        if not found:
            continue
        lines += [
            "",
            f"## {question[0].upper()}{question[1:]}",
            "",
            "| Data | Photos | Top-1 without | Top-1 with | Gain in points, 95 % interval | Log loss without | with |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
        ]
        for row in found:
            gain, low, high = (100 * row[name] for name in ("gain", "low", "high"))
            before, after, loss, lower = (
                f"{row[name]:.3f}" for name in ("before", "after", "log_loss_before", "log_loss_after")
            )
            lines.append(
                f"| {row['data']} | {row['photos']} | {before} | {after} | {gain:+.1f} ({low:+.1f} to {high:+.1f}) | "
                f"{loss} | {lower} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and write the page and its rows."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    settings = parser.parse_args()
    names = [one.name for one in find_backbones(load_config(None, []))]
    rows: list[dict[str, Any]] = []
    for data in settings.data:
        rows += compare(Trial(data, settings.features), names)
        write_results(settings.out, rows, write_page(rows, names))


if __name__ == "__main__":
    main()
