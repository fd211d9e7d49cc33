"""Averages of weights: over the course of a training, and over several trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


class RunningAverage:
    """Exponential moving average of a model's weights and buffers.

    Buffers are averaged too: with BatchNorm statistics of another model, averaged weights fail.

    Args:
        model: Copied; the copy's `model` is in evaluation mode and takes no gradients.
        decay: Share of the old average kept at each update, in [0, 1). Reached gradually: update t keeps at most
            (1 + t) / (10 + t), so that the start does not linger.

    Source:
        Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); the warm-up is TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Take in the weights after update number `step` (0-based)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        own, new = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        # One kernel for all tensors; torch's own optimisers use it under this name too.
        torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], 1 - keep)  # pyright: ignore[reportPrivateUsage]
        for name in own.keys() - set(floats):
            own[name].copy_(new[name])


def average_weights(members: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of several models' weights; integer buffers are the first member's.

    Source:
        Wortsman et al., "Model soups", arXiv:2203.05482, section 3 (uniform soup).
    """
    first = members[0]
    return {
        name: torch.stack([member[name].float() for member in members]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def greedy_soup(members: Sequence[Weights], score: Callable[[Weights], float]) -> tuple[list[int], dict[str, Tensor]]:
    """Add members, best first, for as long as the average does not get worse.

    Args:
        members: Weights of models of one architecture.
        score: Judges weights, larger is better. Called up to twice per member.

    Returns:
        Places of the members that stayed, best first, and their average.

    Source:
        Wortsman et al., "Model soups", arXiv:2203.05482, recipe 1.
    """
    scores = [score(member) for member in members]
    order = sorted(range(len(members)), key=lambda place: -scores[place])
    kept, best = order[:1], scores[order[0]]
    for place in order[1:]:
        candidate = score(average_weights([members[number] for number in [*kept, place]]))
        if candidate >= best:
            kept, best = [*kept, place], candidate
    return kept, average_weights([members[number] for number in kept])
