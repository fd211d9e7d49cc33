"""A timm backbone with a head of its own, its stages, and which of them learn.

Shape letters: B batch, C channels, H height, W width, D directions of pooling, F pooled features, K classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from fieldmark.errors import ConfigError, first_line
from fieldmark.models.catalog import check_name, fetch, hub_repository

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish)
# Directions of the channels whose covariance is taken. On birds100, 24, 48 and 64 gave the same within 0.3 points; on
# signs10, 64 gave 0.8 more at twice the features (cross-validated heads on EfficientNet-Lite0).
DIRECTIONS = 32
POWER = 3.0  # exponent of the generalized mean: 1 is the mean, infinity the maximum
STEPS = 5  # Newton-Schulz steps of the square root, as in the source
# Share of the mean variance that is added to each, so that the root exists where a photo shows less than D things.
RIDGE = 1e-3


class Classifier(nn.Module):
    """Backbone (B, 3, H, W) -> (B, F), dropout of the pooled features, head (B, F) -> (B, K).

    `pool` takes the backbone's feature map in place of the backbone's own pooling.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, name: str, feature_dropout: float, pool: CovariancePool | None
    ) -> None:
        super().__init__()
        self.backbone, self.pool, self.feature_dropout = backbone, pool, nn.Dropout(feature_dropout)
        self.head, self.name, self.num_frozen_stages, self.has_frozen_batchnorm = head, name, 0, False

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalized images (B, 3, H, W)."""
        return self.head(self.feature_dropout(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, F) of normalized images (B, 3, H, W), before any dropout."""
        try:
            with _fast_gradients() if self.training and images.device.type == "cpu" else nullcontext():
                features = self.backbone(images) if self.pool is None else self.pool(self.feature_map(images))
        except AssertionError as error:  # timm's way to refuse a size
            raise _refuse_size(self.name, self.backbone, images.shape[-1], error) from None
        if features.ndim != 2:
            raise ConfigError(
                f"model.name: {self.name} gives features of shape {tuple(features.shape)} rather than one vector for "
                "each photo, as an encoder of a larger system does. Choose a model that classifies"
            )
        return features

    def feature_map(self, images: Tensor) -> Tensor:
        """Feature map (B, C, H, W) of normalized images, before any pooling, of backbones that have one."""
        return cast(Any, self.backbone).forward_features(images)

    def classify_map(self, features: Tensor) -> Tensor:
        """Logits (B, K) of such a feature map, in evaluation."""
        return self.head(cast(Any, self.backbone).forward_head(features) if self.pool is None else self.pool(features))

    def count_stages(self) -> int:
        """Stages of the backbone, the stem included."""
        return max(_number_stages(self.backbone).values()) + 1

    def stage_parameters(self) -> list[list[tuple[str, nn.Parameter]]]:
        """(name, parameter) by stage, from the input: the stem, the backbone's stages, the head; each exactly once."""
        stage_of = _number_stages(self.backbone)
        stages: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(self.count_stages())]
        for name, parameter in self.backbone.named_parameters():
            stages[stage_of[name]].append((f"backbone.{name}", parameter))
        return [*stages, list(self.head.named_parameters(prefix="head"))]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone's authors exempt from decay besides norms and biases."""
        exempt = getattr(self.backbone, "no_weight_decay", set[str])
        return {f"backbone.{name}" for name in exempt()}

    def train(self, mode: bool = True) -> Self:
        """Switch to training, but for frozen stages: those compute as in evaluation.

        Their BatchNorm neither uses nor updates the statistics of a batch, and their stochastic depth is off: a stage
        that cannot learn is a fixed function. With `has_frozen_batchnorm` every BatchNorm of the backbone does so.
        """
        super().train(mode)
        if mode and self.num_frozen_stages:
            stage_of = _number_stages(self.backbone)
            for path, module in self.backbone.named_modules():
                prefix = path and f"{path}."
                stages = [stage for name, stage in stage_of.items() if name.startswith(prefix)]
                if stages and max(stages) < self.num_frozen_stages:
                    module.eval()
        if mode and self.has_frozen_batchnorm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
                    module.eval()
        return self


