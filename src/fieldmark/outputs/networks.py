"""The network of a run, or the networks of an ensemble, as one function from pictures to logits.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError

if TYPE_CHECKING:
    from fieldmark.data.loader import Batch
    from fieldmark.engine.evaluate import Predictions
    from fieldmark.experiment.folder import Run
    from fieldmark.vision.augment import EvalSpec
    from fieldmark.vision.views import Views

Logits = Callable[["Batch"], NDArray[np.floating[Any]]]


def open_networks(run: Run, *, flips: bool) -> tuple[EvalSpec | Views, Logits]:
    """How a photo becomes pictures, and what turns a batch of them into (B, K) logits.

    The logits of an ensemble are the logarithms of its mean probabilities.

    Args:
        run: A run or an ensemble.
        flips: Average the logits of each photo and its mirror image, in each network.

    Raises:
        RunError: There are no weights yet.
    """
    if not run.is_ensemble:
        predict = _open(run, flips=flips)
        return run.eval_spec(), lambda batch: predict(batch).logits

    from fieldmark.engine.calibrate import log_probabilities
    from fieldmark.experiment.ensemble import load_members, mean_probabilities
    from fieldmark.vision.views import join_specs, split_views

    members = load_members(run)
    specs = [member.run.eval_spec() for member in members]
    networks = [_open(member.run, flips=flips) for member in members]
    joined = join_specs(specs)

    def logits(batch: Batch) -> NDArray[np.floating[Any]]:
        views = split_views(batch.images, joined)
        answers = [
            predict(replace(batch, images=views[spec])).probabilities()
            for predict, spec in zip(networks, specs, strict=True)
        ]
        mean = mean_probabilities(
            answers, [member.temperature for member in members], [member.order for member in members]
        )
        return log_probabilities(mean)

    return joined, logits


def _open(run: Run, *, flips: bool) -> Callable[[Batch], Predictions]:
    import torch

    from fieldmark.engine.evaluate import predict_batches
    from fieldmark.experiment.folder import WEIGHTS
    from fieldmark.experiment.judging import open_fabric

    if not (run.path / WEIGHTS).is_file():
        raise RunError(
            f"{run.path} has no weights yet (its status is {run.summary['status']!r}): "
            f"let it train for an epoch, or continue it with `fieldmark train --resume {run.path}`"
        )
    channels_last = bool(run.model_info["channels_last"])
    fabric = open_fabric(run.model_info)
    model = run.load_model()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = fabric.to_device(model)
    return lambda batch: predict_batches(fabric, model, [batch], flips=flips, channels_last=channels_last)
