"""Which parameter learns at what rate and with what decay: groups, the optimizer, and the schedule of the rate."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from fieldmark.errors import ConfigError, did_you_mean
from fieldmark.files import list_findings

_NOT_OURS = ("adahessian", "bnb", "fused")  # they need second derivatives in the loop, or a package for CUDA
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
) -> list[dict[str, Any]]:
    """Make an optimizer's groups of parameters: one or two (with and without decay) for each stage.

    `stages` are lists of (name, parameter) from the input outwards, the head last; the numbers are settings of
    `config.OptimConfig`. Parameters of one dimension or none (biases, norms, layer scales) and those named in
    `no_weight_decay` (such as position embeddings) are exempt from decay unless `decay_norms_and_biases`.
    A group has a `name` ("stage2.decay", "head.no_decay") and a `base_lr`, which the schedule multiplies.

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
        parameters: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        for name, parameter in stage:
            if parameter.requires_grad:
                is_exempt = not decay_norms_and_biases and (parameter.ndim <= 1 or name in no_weight_decay)
                parameters["no_decay" if is_exempt else "decay"].append(parameter)
        for kind, chosen in parameters.items():
            shared = {"lr": rate, "base_lr": rate, "weight_decay": weight_decay if kind == "decay" else 0.0}
            if chosen:
                groups.append({"params": chosen, **shared, "name": f"{'head' if is_head else f'stage{number}'}.{kind}"})
    if not groups:
        raise ConfigError("no parameter requires a gradient, so nothing would be trained: freeze fewer stages")
    return groups


def create_optimizer(name: str, groups: list[dict[str, Any]], *, use_fused: bool) -> Optimizer:
    """Make "adamw" (as torch's), "sgd" (Nesterov momentum 0.9) or an optimizer of timm.optim over `parameter_groups`.

    With `use_fused` adamw and sgd take torch's one-kernel step where the parameters' device has it. Same update to
    rounding, several times as fast. Not together with clipping under fp16 loss scaling: the kernel unscales within its
    step, so there is no moment at which Fabric could clip (`MixedPrecision.unscale_gradients` refuses).
    """
    settings: dict[str, Any] = {"lr": groups[-1]["lr"], "weight_decay": 0.0, "momentum": _MOMENTUM}
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # Else the choice is torch's: its kernel over many tensors on a GPU, or one tensor after the other.
    if use_fused and name in ("adamw", "sgd") and devices <= {"cpu", "cuda", "mps", "xpu"}:
        settings["fused"] = True
    names = optimizer_names()
    if name not in names:
        hint = did_you_mean(name, names, most=3) or "; adamw is a good choice."
        raise ConfigError(f"optim.name: there is no optimizer {name!r}{hint} All: {', '.join(names)}")
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, opt=name, **settings)
    except (ImportError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim.name: {name} cannot be used here: {error}. Give adamw or sgd") from error


def optimizer_names() -> list[str]:
    """List the names that `create_optimizer` takes, sorted."""
    from timm.optim import list_optimizers

    names = {str(name) for name in list_optimizers()} | {"adamw", "sgd"}
    return sorted(name for name in names if not name.startswith(_NOT_OURS))


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """The shape of a schedule; the names are those of the settings.

    "cosine" rises linearly over `warmup_epochs`, then falls along half a cosine and would reach 0 just
    after the last update. "constant" rises likewise and stays. Neither warms up from zero: the first update learns.
    "warm_restarts" is level within an epoch and has no warm-up: a half cosine over `restart_epochs` epochs (None is
    the whole run), then one `restart_factor` times as long, and so on, as torch's CosineAnnealingWarmRestarts stepped
    once per epoch.

    Source:
        Loshchilov & Hutter, "SGDR", arXiv:1608.03983, section 3, equation 5. Warm-up: Goyal et al.,
        arXiv:1706.02677, section 2.2.
    """

    name: Literal["cosine", "warm_restarts", "constant"]
    total_epochs: int
    warmup_epochs: float
    restart_epochs: int | None
    restart_factor: int

    def factor(self, step: int, *, steps_per_epoch: int) -> float:
        """Give the learning rate of update `step` (0-based) over the peak rate, in [0, 1]."""
        if self.name == "warm_restarts":
            position, length = self._find_cycle(step // steps_per_epoch)
            return self._fall(position / length)
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        falling_steps = max(self.total_epochs * steps_per_epoch - warmup_steps, 1)
        return self._fall(min((step - warmup_steps) / falling_steps, 1.0))

    def warnings(self) -> list[str]:
        """List what is likely to disappoint, one sentence each; empty for a schedule that ends well."""
        position, length = self._find_cycle(max(self.total_epochs - 1, 0))
        values = {"spec": self, "position": position, "length": length, "share": self._fall(position / length)}
        return list_findings("schedule.md", values) if self.total_epochs else []

    def _find_cycle(self, epoch: int) -> tuple[int, int]:
        """(epochs into its cycle, length of that cycle) of an epoch; whole numbers, so no rounding at a boundary."""
        length = self.restart_epochs or max(self.total_epochs, 1)
        if self.restart_factor == 1:
            return epoch % length, length
        while epoch >= length:
            epoch -= length
            length *= self.restart_factor
        return epoch, length

    def _fall(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2
