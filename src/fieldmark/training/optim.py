"""Which parameter learns at what rate and with what decay, and the optimizer that does it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fieldmark.errors import ConfigError, did_you_mean

_NOT_OURS = ("adahessian", "bnb", "fused")
"""timm's optimizers that need second derivatives in the loop, or a package for CUDA."""

_MOMENTUM = 0.9


def parameter_groups(
    stages: Sequence[Sequence[tuple[str, nn.Parameter]]],
    *,
    lr: float,
    backbone_lr_scale: float,
    layer_decay: float,
    weight_decay: float,
    decay_norms_and_biases: bool,
    no_weight_decay: Collection[str],
    include_frozen: bool,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one or two (with and without decay) for each stage.

    Args:
        stages: (name, parameter) by stage from the input outwards, the head last.
        lr: Peak rate of the head, > 0.
        backbone_lr_scale: Rate of the backbone's last stage over the head's, > 0.
        layer_decay: Rate of a backbone stage over that of the next one outwards, in (0, 1].
        weight_decay: Decay of the parameters that are decayed, >= 0.
        decay_norms_and_biases: Decay every parameter. If not, those of one dimension or none (biases, norms, layer
            scales) are exempt, and so is `no_weight_decay`.
        no_weight_decay: Names of further parameters to exempt, such as position embeddings.
        include_frozen: Keep parameters that do not require gradients, for stages that are thawed later. An optimizer
            passes over them as long as they have no gradient, decay included.

    Returns:
        Dicts with `params`, `lr` and `weight_decay`, and for us `name` ("stage2.decay", "head.no_decay") and
        `base_lr`, which `schedule.Schedule` multiplies. Every parameter asked for is in exactly one. Groups without
        parameters are left out.

    Raises:
        ConfigError: Nothing is left to learn.

    Source:
        Layer-wise rates: Clark et al., "ELECTRA", arXiv:2003.10555, section 3.1 and table 6; for stages of image
        networks: Bao et al., "BEiT", arXiv:2106.08254. Exemptions from decay: He et al., "Bag of Tricks",
        arXiv:1812.01187, section 3.1.
    """
    groups: list[dict[str, Any]] = []
    last = len(stages) - 2  # the backbone's last stage
    for number, stage in enumerate(stages):
        is_head = number == len(stages) - 1
        rate = lr if is_head else lr * backbone_lr_scale * layer_decay ** (last - number)
        chosen = [(name, parameter) for name, parameter in stage if include_frozen or parameter.requires_grad]
        exempt = [
            not decay_norms_and_biases and (parameter.ndim <= 1 or name in no_weight_decay)
            for name, parameter in chosen
        ]
        for is_exempt, suffix in ((False, "decay"), (True, "no_decay")):
            parameters = [parameter for (_, parameter), this in zip(chosen, exempt, strict=True) if this is is_exempt]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": rate,
                        "base_lr": rate,
                        "weight_decay": 0.0 if is_exempt else weight_decay,
                        "name": f"{'head' if is_head else f'stage{number}'}.{suffix}",
                    }
                )
    if not groups:
        raise ConfigError("no parameter requires a gradient, so nothing would be trained: freeze fewer stages")
    return groups


def create_optimizer(name: str, groups: list[dict[str, Any]], *, use_fused: bool) -> Optimizer:
    """An optimizer over parameter groups.

    Args:
        name: "adamw" (betas 0.9 and 0.999, eps 1e-8, as torch), "sgd" (Nesterov momentum 0.9) or a name of timm.optim.
        groups: From `parameter_groups`.
        use_fused: Let adamw and sgd take torch's one-kernel step where the parameters' device has it. Same update to
            rounding, several times as fast. Not together with clipping under fp16 loss scaling, because the kernel
            would unscale by itself (Fabric refuses).

    Raises:
        ConfigError: Unknown name, with close matches, or an optimizer that cannot be used here.
    """
    settings: dict[str, Any] = {"lr": groups[-1]["lr"], "weight_decay": 0.0}  # each group brings its own
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # None leaves the choice to torch: its kernel over many tensors on a GPU, else one tensor after the other.
    fused = True if use_fused and devices <= {"cpu", "cuda", "mps", "xpu"} else None
    if name == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True, **settings, fused=fused)
    names = optimizer_names()
    if name not in names:
        hint = did_you_mean(name, names, most=3) or "; adamw is a good choice."
        raise ConfigError(f"optim.name: there is no optimizer {name!r}{hint} All: {', '.join(names)}")
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, opt=name, momentum=_MOMENTUM, **settings)
    except (ImportError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim.name: {name} cannot be used here: {error}. Give adamw or sgd") from error


def optimizer_names() -> list[str]:
    """Names that `create_optimizer` takes, sorted."""
    from timm.optim import list_optimizers

    names = {str(name) for name in list_optimizers()} | {"adamw", "sgd"}
    return sorted(name for name in names if not name.startswith(_NOT_OURS))
