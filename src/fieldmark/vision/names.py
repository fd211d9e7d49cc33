"""Model names: the report's short aliases, timm's names, and what to say about a name that is neither."""

from __future__ import annotations

import difflib

from fieldmark.errors import ConfigError

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
            f"model.name: timm has no model {name!r}.{_did_you_mean(name)} "
            f"Give a timm name or one of the aliases {', '.join(ALIASES)}"
        )
    if tag and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        known = f"only {', '.join(full.partition('.')[2] for full in tags)}" if tags else "and no others"
        raise ConfigError(
            f"model.name: timm has no weights {tag!r} of {architecture}, {known}.{_did_you_mean(name)} "
            f"Or give {architecture!r} alone"
        )


def _did_you_mean(name: str) -> str:
    import timm

    mended = name
    for wrong, right in _MISSPELT.items():
        mended = mended.replace(wrong, right)
    candidates = list(dict.fromkeys([*ALIASES, *ALIASES.values(), *timm.list_models(), *timm.list_pretrained()]))
    close = [mended] if mended in candidates else difflib.get_close_matches(mended, candidates, n=3, cutoff=0.75)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