def _fast_gradients() -> AbstractContextManager[object]:
    if torch.compiler.is_compiling():
        return nullcontext()
    # Its kernels cost time to load, and only training has use for them.
    from fieldmark.models.depthwise import DepthwiseGradients

    return DepthwiseGradients()


def create_classifier(
    name: str,
    *,
    num_classes: int,
    head: Literal["linear", "mlp"],
    head_hidden: int,
    head_dropout: float,
    feature_dropout: float,
    drop_path: float,
    stride_in_1x1: bool,
    pool: Literal["average", "covariance"] = "average",
) -> Classifier:
    """Create a randomly initialized classifier; torch's global generator decides the weights.

    The "mlp" head is that of the competition report, dropout before the ReLU included. `drop_path` is the rate of
    stochastic depth in the last block (arXiv:1603.09382). `stride_in_1x1` gives the stride of a bottleneck to its first
    1x1 convolution: the original ResNet (He et al., arXiv:1512.03385, table 1), as Keras' weights have it, rather than
    "v1.5". `pool` is the backbone's own pooling, a mean as a rule, or `CovariancePool`.

    Raises ConfigError for an unknown name, or an option that this backbone does not have, and WeightsError where `name`
    is on the hub ("hf-hub:...") and the hub cannot be reached.
    """
    backbone = _create_backbone(name, drop_path)
    if stride_in_1x1:
        move_stride_to_1x1(backbone, name)
    # The width after the backbone's own pre-logits layer, which some networks (MobileNetV3, VGG) have.
    width = int(getattr(backbone, "head_hidden_size", None) or cast(int, backbone.num_features))
    covariance = None
    if pool == "covariance":
        if not has_positive_map(backbone):
            raise ConfigError(
                f"model.pool: {name} has no feature map that ends in a ReLU, which covariance pooling takes. "
                "Set model.pool=average"
            )
        covariance = CovariancePool(cast(int, backbone.num_features))
        width = covariance.width
    layers: nn.Module = nn.Linear(width, num_classes)
    if head == "mlp":
        layers = nn.Sequential(
            nn.Linear(width, head_hidden), nn.Dropout(head_dropout), nn.ReLU(), nn.Linear(head_hidden, num_classes)
        )
    return Classifier(backbone, layers, name=name, feature_dropout=feature_dropout, pool=covariance)


def has_positive_map(backbone: nn.Module) -> bool:
    """Whether a backbone ends in a map (B, C, H, W) behind a ReLU, as those of ResNets and EfficientNet-Lite do."""
    activations = [module for module in backbone.modules() if isinstance(module, _ACTIVATIONS)]
    if not activations or not isinstance(activations[-1], nn.ReLU | nn.ReLU6):
        return False
    pooling = getattr(backbone, "global_pool", None)  # elsewhere a norm or a layer may follow the map
    width = cast(Any, backbone).num_features
    return type(pooling).__name__ == "SelectAdaptivePool2d" and getattr(backbone, "head_hidden_size", width) == width


