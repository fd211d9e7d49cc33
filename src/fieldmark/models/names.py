"""Model names: the report's short aliases, timm's names, and what to say about a name that is neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fieldmark.errors import ConfigError, WeightsError, did_you_mean

ALIASES: dict[str, str] = {
    "resnet50": "resnet50.fb_swsl_ig1b_ft_in1k",
    "resnext50": "resnext50_32x4d.fb_swsl_ig1b_ft_in1k",
    "resnet101": "resnet101.a1h_in1k",
    "resnext101": "resnext101_32x4d.fb_swsl_ig1b_ft_in1k",
    "resnext101-wide": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
    "seresnext50": "seresnext50_32x4d.racm_in1k",
    "seresnext101": "seresnextaa101d_32x8d.sw_in12k_ft_in1k_288",
}
"""The report's seven backbones: short alias -> timm architecture and the tag of its weights."""

_MISSPELT = {"fb_sws_l": "fb_swsl", "fb_sswl": "fb_swsl", "seresnexta101d": "seresnextaa101d"}
"""Typing errors of the report, and what they stand for."""

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
"""timm's prefixes for a model that is described on the hub rather than in timm itself."""


def resolve_name(name: str, weights: str) -> str:
    """The timm name behind an alias.

    Two aliases (`resnet50`, `resnet101`) are timm architectures too. So an alias means the report's own weights only
    where weights come from the hub; with a file, a package or random weights it is the architecture alone, because
    the tag would claim a licence, a pre-training and an input size that those weights do not have. A full timm name
    (`resnet50.a1_in1k`) always means itself.

    Args:
        name: An alias, a timm name with or without its tag, or `hf-hub:owner/model`.
        weights: As `model.weights` in a recipe: "pretrained", "random", a file, a folder, or "package:...".

    Returns:
        A name that `timm.create_model` takes.

    Raises:
        ConfigError: Neither an alias nor a name that timm knows; names close matches.
    """
    full = ALIASES.get(name, name)
    if name in ALIASES and weights != "pretrained":
        full = full.partition(".")[0]
    check_name(full)
    return full


def check_name(name: str) -> None:
    """Raise ConfigError, with close matches, unless timm knows the name."""
    import timm

    if name.startswith(HUB_PREFIXES):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(
            f"model.name: timm has no model {name!r}{_did_you_mean(name)} "
            f"Give a timm name or one of the aliases {', '.join(ALIASES)}"
        )
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        known = f"only {', '.join(full.partition('.')[2] for full in tags)}" if tags else "and no others"
        raise ConfigError(
            f"model.name: timm has no weights {tag!r} of {architecture}, {known}{_did_you_mean(name)} "
            f"Or give {architecture!r} alone"
        )


def _did_you_mean(name: str) -> str:
    import timm

    fixed = name
    for wrong, right in _MISSPELT.items():
        fixed = fixed.replace(wrong, right)
    candidates = list(dict.fromkeys([*ALIASES, *ALIASES.values(), *timm.list_models(), *timm.list_pretrained()]))
    return did_you_mean(fixed, candidates, most=1 if fixed in candidates else 3, cutoff=0.75) or "."


def list_models(pattern: str) -> list[dict[str, Any]]:
    """Models with what one wants to know before choosing.

    Args:
        pattern: "" for the short names alone; else a part of a timm name, or a pattern with `*`.

    Returns:
        name, alias ("" for none), train_size and test_size in pixels, licence, pretraining.

    Raises:
        ConfigError: No pre-trained model fits.
    """
    import timm

    alias_of = {name: alias for alias, name in ALIASES.items()}
    names = list(ALIASES.values())
    if pattern:
        names = timm.list_pretrained(pattern if "*" in pattern else f"*{pattern}*")
        if not names:
            raise ConfigError(f"timm has no pre-trained model like {pattern!r}; try a shorter part, such as 'resnet'")
    return [_row(name, alias_of.get(name, "")) for name in names]


