"""Is the training still sane? Asked at every update, without making a GPU wait for the answer."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from fieldmark.errors import TrainingError


class NonFiniteError(TrainingError):
    """A loss or a gradient is not finite.

    Args:
        step: Number of the update, 0-based.
        numbers: Photos of the batch.
    """

    def __init__(self, step: int, numbers: list[int]) -> None:
        super().__init__(f"loss or gradient of update {step} is not finite")
        self.step = step
        self.numbers = numbers


class FiniteWatch:
    """Raises when a watched number is not finite.

    On the CPU at once, before the weights move. On a GPU reading a number would stall it, so the number is copied to
    the host behind the work and looked at some updates later, at the latest by `drain`: which is called before anything
    is evaluated or saved, so no bad weights reach the disk.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Tensor, torch.cuda.Event]] = deque()

    def see(self, value: Tensor, *, step: int, numbers: Tensor) -> None:
        """Watch one number.

        Args:
            value: 0-d, on the device.
            step: Number of the update, 0-based.
            numbers: (B,) int64 photo numbers of its batch, on the CPU.

        Raises:
            NonFiniteError: This number or, on a GPU, an earlier one is not finite.
        """
        if value.device.type != "cuda":
            if not torch.isfinite(value):
                raise NonFiniteError(step, numbers.tolist())
            return
        copy = torch.empty((), dtype=value.dtype, pin_memory=True)
        copy.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, numbers, copy, event))
        while self._pending and self._pending[0][3].query():
            self._judge()

    def drain(self) -> None:
        """Wait for all that is still on its way.

        Raises:
            NonFiniteError: One of them is not finite.
        """
        while self._pending:
            self._pending[0][3].synchronize()
            self._judge()

    def _judge(self) -> None:
        step, numbers, copy, _ = self._pending.popleft()
        if not torch.isfinite(copy):
            self._pending.clear()
            raise NonFiniteError(step, numbers.tolist())
