"""Where the class is not sure, the group that is: thresholds for the levels of a taxonomy, and what they come to.

Letters: N photos, K classes, L levels (level 0 is the class itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.engine.coverage import coverage_curve, threshold_for_accuracy
from fieldmark.errors import DataError
from fieldmark.outputs.taxonomy import Answer, Taxonomy, back_off, build_taxonomy

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
