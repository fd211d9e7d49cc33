"""The head alone, on features that a frozen backbone computed once.

Shape letters: N photos, F features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.data.workers import Batch
from fieldmark.models.classifier import Classifier
from fieldmark.training.evaluate import predict_batches

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def compute_features(
    fabric: Fabric, model: Classifier, batches: Iterable[Batch], *, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Pooled features of every photo.

    Args:
        fabric: Device, precision, and the other processes.
        model: Whose features are wanted.
        batches: This process's share; together the shares hold each photo once.
        channels_last: Memory layout of the images.

    Returns:
        (N, F) float32 and the photos' numbers (N,) int64, both on the CPU, by rising number: those of all processes, so
        that each fits the same head.
    """
    model.eval()
    found = predict_batches(fabric, model.features, batches, flips=False, channels_last=channels_last)
    return torch.from_numpy(found.logits), torch.from_numpy(found.numbers)


def train_head(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[float]:
    """Fit `head` in place with AdamW under a cosine to zero.

    Args:
        head: (B, F) features to (B, K) logits, on the CPU.
        features: (N, F) float32.
        targets: (N, K) float32, each row a distribution over classes.
        epochs: Passes over the features.
        lr: Peak learning rate.
        weight_decay: Decoupled decay of all but biases.
        batch_size: Features per update.
        generator: Source of the order; drawn from once per epoch.

    Yields:
        Mean loss of each epoch.

    Source:
        Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        arXiv:2202.10054, section 3 (probe first, then fine-tune).
    """
    decayed = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr, weight_decay=weight_decay
    )
    num_steps = epochs * math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    head.train()
    for _ in range(epochs):
        total = torch.zeros(())
        order = torch.randperm(len(features), generator=generator)
        for rows in order.split(batch_size):
            loss = functional.cross_entropy(head(features[rows]), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        yield (total / len(features)).item()
    # What the last update left would be added to the first gradient of the training that follows.
    optimizer.zero_grad(set_to_none=True)
    head.eval()
