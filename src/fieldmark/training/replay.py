"""An update's passes on a CUDA device, recorded once and then replayed: one launch in place of a thousand.

Python takes longer to launch the kernels of a batch of 32 photos one by one than a large GPU to compute them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ALIKE_FIRST = 3  # batches of one shape in a row, before its passes are recorded: the last of an epoch may be smaller


class Replay:
    """Forward and backward pass of a model in training, replayed for batches of one shape.

    Every gradient lies where the next replay will write, so it must be used up before: no accumulation.

    Source:
        PyTorch's `torch.cuda.make_graphed_callables`.
    """

    def __init__(self, fabric: Fabric, model: nn.Module) -> None:
        self._fabric, self._model = fabric, model
        self._recorded: Any = None  # what the recording holds for
        self._latest: tuple[Any, int] = (None, 0)  # what came last, and how often in a row
        self._passes: nn.Module | None = None

    def compute(self, images: Tensor) -> Tensor | None:
        """(B, K) logits of a batch, or None where nothing is recorded that fits it."""
        learning = tuple(parameter.requires_grad for parameter in self._model.parameters())
        key = images.shape, learning, tuple(module.training for module in self._model.modules())
        if key != self._recorded:
            self._latest = key, self._latest[1] + 1 if key == self._latest[0] else 1
            if self._latest[1] < ALIKE_FIRST:
                return None
            self._recorded, self._passes = key, None  # the memory of the former recording is free again
            self._passes = self._record(images)
        return None if self._passes is None else self._passes(images)

    def _record(self, images: Tensor) -> nn.Module | None:
        """Record the passes, with running statistics and random numbers as if nothing had run; None if it fails."""
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        numbers = torch.cuda.get_rng_state(images.device)
        try:
            with self._fabric.autocast(), warnings.catch_warnings():
                # The streams differ while recording, and nothing waits for a gradient's sum then.
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
                torch.set_autocast_cache_enabled(False)
                passes: Any = torch.cuda.make_graphed_callables(
                    _Whole(self._model), (images.clone(),), allow_unused_input=True
                )
        except RuntimeError:  # a model that reads a number back, or memory that is short: its passes go as before
            passes = None
        torch.cuda.empty_cache()  # what the passes took before they were recorded, which have memory of their own now
        for name, buffer in self._model.named_buffers():
            buffer.copy_(buffers[name])
        torch.cuda.set_rng_state(numbers, images.device)
        return passes


class _Whole(nn.Module):
    """The model, whose own `forward` stays as it is while this one's is replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)
