"""An update's passes on a CUDA device, recorded once and then replayed: one launch in place of a thousand.

Python takes longer to launch the kernels of a batch of 32 photos one by one than a large GPU takes to compute them.
"""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ALIKE_FIRST = 3  # batches of one shape in a row, before its passes are recorded: the last of an epoch may be smaller


class Replay:
    """Forward and backward pass of a model in training, replayed for batches of one shape.

    Gradients share memory with the recording: use them before the next replay, and do not accumulate them. What a model
    draws from the processor's random numbers would be the same in each replay.

    Source:
        PyTorch's `torch.cuda.make_graphed_callables`.
    """

    def __init__(self, fabric: Fabric, model: nn.Module) -> None:
        self._fabric, self._model = fabric, model
        self._recorded: Any = None  # what the recording holds for
        self._latest: tuple[Any, int] = (None, 0)  # what came last, and how often in a row
        self._passes: nn.Module | None = None
        self._is_over = False

    def compute(self, images: Tensor) -> Tensor | None:
        """(B, K) logits of a batch, or None where nothing is recorded that fits it."""
        if self._is_over:
            return None
        weights = tuple((parameter.requires_grad, parameter.data_ptr()) for parameter in self._model.parameters())
        key = images.shape, weights, tuple(module.training for module in self._model.modules())
        self._latest = key, self._latest[1] + 1 if key == self._latest[0] else 1
        if key != self._recorded and self._latest[1] >= ALIKE_FIRST:
            self._forget()
            self._recorded, self._passes = key, self._record(images)
        return self._passes(images) if key == self._recorded and self._passes is not None else None

    def give_up(self) -> bool:
        """Free the recording and make no other; gives whether there was one."""
        had_one, self._is_over = self._passes is not None, True
        self._forget()
        return had_one

    def _forget(self) -> None:
        self._recorded = self._passes = None
        gc.collect()  # torch's recordings refer to themselves
        torch.cuda.empty_cache()

    def _record(self, images: Tensor) -> nn.Module | None:
        """Record the passes, with running statistics and random numbers as if nothing had run; None if it cannot be."""
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        numbers, cached = torch.cuda.get_rng_state(images.device), torch.is_autocast_cache_enabled()
        gc.disable()  # freeing another recording would spoil this one
        try:
            with self._fabric.autocast(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream|Synchronization debug mode")
                torch.set_autocast_cache_enabled(False)
                self._try(images)
                if torch.cuda.mem_get_info(images.device)[0] < torch.cuda.max_memory_allocated(images.device):
                    return None  # a recording takes as much again
                # The stream is set back even where recording fails.
                with torch.cuda.stream(torch.cuda.current_stream(images.device)):
                    passes: Any = torch.cuda.make_graphed_callables(
                        _Whole(self._model), (images.clone(),), allow_unused_input=True
                    )
            return passes
        except RuntimeError:
            return None
        finally:
            gc.enable()
            torch.set_autocast_cache_enabled(cached)
            torch.cuda.empty_cache()  # of passes that were not recorded
            with torch.no_grad():
                for name, buffer in self._model.named_buffers():
                    buffer.copy_(buffers[name])
            torch.cuda.set_rng_state(numbers, images.device)

    def _try(self, images: Tensor) -> None:
        """Run both passes once, and raise if they wait for the device: a recording that does cannot be ended well."""
        learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(self._model(images).float().sum(), learning, allow_unused=True)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.empty_cache()


class _Whole(nn.Module):
    """The model, whose own `forward` stays as it is while this one's is replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)
