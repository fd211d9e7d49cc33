"""An ensemble in a run folder: its members, and the mean of what they say.

`ensemble.json` names the members; each lies in `members/` with all that it needs to predict. Classes are aligned by
name. Shape letters: N photos, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fieldmark.engine.calibrate import apply_temperature, log_probabilities
from fieldmark.errors import RunError
from fieldmark.experiment.folder import ENSEMBLE, MEMBERS, Run


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an ensemble.

    Attributes:
        run: What it needs to predict, as a run.
        temperature: Divides its logits, > 0.
        order: (K,) for each class of the ensemble, its number among the member's classes.
    """

    run: Run
    temperature: float
    order: NDArray[np.int64]


def load_members(run: Run) -> tuple[Member, ...]:
    """The members of an ensemble, in the order in which they were given.

    Raises:
        RunError: A member is missing or knows other classes.
    """
    try:
        rows = [(str(row["folder"]), float(row["temperature"])) for row in run.ensemble_info["members"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.path / ENSEMBLE} is not the list of an ensemble's members: {error!r}") from None
    members: list[Member] = []
    for name, temperature in rows:
        member = Run(run.path / MEMBERS / name)
        order = class_order(member.classes, run.classes)
        if order is None:
            raise RunError(f"{run.path / ENSEMBLE} names {member.path}, whose classes are not the ensemble's")
        members.append(Member(member, temperature, order))
    return tuple(members)


def class_order(own: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64] | None:
    """(K,) the place in `own` of each name of `wanted`; None unless both hold the same names."""
    if sorted(own) != sorted(wanted):
        return None
    place = {name: number for number, name in enumerate(own)}
    return np.asarray([place[name] for name in wanted], np.int64)


def mean_probabilities(
    probabilities: Sequence[NDArray[np.float32]], temperatures: Sequence[float], orders: Sequence[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """What an ensemble says: the mean of its members' calibrated probabilities.

    Every use of an ensemble comes through here with its members' float32 probabilities, so that stored predictions and
    new ones of the same photos are the same to the bit.

    Args:
        probabilities: (N, K) of each member at temperature 1, in its own order of classes.
        temperatures: Of each member, > 0.
        orders: As `Member.order`.

    Returns:
        (N, K) in the ensemble's order of classes; NaN for a photo that could not be read.

    Source:
        Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles",
        arXiv:1612.01474, section 2.4.
    """
    calibrated = [
        apply_temperature(log_probabilities(rows[:, order]), temperature)
        for rows, temperature, order in zip(probabilities, temperatures, orders, strict=True)
    ]
    return np.mean(calibrated, axis=0).astype(np.float32)
