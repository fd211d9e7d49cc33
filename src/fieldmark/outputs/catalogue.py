"""Which models there are: the short names, and timm's pre-trained ones by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldmark.errors import ConfigError


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

    from fieldmark.vision.names import ALIASES

    alias_of = {name: alias for alias, name in ALIASES.items()}
    names = list(ALIASES.values())
    if pattern:
        names = timm.list_pretrained(pattern if "*" in pattern else f"*{pattern}*")
        if not names:
            raise ConfigError(f"timm has no pre-trained model like {pattern!r}; try a shorter part, such as 'resnet'")
    return [_row(name, alias_of.get(name, "")) for name in names]


def _row(name: str, alias: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    from fieldmark.vision.provenance import describe_pretraining, input_config

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
