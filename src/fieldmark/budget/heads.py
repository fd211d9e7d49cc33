"""A converged linear head on frozen features, its strength of decay chosen by cross-validation.

Shape letters: N photos, F features, R rank of the features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.training.evaluate import softmax
from fieldmark.training.metrics import log_loss

# L2 penalties that are tried, from the strongest: of the mean loss in nats, on standardized features.
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
# Assumed second derivative of the loss along a feature of variance 1, which scales the search and not its result.
CURVATURE = 1e-3
COARSE, FINE = 30, 60  # iterations of a fit that is compared in cross-validation, and of the one that is kept


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head that takes raw features: the standardization is folded into its weights."""

    weight: Tensor  # (K, F) float32
    bias: Tensor  # (K,) float32
    l2: float  # the strength that was chosen
    out_of_fold: NDArray[np.float32]  # (N, K) probabilities, each photo's by a head that was fitted without its fold

    def answer(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(M, K) probabilities of raw features (M, F)."""
        with torch.inference_mode():
            return softmax(self.as_linear()(torch.from_numpy(features)).numpy())

    def as_linear(self) -> nn.Linear:
        """The head as a module."""
        num_classes, width = self.weight.shape
        layer = nn.Linear(width, num_classes, device="meta")  # draws no random numbers
        layer.weight, layer.bias = nn.Parameter(self.weight.clone()), nn.Parameter(self.bias.clone())
        return layer


def fit_head(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
    *,
    num_classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Head:
    """Multinomial logistic regression on standardized features, the bias unpenalized.

    The features are rotated onto their principal axes, of which there are at most N: exact under an L2 penalty, and it
    makes the search well conditioned. Strengths are tried from strong to weak, each fold from its own previous
    solution, until the out-of-fold loss rises. Of (N, F) features with (N,) class numbers and (N,) folds, at least two
    different; strengths fall.
    """
    basis = _Basis.of(torch.from_numpy(features))
    targets = torch.from_numpy(labels)
    parts = [torch.from_numpy(folds == fold) for fold in np.unique(folds)]
    weights = [torch.zeros(len(basis.variances) + 1, num_classes) for _ in parts]  # along the axes; last, the bias
    best: tuple[float, float, Tensor, Tensor] | None = None
    for l2 in strengths:
        probabilities = torch.empty(len(labels), num_classes)
        for number, held_out in enumerate(parts):
            inside, own = basis.rotated[~held_out], targets[~held_out]
            weights[number] = _minimize(basis, inside, own, l2, weights[number], COARSE)
            probabilities[held_out] = basis.logits(basis.rotated[held_out], weights[number]).softmax(1)
        loss = log_loss(probabilities.numpy(), labels)
        if best is not None and loss >= best[0]:
            break
        best = (loss, l2, probabilities, torch.stack(weights).mean(0))
    assert best is not None
    _, l2, out_of_fold, near = best
    solution = _minimize(basis, basis.rotated, targets, l2, near, FINE)
    return Head(*basis.unrotate(solution), l2, out_of_fold.numpy())


def refit_head(features: NDArray[np.float32], labels: NDArray[np.int64], head: Head) -> Head:
    """The head fitted to other photos, with its strength and from its weights."""
    basis = _Basis.of(torch.from_numpy(features))
    start = torch.cat(
        [basis.axes.T @ (head.weight.T * basis.std[:, None]), (head.bias + head.weight @ basis.mean)[None]]
    )
    weight, bias = basis.unrotate(_minimize(basis, basis.rotated, torch.from_numpy(labels), head.l2, start, FINE))
    return replace(head, weight=weight, bias=bias)


@dataclass(frozen=True, eq=False)
class _Basis:
    """Standardized features on their principal axes."""

    mean: Tensor  # (F,) of the raw features
    std: Tensor  # (F,); 1 for a constant feature
    axes: Tensor  # (F, R) orthonormal
    variances: Tensor  # (R,) of the standardized features along each axis
    rotated: Tensor  # (N, R)

    @classmethod
    def of(cls, features: Tensor) -> _Basis:
        mean, std = features.mean(0), features.std(0, correction=0)
        std = torch.where(std > 1e-6 * std.max().clamp_min(1e-30), std, torch.ones_like(std))
        scaled = (features - mean) / std
        is_wide = scaled.shape[0] < scaled.shape[1]
        gram = (scaled @ scaled.T if is_wide else scaled.T @ scaled) / len(features)
        try:
            values, vectors = torch.linalg.eigh(gram)
        except torch.linalg.LinAlgError:  # features that depend on each other: LAPACK can fail in 32 bits
            values, vectors = (part.float() for part in torch.linalg.eigh(gram.double()))
        kept = values > 1e-6 * values[-1].clamp_min(1e-30)
        values, vectors = values[kept], vectors[:, kept]
        axes = scaled.T @ vectors / (values * len(features)).sqrt() if is_wide else vectors
        return cls(mean, std, axes, values, scaled @ axes)

    def unrotate(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(K, F) weight and (K,) bias for raw features, of (R + 1, K) along the axes with the bias in the last row."""
        weight = (self.axes @ weights[:-1] / self.std[:, None]).T.contiguous()
        return weight, weights[-1] - weight @ self.mean

    def logits(self, rotated: Tensor, weights: Tensor) -> Tensor:
        """(N, K) logits of rotated features."""
        return torch.addmm(weights[-1], rotated, weights[:-1])


def _minimize(basis: _Basis, rotated: Tensor, targets: Tensor, l2: float, start: Tensor, iterations: int) -> Tensor:
    """(R + 1, K) weights that minimize mean cross-entropy + l2 / 2 * squared weights, by L-BFGS from `start`."""
    scale = 1 / (CURVATURE * basis.variances + l2).sqrt()
    scale = torch.cat([scale, torch.full((1,), CURVATURE**-0.5)])[:, None]
    one_hot = functional.one_hot(targets, start.shape[1]).float()
    scaled = start / scale
    search = torch.optim.LBFGS(
        [scaled], max_iter=iterations, history_size=10, tolerance_grad=1e-7, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def evaluate() -> Tensor:
        weights = scaled * scale
        log_probabilities = basis.logits(rotated, weights).log_softmax(1)
        error = (log_probabilities.exp() - one_hot) / len(targets)
        scaled.grad = torch.cat([rotated.T @ error + l2 * weights[:-1], error.sum(0, keepdim=True)]) * scale
        fit = (log_probabilities * one_hot).sum() / len(targets)
        return l2 / 2 * weights[:-1].square().sum() - fit

    search.step(evaluate)  # type: ignore[no-untyped-call]
    return scaled * scale