class CovariancePool(nn.Module):
    """Generalized mean of each channel, and the square root of the covariance of some directions: C + D (D + 1) / 2.

    Look-alike classes differ in what appears together where a mean over the photo only tells what appears. The root
    keeps a few strong directions from drowning the others.

    Source:
        Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", arXiv:1711.02512 (generalized
        mean); Li et al., "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root
        Normalization", arXiv:1712.01034 (the root).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        directions = min(DIRECTIONS, channels)
        self.width = channels + directions * (directions + 1) // 2
        rows, columns = torch.triu_indices(directions, directions)
        # Channels as they are, until `fit` chooses; a buffer, since it is chosen once and does not learn.
        self.register_buffer("projection", torch.eye(channels, directions))
        self.register_buffer("upper", rows * directions + columns, persistent=False)

    projection: Tensor  # (C, D)
    upper: Tensor  # indices of the upper triangle of a flat (D, D)

    def forward(self, maps: Tensor) -> Tensor:
        """Pooled features (B, F), float32, of a feature map (B, C, H, W) that is not negative."""
        is_mixed = torch.is_autocast_enabled(maps.device.type)
        with torch.autocast(maps.device.type, enabled=False) if is_mixed else nullcontext():
            maps = maps.float().clamp_min(1e-6)
            mean = maps.pow(POWER).mean((2, 3)).pow(1 / POWER)
            places = maps.flatten(2).transpose(1, 2) @ self.projection
            places = places - places.mean(1, keepdim=True)
            covariance = places.transpose(1, 2) @ places / places.shape[1]
            return torch.cat([mean, _root(covariance).flatten(1)[:, self.upper]], dim=1)

    @torch.no_grad()
    def fit(self, maps: Tensor) -> None:
        """Choose the directions in which the places of some photos' feature maps (B, C, H, W) vary most."""
        places = maps.float().cpu().transpose(0, 1).flatten(1)  # not every device has eigenvectors
        _, vectors = torch.linalg.eigh(torch.cov(places))
        self.projection.copy_(vectors[:, -self.projection.shape[1] :])


def _root(covariance: Tensor) -> Tensor:
    """Square roots of symmetric matrices (B, D, D) by products alone, which every runtime has."""
    identity = torch.eye(covariance.shape[1], device=covariance.device)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-6)[:, None, None]
    ridge = RIDGE / covariance.shape[1]
    root = (covariance / trace + ridge * identity) / (1 + RIDGE)
    inverse = identity.expand_as(root)
    for _ in range(STEPS):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return root * (trace * (1 + RIDGE)).sqrt()


def freeze_stages(model: Classifier, count: int | Literal["all"], *, freeze_batchnorm: bool = False) -> None:
    """Freeze exactly the first `count` stages of the backbone, the stem first; later ones, and the head, learn.

    Changes `requires_grad`, and the mode of frozen modules (see `Classifier.train`). `freeze_batchnorm` keeps the
    statistics of every BatchNorm of the backbone, learning stages included.
    """
    stages = model.stage_parameters()[:-1]
    number = len(stages) if count == "all" else count
    if not 0 <= number <= len(stages):
        raise ConfigError(
            f"model.freeze: {model.name} has {len(stages)} stages with its stem; got {count}. "
            f'Give 0 to {len(stages)}, or "all"'
        )
    for position, stage in enumerate(stages):
        for _, parameter in stage:
            parameter.requires_grad_(position >= number)
    model.head.requires_grad_(True)
    model.num_frozen_stages, model.has_frozen_batchnorm = number, freeze_batchnorm
    model.train(model.training)


def count_parameters(model: nn.Module) -> int:
    """All parameters, whether they learn or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_parameter_budget(counts: Sequence[tuple[str, int]], *, max_millions: float) -> None:
    """Raise ConfigError if the parameters of one model, or of an ensemble's (name, count) together, are too many."""
    total = sum(count for _, count in counts)
    if total <= max_millions * 1e6:
        return
    each = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts)
    what = f"{each} parameters" if len(counts) == 1 else f"{len(counts)} models, {total / 1e6:.2f} M in all ({each})"
    raise ConfigError(
        f"model.max_parameters_millions: the budget is {max_millions:g} M; got {what}. "
        "Choose a smaller backbone or head, fewer models, or raise the budget"
    )


# timm's modules whose transformers take images of other sizes, the first of any multiple of their patch, and how.
_SIZE_OPTIONS: dict[tuple[str, ...], dict[str, Any]] = {
    # Position embeddings, or masks of windows, are made anew where the size differs, and only there.
    ("vision_transformer", "deit", "eva"): {"dynamic_img_size": True},
    ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"): {"strict_img_size": False},
}


