"""Hierarchical fallback: where the species is not sure, answer with the genus or the family that is.

A taxonomy is a table with one row per class: its first column holds the class names, each further column a coarser
level. Letters: N photos, K classes, L levels (level 0 is the class itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.folders import NONE
from fieldmark.data.tables import read_table
from fieldmark.errors import DataError
from fieldmark.runs.folder import Run


@dataclass(frozen=True)
class Taxonomy:
    """A tree over the classes."""

    levels: tuple[str, ...]  # (L,) from fine to coarse; the first is the class
    nodes: tuple[tuple[str, ...], ...]  # for each level, the names of its groups, in order of first appearance
    members: NDArray[np.int64]  # (L, K) index of the group, within its level, that each class belongs to

    def at_level(self, probabilities: NDArray[np.floating[Any]], level: int) -> NDArray[np.float64]:
        """(N, K) probabilities of the classes summed to (N, groups of `level`)."""
        sums = np.zeros((len(probabilities), len(self.nodes[level])))
        for number, group in enumerate(self.members[level]):
            sums[:, group] += probabilities[:, number]
        return sums


class Answer(NamedTuple):
    """The finest answer that is sure enough; level and name are "" for unknown."""

    level: str  # "class" where there is no taxonomy
    name: str
    probability: float  # summed over the group; for unknown, that of the likeliest group of the coarsest level


def load_taxonomy(path: Path, classes: Sequence[str]) -> Taxonomy:
    """Read a table: a header, then a row per class, its name and its groups from fine to coarse; others are skipped."""
    table = read_table(path)
    levels = tuple(table.values)
    if len(levels) < 2:
        raise DataError(f"the taxonomy {path} needs a header such as class,genus,family and a row for each class")
    rows: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(zip(*(table.column(level) for level in levels), strict=True)):
        if not all(cell.strip() for cell in row):
            raise DataError(
                f"{table.where(number)}: expected {len(levels)} filled cells ({', '.join(levels)}); got {list(row)}"
            )
        if row[0] in rows:
            raise DataError(f"{table.where(number)}: the class {row[0]!r} has a row already")
        rows[row[0]] = row
    rows.setdefault(NONE, (NONE,) * len(levels))
    missing = [name for name in classes if name not in rows]
    if missing:
        raise DataError(
            f"the taxonomy {path} lacks {len(missing)} of {len(classes)} classes: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Add a row for each, its name written as the class folder's"
        )
    return build_taxonomy(levels, [rows[name] for name in classes])


def build_taxonomy(levels: Sequence[str], rows: Sequence[Sequence[str]]) -> Taxonomy:
    """A taxonomy from one row per class, in order of class index; a DataError says what makes it no tree."""
    columns = list(zip(*rows, strict=True))
    nodes = [tuple(dict.fromkeys(column)) for column in columns]
    members = np.array([[names.index(name) for name in column] for names, column in zip(nodes, columns, strict=True)])
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
    """The finest level whose likeliest group is sure enough, for each of N photos.

    Takes calibrated (N, K) probabilities and the (L,) least summed probability at each level; None for a level that is
    not used.

    Source:
        Deng et al., "Hedging Your Bets: Optimizing Accuracy-Specificity Trade-offs in Large Scale Visual Recognition",
        CVPR 2012, section 3 (the posterior of a node is the sum over its leaves); the plain maximum-posterior baseline
        with one threshold per level, not their search for a dual variable.
    """
    sums = [taxonomy.at_level(probabilities, level) for level in range(len(taxonomy.levels))]
    best, top = (np.array([getattr(level, kind)(axis=1) for level in sums]) for kind in ("argmax", "max"))
    is_sure = top >= np.array([np.inf if threshold is None else threshold for threshold in thresholds])[:, None]
    answers: list[Answer] = []
    for row in range(len(probabilities)):
        level = next(iter(np.flatnonzero(is_sure[:, row]).tolist()), None)
        if level is None:
            answers.append(Answer("", "", float(top[-1, row])))
        else:
            group = taxonomy.nodes[level][best[level, row]]
            answers.append(Answer(taxonomy.levels[level], group, float(top[level, row])))
    return answers


@dataclass(frozen=True, slots=True)
class LevelScore:
    """Says how one level answers photos that nothing was fitted on."""

    level: str
    answered: float  # share of all photos that are answered at this level, in [0, 1]
    right: float | None  # share of right answers among them; None where none is answered


def score_levels(
    probabilities: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    taxonomy: Taxonomy,
    thresholds: Sequence[float | None],
) -> tuple[LevelScore, ...]:
    """Return how each level answers these photos, by (N, K) probabilities and (N,) labels."""
    answers = find_answers(probabilities, taxonomy, thresholds=thresholds)
    scores: list[LevelScore] = []
    for name, nodes, members in zip(taxonomy.levels, taxonomy.nodes, taxonomy.members, strict=True):
        true = [nodes[group] for group in members[labels]]
        right = [answer.name == want for answer, want in zip(answers, true, strict=True) if answer.level == name]
        scores.append(LevelScore(name, len(right) / len(answers), float(np.mean(right)) if right else None))
    return tuple(scores)


@dataclass(frozen=True)
class Fallback:
    """A taxonomy over the classes of the model, with the least probability that counts as an answer at each level."""

    taxonomy: Taxonomy
    thresholds: tuple[float | None, ...]  # (L,) in [0, 1]; None for a level that was never right often enough
    scores: tuple[LevelScore, ...]  # (L,) evidence for them

    def answer(self, probabilities: NDArray[np.floating[Any]]) -> Answer:
        """The finest answer that is sure enough, for the (K,) probabilities of one photo."""
        return find_answers(probabilities[None], self.taxonomy, thresholds=self.thresholds)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        nodes, members = self.taxonomy.nodes, self.taxonomy.members.T.tolist()
        return {
            "levels": list(self.taxonomy.levels),
            "thresholds": list(self.thresholds),
            "scores": [asdict(score) for score in self.scores],
            "rows": [[names[group] for names, group in zip(nodes, groups, strict=True)] for groups in members],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, num_classes: int) -> Fallback:
        """Read what `to_dict` wrote; a DataError says which value is missing or not what it should be."""
        try:
            levels, rows, thresholds = values["levels"], values["rows"], tuple(values["thresholds"])
            if len(rows) != num_classes or any(len(row) != len(levels) for row in rows):
                raise ValueError(f"rows (expected {num_classes} of {len(levels)} names)")
            if len(thresholds) != len(levels) or not all(t is None or 0 <= t <= 1 for t in thresholds):
                raise ValueError(f"thresholds (expected {len(levels)} from 0 to 1; got {list(thresholds)})")
            return cls(build_taxonomy(levels, rows), thresholds, tuple(LevelScore(**row) for row in values["scores"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the taxonomy of the calibration lacks {error}: calibrate again") from None


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


def taxonomy_scores(run: Run, table: Path) -> dict[str, float]:
    """Accuracy of a run's stored validation predictions at each level, each by its own summed probabilities."""
    stored, tree = run.predictions("val"), load_taxonomy(table, run.classes)
    guesses = [tree.at_level(stored.probabilities, level).argmax(axis=1) for level in range(len(tree.levels))]
    hits = np.array(guesses) == tree.members[:, stored.labels]
    return dict(zip(tree.levels, hits.mean(axis=1).tolist(), strict=True))
