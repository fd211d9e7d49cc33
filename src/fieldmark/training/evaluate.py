"""A model and a loader become predictions or features: each photo exactly once, on any number of processes.

Shape letters: B batch, N photos, K classes, F features.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.data.loader import Batch
from fieldmark.errors import NonFiniteError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Computer: TypeAlias = "Fabric | Device"


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next update; elsewhere this does nothing.

    By default every large tensor is mapped from the system and given back, so each update faults its pages in anew:
    with EfficientNet-Lite0 at 160 pixels a quarter of a training step's CPU time (2.3 s against 1.65 s for 32 photos
    on one core).
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def has_fast_bf16() -> bool:
    """Whether the processor itself computes in bf16; oneDNN supports it by AVX-512 alone too, slower than 32 bit."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    is_native = not is_x86 or torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return is_native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Device:
    """Where a model answers, and in what precision: what `predict_batches` needs of a Fabric, without its imports.

    Those take seconds that a single prediction need not wait for.
    """

    device: torch.device
    precision: str
    world_size: int = 1

    @classmethod
    def choose(cls, precision: str) -> Device:
        """The GPU or the processor, in the precision that the run was evaluated in, where it is fast here.

        A run's accuracy, temperature and threshold were measured in that precision, so it is what answers; a processor
        without bf16, which would emulate it slowly, and fp16 on a processor give way to 32 bit.
        """
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), precision)
        keep_freed_memory()
        is_kept = precision == "bf16-mixed" and has_fast_bf16()
        return cls(torch.device("cpu"), precision if is_kept else "32-true")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the model computes in."""
        if self.precision == "32-true":
            return nullcontext()
        kind = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device.type, dtype=kind)


@dataclass(frozen=True)
class Predictions:
    """Holds what a model says of some photos, in the order of their numbers."""

    numbers: NDArray[np.int64]  # (N,) photo numbers in the index, rising
    logits: NDArray[np.float32]  # (N, K)

    def require_finite(self, *, step: int) -> None:
        """Refuse logits that are not finite, after update number `step` (0-based).

        Weights that are finite can be too large to compute with.
        """
        is_bad = ~np.isfinite(self.logits).all(axis=1)
        if is_bad.any():
            raise NonFiniteError(step, [], what=f"the output for {is_bad.sum()} of {len(self.logits)} photos after")

    def probabilities(self) -> NDArray[np.float32]:
        """(N, K) softmax of the logits."""
        return softmax(self.logits)


@dataclass(frozen=True)
class Validation:
    """Holds what a model scores on the validation photos; both are empty without any."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])  # as `metrics.summarize` gives them
    predictions: Predictions | None = None


def softmax(logits: NDArray[np.floating[Any]], *, temperature: float = 1.0) -> NDArray[np.float32]:
    """(N, K) probabilities, computed in 64 bit and rounded once."""
    scaled = logits.astype(np.float64) / temperature
    with np.errstate(invalid="ignore"):  # a row that is not finite has no probabilities: NaN
        scaled -= scaled.max(axis=1, keepdims=True, initial=-np.inf)
        exponents = np.exp(scaled)
        return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)


@torch.inference_mode()
def predict_batches(
    fabric: Computer, model: Callable[[Tensor], Tensor], batches: Iterable[Batch], *, flips: bool, channels_last: bool
) -> Predictions:
    """Predict this process's share of batches, with `flips` also mirrored and averaged; give each process them all."""
    numbers: list[Tensor] = []
    logits: list[Tensor] = []
    for batch in batches:
        images = batch.images.to(fabric.device, non_blocking=fabric.device.type == "cuda")
        images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        with fabric.autocast():
            output = model(images)
            if flips:
                output = (output + model(images.flip(-1))) / 2
        numbers.append(batch.numbers)
        logits.append(output.float().clone())
    own_numbers = torch.cat(numbers).cpu().numpy() if numbers else np.zeros(0, np.int64)
    own_logits = torch.cat(logits).cpu().numpy() if logits else np.zeros((0, 0), np.float32)
    return _gather(fabric, own_numbers, own_logits)


def _gather(fabric: Computer, numbers: NDArray[np.int64], logits: NDArray[np.float32]) -> Predictions:
    if fabric.world_size > 1:
        # Shares differ in length, and an empty one does not know K: objects may differ, tensors may not.
        shares: list[tuple[NDArray[np.int64], NDArray[np.float32]] | None] = [None] * fabric.world_size
        torch.distributed.all_gather_object(shares, (numbers, logits))
        filled = [share for share in shares if share is not None and len(share[0])]
        numbers = np.concatenate([share[0] for share in filled])
        logits = np.concatenate([share[1] for share in filled])
    order = np.argsort(numbers, kind="stable")
    assert len(np.unique(numbers)) == len(numbers), "a photo was evaluated twice"
    return Predictions(numbers[order], logits[order])