def require_size(name: str, size: int) -> None:
    """Raise ConfigError unless the architecture takes images of that side, in pixels; tried without any computing."""
    with torch.device("meta"), torch.inference_mode():
        backbone = _create_backbone(name, 0.0).eval()
        try:
            backbone(torch.empty(1, 3, size, size))
        except (AssertionError, RuntimeError) as error:
            raise _refuse_size(name, backbone, size, error) from None


def _refuse_size(name: str, backbone: nn.Module, size: int, error: Exception) -> ConfigError:
    own = cast(Any, backbone).pretrained_cfg["input_size"][-1]
    others = ", or of other multiples of its patch" if getattr(backbone, "dynamic_img_size", False) else ""
    reason = first_line(error).rstrip(".")
    return ConfigError(
        f"model.name: {name} takes images of {own} pixels{others}; got {size} ({reason}). "
        f"Set augment.size={own} and eval.size={own} without train.resolution_steps, or choose another model"
    )


def _create_backbone(name: str, drop_path: float) -> nn.Module:
    import timm
    from timm.models import is_model_in_modules

    check_name(name)
    if repository := hub_repository(name):
        fetch(repository, ["config.json"])  # raises what a user understands
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    for modules, size_options in _SIZE_OPTIONS.items():
        if is_model_in_modules(name.partition(".")[0], modules):
            options |= size_options
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ConfigError(f"model.drop_path: {name} has no stochastic depth; got {drop_path:g}. Give 0") from None


def move_stride_to_1x1(backbone: nn.Module, name: str) -> None:
    """Give the strides of a ResNet's bottlenecks to their first 1x1 convolutions; ConfigError where there are none."""
    for layer in ("layer2", "layer3", "layer4"):
        block: Any = next(iter(getattr(backbone, layer, ())), None)
        is_bottleneck = hasattr(block, "conv3")  # a basic block has no 1x1 convolution in front
        if not is_bottleneck or getattr(block.conv2, "stride", None) != (2, 2):
            raise ConfigError(
                f"model.stride_in_1x1: {name} has no strided 3x3 convolution in bottlenecks of layer2 to layer4 to "
                "take the stride from. It is for ResNets such as resnet50; set it to false"
            )
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def _number_stages(backbone: nn.Module) -> dict[str, int]:
    """Stage number of each tensor of the backbone, from the input, by timm's own coarse grouping."""
    from timm.models._manipulate import group_with_matcher

    names = list(dict.fromkeys([*backbone.state_dict(), *(name for name, _ in backbone.named_parameters())]))
    try:
        matcher = cast(Any, backbone).group_matcher(coarse=True)
    except (AttributeError, AssertionError):  # a few families have none (MetaFormer), or none for stages (RDNet)
        grouping = _group_by_numbers(names)
    else:
        # "" matches no pattern, so it marks the group of tensors outside any stage: a final norm or projection, which
        # belongs to the last stage.
        groups: Mapping[int, list[str]] = group_with_matcher(iter([(name, name) for name in (*names, "")]), matcher)
        grouping = {name: int(number) for number, members in groups.items() for name in members}
        outside = grouping.pop("")
        if isinstance(matcher, Mapping):
            grouping = {name: max(number - (number == outside), 0) for name, number in grouping.items()}
    order = {number: position for position, number in enumerate(sorted(set(grouping.values())))}
    return {name: order[number] for name, number in grouping.items()}


def _group_by_numbers(names: Sequence[str]) -> dict[str, int]:
    """Groups as the items of the largest numbered list of modules; the stem is what comes before it."""
    matches = {name: re.match(r"(\w+)\.(\d+)\.", name) for name in names}
    lists = Counter(match[1] for match in matches.values() if match)
    main = max(lists, key=lambda name: lists[name], default="")
    grouping: dict[str, int] = {}
    latest = 0
    for name, match in matches.items():
        latest = int(match[2]) + 1 if match and match[1] == main else latest
        grouping[name] = latest
    return grouping
