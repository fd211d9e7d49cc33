"""MixUp and CutMix: a batch blended from itself, and the labels with it.

Which method, how much and which partner are drawn apart from their execution, from (seed, epoch, step). Targets are
distributions over classes always, mixed or not: a loss that treated hard labels otherwise would change its scale
between mixed and clean batches.

Shape letters: B photos of a batch, K classes, H, W height and width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.augment.sample import MIX, uniforms

Method = Literal["mixup", "cutmix"]


@dataclass(frozen=True, slots=True)
class MixSpec:
    """Says how often and how strongly batches are mixed; `config.MixConfig` says what each field means."""

    share: float
    cutmix_share: float
    mixup_alpha: tuple[float, float]
    cutmix_alpha: tuple[float, float]

    @property
    def shares(self) -> dict[Method, float]:
        """Share of all batches that each method gets."""
        return {"mixup": self.share * (1 - self.cutmix_share), "cutmix": self.share * self.cutmix_share}

    @property
    def methods(self) -> tuple[Method, ...]:
        """Methods that mixed batches may get."""
        used: tuple[tuple[Method, bool], ...] = (("mixup", self.cutmix_share < 1), ("cutmix", self.cutmix_share > 0))
        return tuple(method for method, is_used in used if is_used)


@dataclass(frozen=True, slots=True)
class Mix:
    """Holds what happens to one batch."""

    kind: Literal["none", "mixup", "cutmix"]
    lam: float  # λ in [0, 1], the share that each photo keeps of itself; of CutMix exactly the share of pixels
    box: tuple[int, int, int, int]  # x, y, width, height in pixels of CutMix's rectangle, all 0 otherwise
    partners: NDArray[np.int64]  # (B,), a permutation: the index in the batch of each photo's partner


def draw_mix(spec: MixSpec, *, seed: int, epoch: int, step: int, batch_size: int, image_size: int) -> Mix:
    """Draw what happens to one batch in the 0-based epoch and update of the run.

    One u ~ U(0, 1) decides: u < share (1 - cutmix_share) is MixUp, else u < share is CutMix, else none.

    Source:
        Zhang et al., "mixup", arXiv:1710.09412, sec. 2; Yun et al., "CutMix", arXiv:1905.04899, sec. 3.1.
    """
    u = float(uniforms(seed, epoch, [step], stream=MIX, count=1)[0, 0])
    if u >= spec.share:
        return Mix("none", 1.0, (0, 0, 0, 0), np.arange(batch_size))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, step, MIX])))
    kind: Method = "mixup" if u < spec.shares["mixup"] else "cutmix"
    lam, box = _draw_lambda(spec, kind, rng, image_size)
    return Mix(kind, lam, box, rng.permutation(batch_size))


def lambda_draws(spec: MixSpec, method: Method, *, count: int, seed: int, image_size: int) -> NDArray[np.float64]:
    """(count,) values of λ of one method, drawn as for batches: for the histograms."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, MIX])))
    return np.array([_draw_lambda(spec, method, rng, image_size)[0] for _ in range(count)])


def apply_mix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Blend every photo (B, C, H, W), and its target (B, K), with its partner; the arguments are left as they were."""
    if mix.kind == "none":
        return images, targets
    partners = torch.from_numpy(mix.partners).to(images.device, non_blocking=images.device.type == "cuda")
    # lerp, not a·λ + b·(1 − λ): it leaves equal targets exactly as they are.
    mixed_targets = torch.lerp(targets[partners], targets, mix.lam)
    if mix.kind == "mixup":
        return torch.lerp(images[partners], images, mix.lam), mixed_targets
    x, y, width, height = mix.box
    mixed = images.clone()
    mixed[:, :, y : y + height, x : x + width] = images[partners, :, y : y + height, x : x + width]
    return mixed, mixed_targets


def one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B, K) float32 targets of (B,) class numbers, with a share of each row spread evenly over all classes.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture", arXiv:1512.00567, sec. 7.
    """
    even = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), even, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + even)


def _draw_lambda(
    spec: MixSpec, kind: Method, rng: np.random.Generator, image_size: int
) -> tuple[float, tuple[int, int, int, int]]:
    """λ and rectangle of one batch; CutMix's λ is recomputed from the rectangle's true area after clipping."""
    alpha = rng.uniform(*(spec.mixup_alpha if kind == "mixup" else spec.cutmix_alpha))
    lam = float(rng.beta(alpha, alpha))
    if kind == "mixup":
        return lam, (0, 0, 0, 0)
    half = int(image_size * math.sqrt(1.0 - lam)) // 2
    center_x, center_y = rng.integers(image_size, size=2).tolist()
    left, right = max(center_x - half, 0), min(center_x + half, image_size)
    top, bottom = max(center_y - half, 0), min(center_y + half, image_size)
    box = (left, top, right - left, bottom - top)
    return (image_size**2 - box[2] * box[3]) / image_size**2, box
