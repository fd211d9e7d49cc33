"""Hierarchical fallback: where the species is not sure, answer with the genus or the family that is.

A taxonomy is a table with one row per class: its first column holds the class names, each further column a coarser
level. Letters: N photos, K classes, L levels (level 0 is the class itself).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.folders import NONE
from fieldmark.data.tables import read_table
from fieldmark.errors import DataError
from fieldmark.files import Share, fill_template
from fieldmark.runs.folder import Run
from fieldmark.training.metrics import Floats, Ints


@dataclass(frozen=True)
class Taxonomy:
    """A tree over the classes; a DataError says what makes it none."""

    levels: tuple[str, ...]  # (L,) from fine to coarse; the first is the class
    rows: tuple[tuple[str, ...], ...]  # (K, L) names: of each class, in order of class index, and of its groups

    def __post_init__(self) -> None:
        if any(len(row) != len(self.levels) for row in self.rows):
            raise DataError(f"the taxonomy has rows of other than {len(self.levels)} names ({', '.join(self.levels)})")
        for level, kind in enumerate(self.levels[1:]):
            above: dict[str, str] = {}
            for row in self.rows:
                if (other := above.setdefault(row[level], row[level + 1])) != row[level + 1]:
                    raise DataError(
                        f"the {self.levels[level]} {row[level]!r} is in more than one {kind} ({other!r}, "
                        f"{row[level + 1]!r}): not a tree"
                    )

    @cached_property
    def nodes(self) -> tuple[tuple[str, ...], ...]:
        """For each level, the names of its groups, in order of first appearance."""
        return tuple(tuple(dict.fromkeys(column)) for column in zip(*self.rows, strict=True))

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """(L, K) index of the group, within its level, that each class belongs to."""
        columns = zip(self.nodes, zip(*self.rows, strict=True), strict=True)
        return np.array([[names.index(name) for name in column] for names, column in columns])

    def at_level(self, probabilities: Floats, level: int) -> NDArray[np.float64]:
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
    return Taxonomy(levels, tuple(rows[name] for name in classes))


def find_answers(probabilities: Floats, taxonomy: Taxonomy, *, thresholds: Sequence[float | None]) -> list[Answer]:
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
    """Says how one level answers the photos that its threshold was chosen on."""

    level: str
    answered: float  # share of all photos that are answered at this level, in [0, 1]
    right: float | None  # share of right answers among them; None where none is answered


def score_levels(
    probabilities: Floats, labels: Ints, taxonomy: Taxonomy, thresholds: Sequence[float | None]
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
class Fallback(Taxonomy):
    """A taxonomy over the classes of the model, with the least probability that counts as an answer at each level."""

    thresholds: tuple[Share | None, ...]  # (L,); None for a level that was never right often enough
    scores: tuple[LevelScore, ...]  # (L,) evidence for them

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.thresholds) != len(self.levels):
            raise DataError(f"the taxonomy has {len(self.levels)} levels and {len(self.thresholds)} thresholds")

    def answer(self, probabilities: Floats) -> Answer:
        """The finest answer that is sure enough, for the (K,) probabilities of one photo."""
        return find_answers(probabilities[None], self, thresholds=self.thresholds)[0]


def describe_fallback(found: Fallback) -> str:
    """A line for each level, for people."""
    return fill_template("fallback.md", {"found": found})


def taxonomy_scores(run: Run, table: Path) -> dict[str, float]:
    """Accuracy of a run's stored validation predictions at each level, each by its own summed probabilities."""
    stored, tree = run.predictions("val"), load_taxonomy(table, run.classes)
    guesses = [tree.at_level(stored.probabilities, level).argmax(axis=1) for level in range(len(tree.levels))]
    hits = np.array(guesses) == tree.members[:, stored.labels]
    return dict(zip(tree.levels, hits.mean(axis=1).tolist(), strict=True))
