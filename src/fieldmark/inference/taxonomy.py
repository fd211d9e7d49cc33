"""Hierarchical fallback: where the species is not sure, answer with the genus or the family that is.

A taxonomy is a table with one row per class: its first column holds the class names, each further column a coarser
level. Letters: N photos, K classes, L levels (level 0 is the class itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.tables import read_table
from fieldmark.errors import DataError
from fieldmark.inference.coverage import coverage_curve, threshold_for_accuracy

if TYPE_CHECKING:
    from fieldmark.runs.folder import Run

_NEVER = 2.0  # no probability reaches it
_ROUNDING = 1e-6  # of summed float32 probabilities


@dataclass(frozen=True)
class Taxonomy:
    """A tree over the classes.

    Attributes:
        levels: (L,) names of the levels, from fine to coarse; the first is the class.
        nodes: For each level, the names of its groups, in order of first appearance.
        members: (L, K) index of the group, within its level, that each class belongs to.
    """

    levels: tuple[str, ...]
    nodes: tuple[tuple[str, ...], ...]
    members: NDArray[np.int64]

    def at_level(self, probabilities: NDArray[np.floating[Any]], level: int) -> NDArray[np.float64]:
        """(N, K) probabilities of the classes summed to (N, groups of `level`)."""
        sums = np.zeros((len(probabilities), len(self.nodes[level])))
        for number, group in enumerate(self.members[level]):
            sums[:, group] += probabilities[:, number]
        return sums


@dataclass(frozen=True, slots=True)
class Answer:
    """The finest answer that is sure enough.

    Attributes:
        level: Name of the level ("class" where there is no taxonomy), or "" for unknown.
        name: Name of the group at that level, or "" for unknown.
        probability: Summed probability of the group; for unknown, that of the likeliest group of the coarsest level.
    """

    level: str
    name: str
    probability: float


def load_taxonomy(path: Path, classes: Sequence[str]) -> Taxonomy:
    """Read a table: a header, then one row per class, its name first and then its groups from fine to coarse.

    Args:
        path: The table, in any form that `data.tables.read_table` takes. Rows of other classes are skipped.
        classes: Class names in order of class index.

    Raises:
        DataError: The table cannot be read, lacks a class, names one twice, has empty cells, or is not a tree.
    """
    table = read_table(path)
    levels = tuple(table.values)
    if len(levels) < 2:
        raise DataError(f"the taxonomy {path} needs a header such as class,genus,family and a row for each class")
    rows: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(zip(*(table.column(level) for level in levels), strict=True), start=2):
        if not all(cell.strip() for cell in row):
            raise DataError(
                f"{path}, row {number}: expected {len(levels)} filled cells ({', '.join(levels)}); got {list(row)}"
            )
        if row[0] in rows:
            raise DataError(f"{path}, row {number}: the class {row[0]!r} has a row already")
        rows[row[0]] = row
    missing = [name for name in classes if name not in rows]
    if missing:
        raise DataError(
            f"the taxonomy {path} lacks {len(missing)} of {len(classes)} classes: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Add a row for each, its name written as the class folder's"
        )
    return build_taxonomy(levels, [rows[name] for name in classes])


def build_taxonomy(levels: Sequence[str], rows: Sequence[Sequence[str]]) -> Taxonomy:
    """A taxonomy from one row per class, in order of class index.

    Raises:
        DataError: A group of one level is in two groups of the next: that is not a tree.
    """
    nodes: list[tuple[str, ...]] = []
    members = np.empty((len(levels), len(rows)), np.int64)
    for level in range(len(levels)):
        names = tuple(dict.fromkeys(row[level] for row in rows))
        nodes.append(names)
        members[level] = [names.index(row[level]) for row in rows]
    for level in range(len(levels) - 1):
        for group, name in enumerate(nodes[level]):
            above = np.unique(members[level + 1][members[level] == group])
            if len(above) > 1:
                parents = ", ".join(repr(nodes[level + 1][number]) for number in above)
                raise DataError(
                    f"the {levels[level]} {name!r} is in more than one {levels[level + 1]} ({parents}): not a tree"
                )
    return Taxonomy(tuple(levels), tuple(nodes), members)


def find_answers(
    probabilities: NDArray[np.floating[Any]], taxonomy: Taxonomy, *, thresholds: Sequence[float | None]
) -> list[Answer]:
    """The finest level whose likeliest group is sure enough, for each photo.

    Args:
        probabilities: (N, K), calibrated.
        taxonomy: Over the same K classes.
        thresholds: (L,) least summed probability at each level, in [0, 1]; None for a level that is not used.

    Source:
        Deng et al., "Hedging Your Bets: Optimizing Accuracy-Specificity Trade-offs in Large Scale Visual Recognition",
        CVPR 2012, section 3 (the posterior of a node is the sum over its leaves); the plain maximum-posterior baseline
        with one threshold per level, not their search for a dual variable.
    """
    if len(thresholds) != len(taxonomy.levels):
        raise DataError(f"give a threshold for each level ({', '.join(taxonomy.levels)}); got {list(thresholds)}")
    answers = [Answer("", "", 0.0)] * len(probabilities)
    is_open = np.ones(len(probabilities), bool)
    for level, name in enumerate(taxonomy.levels):
        threshold = thresholds[level]
        threshold = _NEVER if threshold is None else threshold
        sums = taxonomy.at_level(probabilities, level)
        best, top = sums.argmax(axis=1), sums.max(axis=1)
        for row in np.flatnonzero(is_open):
            if top[row] >= threshold:
                answers[row] = Answer(name, taxonomy.nodes[level][best[row]], float(top[row]))
            elif level == len(taxonomy.levels) - 1:
                answers[row] = Answer("", "", float(top[row]))
        is_open &= ~(top >= threshold)
    return answers


@dataclass(frozen=True, slots=True)
class LevelScore:
    """How one level answers photos that nothing was fitted on.

    Attributes:
        level: Its name.
        answered: Share of all photos that are answered at this level, in [0, 1].
        right: Share of right answers among them; None where none is answered.
    """

    level: str
    answered: float
    right: float | None


@dataclass(frozen=True)
class Fallback:
    """A taxonomy with the least probability that counts as an answer at each of its levels.

    Attributes:
        taxonomy: Over the classes of the model.
        thresholds: (L,) in [0, 1]; None for a level that is not used, because it was never right often enough.
        scores: (L,) evidence for them.
    """

    taxonomy: Taxonomy
    thresholds: tuple[float | None, ...]
    scores: tuple[LevelScore, ...]

    def answer(self, probabilities: NDArray[np.floating[Any]]) -> Answer:
        """The finest answer that is sure enough, for the (K,) probabilities of one photo."""
        return find_answers(probabilities[None], self.taxonomy, thresholds=self.thresholds)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        taxonomy = self.taxonomy
        rows = [
            [names[group] for names, group in zip(taxonomy.nodes, groups, strict=True)]
            for groups in taxonomy.members.T.tolist()
        ]
        return {
            "levels": list(taxonomy.levels),
            "thresholds": list(self.thresholds),
            "scores": [asdict(score) for score in self.scores],
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, num_classes: int) -> Fallback:
        """Read what `to_dict` wrote, for a model of `num_classes` classes.

        Raises:
            DataError: A value is missing or not what it should be.
        """
        try:
            levels, rows, thresholds = values["levels"], values["rows"], tuple(values["thresholds"])
            if len(rows) != num_classes or any(len(row) != len(levels) for row in rows):
                raise ValueError(f"rows (expected {num_classes} of {len(levels)} names)")
            if len(thresholds) != len(levels) or not all(t is None or 0 <= t <= 1 for t in thresholds):
                raise ValueError(f"thresholds (expected {len(levels)} from 0 to 1; got {list(thresholds)})")
            return cls(build_taxonomy(levels, rows), thresholds, tuple(LevelScore(**row) for row in values["scores"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the taxonomy of the calibration lacks {error}: calibrate again") from None


def fit_fallback(
    probabilities: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    taxonomy: Taxonomy,
    *,
    threshold: float,
    accuracy: float,
    assurance: float,
) -> Fallback:
    """Thresholds from fine to coarse, each chosen on the photos that no finer level answers.

    So the answers of every level are as accurate as wanted, and not only those of all levels together.

    Args:
        probabilities: (N, K), cross-fitted: of photos that no temperature was fitted on.
        labels: (N,) class indices.
        taxonomy: Over the same K classes.
        threshold: Of the class itself.
        accuracy: Wanted of the answers of each coarser level, in (0, 1].
        assurance: Confidence level, as in `threshold_for_accuracy`.
    """
    thresholds: list[float | None] = [threshold]
    is_open = probabilities.max(axis=1) < threshold
    for level in range(1, len(taxonomy.levels)):
        sums = taxonomy.at_level(probabilities, level)
        confidence, is_right = sums.max(axis=1), sums.argmax(axis=1) == taxonomy.members[level][labels]
        found = None
        if is_open.any():
            try:
                curve = coverage_curve(confidence[is_open], is_right[is_open])
                found = max(0.0, threshold_for_accuracy(curve, accuracy, assurance=assurance) - _ROUNDING)
                is_open &= confidence < found
            except DataError:
                pass  # never right often enough, or too few to show it: the next level may be
        thresholds.append(found)
    answers = find_answers(probabilities, taxonomy, thresholds=thresholds)
    scores: list[LevelScore] = []
    for level, name in enumerate(taxonomy.levels):
        true = [taxonomy.nodes[level][group] for group in taxonomy.members[level][labels]]
        right = [answer.name == want for answer, want in zip(answers, true, strict=True) if answer.level == name]
        scores.append(LevelScore(name, len(right) / len(answers), float(np.mean(right)) if right else None))
    return Fallback(taxonomy, tuple(thresholds), tuple(scores))


def describe_fallback(found: Fallback) -> str:
    """A line for each level, for people."""
    width = max(len(score.level) for score in found.scores)
    lines: list[str] = []
    for score, threshold in zip(found.scores, found.thresholds, strict=True):
        if threshold is None:
            said = "is not used: it is not right often enough, or too few photos are left to show it"
        else:
            right = "none" if score.right is None else f"{score.right:.1%} of these are right"
            said = f"answers {score.answered:.1%} of the photos, from a probability of {threshold:.3f}; {right}"
        lines.append(f"{score.level:{width}}  {said}")
    unknown = 1 - sum(score.answered for score in found.scores)
    return "\n".join([*lines, f"unknown remain {unknown:.1%} of the photos"])


def hierarchical_accuracy(
    probabilities: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], taxonomy: Taxonomy
) -> dict[str, float]:
    """Accuracy at each level, each by its own summed probabilities, and how far mistakes miss.

    Args:
        probabilities: (N, K), N at least 1.
        labels: (N,) class indices.
        taxonomy: Over the same K classes.

    Returns:
        {level: accuracy in [0, 1]} for each level, and "mistake_height": over the photos whose class is wrong, the
        mean number of levels up to the lowest common group, from 1 (same genus) to L (nothing in common); 0 without
        mistakes.

    Source:
        Bertinetto et al., "Making Better Mistakes", arXiv:1912.09393, section 3 (height of the lowest common ancestor
        of mistakes).
    """
    if not len(labels):
        raise DataError("hierarchical accuracy takes at least one labeled photo; got none")
    accuracies: dict[str, float] = {}
    for level, name in enumerate(taxonomy.levels):
        guessed = taxonomy.at_level(probabilities, level).argmax(axis=1)
        accuracies[name] = float((guessed == taxonomy.members[level][labels]).mean())
    guessed = np.asarray(probabilities).argmax(axis=1)
    shared = taxonomy.members[:, guessed] == taxonomy.members[:, labels]
    # In a tree a shared level implies that all above are shared, so the unshared ones count the height.
    heights = (~shared).sum(axis=0)[guessed != labels]
    return {**accuracies, "mistake_height": float(heights.mean()) if len(heights) else 0.0}


def taxonomy_scores(run: Run, table: Path) -> dict[str, float]:
    """`hierarchical_accuracy` of a run's stored validation predictions.

    Raises:
        DataError: The table does not fit the run's classes.
        RunError: No validation predictions are stored.
    """
    stored = run.predictions("val")
    return hierarchical_accuracy(stored.probabilities, stored.labels, load_taxonomy(table, run.classes))


def describe_scores(scores: dict[str, float]) -> str:
    """A line for each of `hierarchical_accuracy`, for people."""
    height = scores["mistake_height"]
    lines = [
        f"right at the level of {level}: {score:.1%}" for level, score in scores.items() if level != "mistake_height"
    ]
    return "\n".join([*lines, f"mistakes are {height:.2f} levels off on average (1: the group above is still right)"])