def _row(name: str, alias: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    from fieldmark.models.provenance import describe_pretraining, input_config

    settings = get_pretrained_cfg(name)
    if settings is None:
        raise ConfigError(f"timm has no weights for {name!r}: its version does not fit ours, update it")
    picture = input_config(settings, is_own=True)
    return {
        "name": name,
        "alias": alias,
        "train_size": picture.train_size,
        "test_size": picture.test_size,
        "licence": settings.license or "unknown",
        "pretraining": describe_pretraining(settings.tag or ""),
    }


def format_models(rows: Sequence[dict[str, Any]]) -> str:
    """A table for people."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'alias':16}{'timm name':{width}}  pixels (test)  licence         pre-trained on"]
    for row in rows:
        pixels = f"{row['train_size']} ({row['test_size']})"
        lines.append(f"{row['alias']:16}{row['name']:{width}}  {pixels:14} {row['licence']:15} {row['pretraining']}")
    return "\n".join(lines)


TIMEOUT_SECONDS = 5.0
"""How long the hub may take to answer whether a file is there."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""File names under which timm looks for weights on the hub, in its order."""

WAYS_OUT = (
    "Give model.weights a .safetensors or .pth file, or a folder with config.json and model.safetensors; "
    "or an installed package (model.weights=package:efficientnet-lite0 with model.name=tf_efficientnet_lite0); "
    "or random. Behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT; files that are in the cache already need "
    "no network"
)


def check_hub_model(name: str) -> None:
    """Make sure that the description of an `hf-hub:` model is to be had; other names pass.

    Raises:
        WeightsError: The hub cannot be reached, or has no such model.
    """
    for prefix in HUB_PREFIXES:
        if name.startswith(prefix):
            fetch(name.removeprefix(prefix), ["config.json"])


def pretrained_file(config: Any, name: str, *, download: bool = True) -> Path | None:
    """The weight file of a timm pretrained configuration, downloaded if it must be.

    Args:
        config: timm's PretrainedCfg.
        name: The model as the user knows it, for messages.
        download: Otherwise the hub is only asked whether it has the file.

    Returns:
        A file in the hub's cache; None where timm names only a URL, which timm fetches itself.

    Raises:
        WeightsError: There are no such weights, or they cannot be fetched. Within seconds, not after retries.
    """
    if config is None or not (config.hf_hub_id or config.url or config.file):
        raise WeightsError(
            f"model.weights: timm has no pretrained weights of {name}. Choose another model (`fieldmark models`), or "
            "give model.weights a file, a folder or random"
        )
    if config.file:
        return Path(config.file)
    if not config.hf_hub_id:
        return None
    names = [config.hf_hub_filename] if config.hf_hub_filename else WEIGHT_FILES
    return fetch(config.hf_hub_id, names, download=download)


def fetch(repository: str, file_names: Sequence[str], *, download: bool = True) -> Path:
    """The first of some files that a hub repository has.

    Args:
        repository: "owner/name", or "owner/name@revision".
        file_names: In order of preference.
        download: Otherwise the answer is the name of the file on the hub, which has it.

    Raises:
        WeightsError: The hub cannot be reached, refuses, or has none of the files.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    for file_name in file_names:
        cached = hub.try_to_load_from_cache(repository, file_name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    try:
        for file_name in file_names:
            url = hub.hf_hub_url(repository, file_name, revision=revision or None)
            try:
                hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
            except EntryNotFoundError:
                continue
            if not download:
                return Path(file_name)
            return Path(hub.hf_hub_download(repository, file_name, revision=revision or None))
    except Exception as error:  # the client raises its HTTP library's errors, and that library changes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"model.weights: {repository} cannot be fetched from the hub: {reason.rstrip('.')}. {WAYS_OUT}"
        ) from None
    raise WeightsError(f"model.weights: {repository} on the hub has none of {', '.join(file_names)}. {WAYS_OUT}")
