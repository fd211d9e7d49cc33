"""Answers at the level that is sure: species, else genus, else family.

A taxonomy is a table with one row per class: its first column holds the class names, each further column a coarser
level. Letters: N photos, K classes, L levels (level 0 is the class itself).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import DataError
from fieldmark.inference.calibration import coverage_curve, threshold_for_accuracy

if TYPE_CHECKING:
    from fieldmark.runs.folder import Run


@dataclass(frozen=True)
class Taxonomy:
    """A tree over the classes.

    Attributes:
        levels: (L,) names of the levels, from fine to coarse; the first is the class.
        nodes: For each level, the names of its groups, in order of first appearance.
        members: (L, K) number of the group, within its level, that each class belongs to.
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
    """Read a CSV table: a header, then one row per class, its name first and then its groups from fine to coarse.

    Args:
        path: The table. Rows of classes that the model does not know are left aside.
        classes: Class names in order of class number.

    Raises:
        DataError: The table cannot be read, lacks a class, names one twice, has empty cells, or is not a tree.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the taxonomy {path} cannot be read: {error}") from None
    if not rows or len(rows[0]) < 2:
        raise DataError(f"the taxonomy {path} needs a header such as class,genus,family and a row for each class")
    levels = tuple(rows[0])
    table: dict[str, list[str]] = {}
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(levels) or not all(cell.strip() for cell in row):
            raise DataError(f"{path}, row {line}: expected {len(levels)} filled cells ({', '.join(levels)}); got {row}")
        if row[0] in table:
            raise DataError(f"{path}, row {line}: the class {row[0]!r} has a row already")
        table[row[0]] = row
    missing = [name for name in classes if name not in table]
    if missing:
        raise DataError(
            f"the taxonomy {path} lacks {len(missing)} of {len(classes)} classes: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Add a row for each, its name written as the class folder's"
        )
    return build_taxonomy(levels, [table[name] for name in classes])


def build_taxonomy(levels: Sequence[str], rows: Sequence[Sequence[str]]) -> Taxonomy:
    """A taxonomy from one row per class, in order of class number.

    Raises:
        DataError: A group of one level lies in two groups of the next: that is not a tree.
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
                    f"the {levels[level]} {name!r} lies in more than one {levels[level + 1]} ({parents}): not a tree"
                )
    return Taxonomy(tuple(levels), tuple(nodes), members)


def back_off(
    probabilities: NDArray[np.floating[Any]], taxonomy: Taxonomy, *, thresholds: Sequence[float]
) -> list[Answer]:
    """The finest level whose likeliest group is sure enough, for each photo.

    Args:
        probabilities: (N, K), calibrated.
        taxonomy: Over the same K classes.
        thresholds: (L,) least summed probability at each level, in [0, 1].

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
        sums = taxonomy.at_level(probabilities, level)
        best, top = sums.argmax(axis=1), sums.max(axis=1)
        for row in np.flatnonzero(is_open):
            if top[row] >= thresholds[level]:
                answers[row] = Answer(name, taxonomy.nodes[level][best[row]], float(top[row]))
            elif level == len(taxonomy.levels) - 1:
                answers[row] = Answer("", "", float(top[row]))
        is_open &= top < thresholds[level]
    return answers


def hierarchical_accuracy(
    probabilities: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], taxonomy: Taxonomy
) -> dict[str, float]:
    """Accuracy at each level, each judged by its own summed probabilities, and how far mistakes miss.

    Args:
        probabilities: (N, K), N at least 1.
        labels: (N,) class numbers.
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
        raise DataError("hierarchical accuracy takes at least one labelled photo; got none")
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


_NEVER = 2.0  # no probability reaches it
_ROUNDING = 1e-6  # of summed float32 probabilities


@dataclass(frozen=True, slots=True)
class LevelScore:
    """What one level answers, on photos that nothing was fitted on.

    Attributes:
        level: Its name.
        answered: Share of all photos that are answered at this level, in [0, 1].
        right: Share of right answers among them; None where none is answered.
    """

    level: str
    answered: float
    right: float | None


@dataclass(frozen=True)
class BackOff:
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
        return back_off(probabilities[None], self.taxonomy, thresholds=_numbers(self.thresholds))[0]

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
    def from_dict(cls, values: Mapping[str, Any]) -> BackOff:
        """Read back what `to_dict` wrote.

        Raises:
            DataError: A value is missing.
        """
        try:
            taxonomy = build_taxonomy(values["levels"], values["rows"])
            scores = tuple(LevelScore(**score) for score in values["scores"])
            return cls(taxonomy, tuple(values["thresholds"]), scores)
        except (KeyError, TypeError) as error:
            raise DataError(f"the taxonomy of the calibration lacks {error}: calibrate again") from None


def fit_back_off(
    probabilities: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    taxonomy: Taxonomy,
    *,
    threshold: float,
    accuracy: float,
    assurance: float,
) -> BackOff:
    """Thresholds from fine to coarse, each chosen on the photos that no finer level answers.

    So the answers of every level are as accurate as wanted, and not only those of all levels together.

    Args:
        probabilities: (N, K), cross-fitted: of photos that no temperature was fitted on.
        labels: (N,) class numbers.
        taxonomy: Over the same K classes.
        threshold: Of the class itself.
        accuracy: Wanted of the answers of each coarser level, in (0, 1].
        assurance: See `engine.coverage.threshold_for_accuracy`.
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
            except DataError:
                pass  # never right often enough, or too few to show it: the next level may be
        thresholds.append(found)
        is_open &= confidence < (_NEVER if found is None else found)
    scores = _scores(probabilities, labels, taxonomy, thresholds)
    return BackOff(taxonomy, tuple(thresholds), scores)


def describe_back_off(found: BackOff) -> str:
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


def _scores(
    probabilities: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    taxonomy: Taxonomy,
    thresholds: Sequence[float | None],
) -> tuple[LevelScore, ...]:
    answers = back_off(probabilities, taxonomy, thresholds=_numbers(thresholds))
    scores: list[LevelScore] = []
    for level, name in enumerate(taxonomy.levels):
        places = [place for place, answer in enumerate(answers) if answer.level == name]
        true = [taxonomy.nodes[level][taxonomy.members[level][labels[place]]] for place in places]
        right = [answers[place].name == want for place, want in zip(places, true, strict=True)]
        scores.append(LevelScore(name, len(places) / len(answers), float(np.mean(right)) if right else None))
    return tuple(scores)


def _numbers(thresholds: Sequence[float | None]) -> list[float]:
    return [_NEVER if threshold is None else threshold for threshold in thresholds]
